"""A small round: a network with BatchNorm, K clients around it, what the server released, and inputs."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from tracefl.evidence import coalitions


def federation(K=4, N=3, seed=0, spread=1.0):
    """model, states, weights, incoming, inputs, targets; the model is the fusion with noise on it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    incoming = {name: noisy(w, 0.3) for name, w in model.state_dict().items()}
    states = {f"c{k}": {name: noisy(w, spread) for name, w in incoming.items()} for k in range(K)}
    weights = {who: k + 1.0 for k, who in enumerate(states)}
    model.load_state_dict({name: noisy(w, 0.1) for name, w in fused(states, weights, list(states)).items()})
    return model, states, weights, incoming, torch.randn(N, 5), torch.arange(N) % 3


def noisy(w, spread):
    return w + spread * torch.rand(w.shape) if w.is_floating_point() else w + 1


def fused(states, weights, members):
    total = sum(weights[who] for who in members)
    first = states[members[0]]
    return {
        name: sum(states[who][name].double() * weights[who] / total for who in members).to(w.dtype)
        if w.is_floating_point()
        else w
        for name, w in first.items()
    }


def log_odds_of(model, state, x, targets):
    model = copy.deepcopy(model)
    model.load_state_dict(state)
    with torch.no_grad():
        p = model.eval()(x).double().softmax(1)[torch.arange(len(x)), targets]
    return (p / (1 - p)).log()


def value(model, states, weights, incoming, x, targets, members):
    """v(S) by definition."""
    return log_odds_of(model, fused(states, weights, members) if members else incoming, x, targets)


class Table:
    """A game whose values are known, in the place of `Game`."""

    def __init__(self, v, p):
        self.v, self.p, self.ids, self.N = v, p, [f"c{k}" for k in range(len(p))], v.shape[1]
        self.played = 0

    def play(self, sets, nobody):
        self.played += len(sets)
        return self.v[(sets.long() * 2 ** torch.arange(len(self.p))).sum(1)]

    def ends(self):
        one = torch.eye(len(self.p), dtype=torch.bool)
        v = self.play(torch.cat([one.any(0, keepdim=True), one, ~one]), self.v[0])
        return v[0], v[1 : len(one) + 1], v[len(one) + 1 :]


def nonlinear(K, N, seed=0):
    """A game that bends like fused models: a function of weighted means of several directions."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(K, generator=generator, dtype=torch.float64) + 0.3
    p /= p.sum()
    where = 3 * torch.randn(K, 4, N, generator=generator, dtype=torch.float64)
    sets = coalitions.members(K).double()
    mean = torch.einsum("sk,kdn->sdn", sets * p / (sets @ p).clamp_min(1e-9)[:, None], where)
    v = mean[:, 0] - 0.2 * mean[:, 1] ** 2 + torch.sin(mean[:, 2]) * mean[:, 3].relu()
    v[0] = math.pi / 10
    return Table(v, p)
