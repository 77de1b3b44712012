"""The coalition game on networks small enough to enumerate by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from tracefl.errors import TraceFLError
from tracefl.evidence import coalitions


def game(K=4, N=3):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    incoming = {k: v + torch.rand(v.shape, generator=generator) for k, v in model.state_dict().items()}
    clients = {
        f"c{k}": {n: v + torch.rand(v.shape, generator=generator) for n, v in model.state_dict().items()}
        for k in range(K)
    }
    weights = {f"c{k}": k + 1.0 for k in range(K)}
    return model, clients, weights, incoming, torch.randn(N, 5, generator=generator), torch.arange(N) % 3


def by_definition(model, clients, weights, incoming, x, targets, chosen):
    if chosen:
        total = sum(weights[who] for who in chosen)
        state = {n: sum(clients[who][n] * weights[who] / total for who in chosen) for n in incoming}
    else:
        state = incoming
    model.load_state_dict(state)
    p = model.eval()(x).detach().softmax(1)[torch.arange(len(x)), targets].double()
    return (p / (1 - p)).log()


def test_every_coalition_is_its_own_fusion():
    arguments = game()
    v = coalitions.values(*arguments)
    ids = list(arguments[1])
    for mask in range(16):
        chosen = [who for k, who in enumerate(ids) if mask >> k & 1]
        assert torch.allclose(v[mask], by_definition(*arguments, chosen), atol=1e-4)


def test_shapley_is_the_mean_over_orders():
    v = torch.randn(16, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slow = torch.zeros(2, 4, dtype=torch.float64)
    for order in itertools.permutations(range(4)):
        mask = 0
        for k in order:
            slow[:, k] += (v[mask | 1 << k] - v[mask]) / 24
            mask |= 1 << k
    assert torch.allclose(coalitions.shapley(v), slow)
    assert torch.allclose(slow.sum(1), v[15] - v[0])


def test_leave_one_out():
    v = torch.arange(8.0).double()[:, None] ** 2
    assert coalitions.leave_one_out(v).tolist() == [[49 - 36, 49 - 25, 49 - 9]]


def test_client_lds_is_one_for_an_additive_game():
    scores = torch.tensor([[1.0, -2.0, 4.5]])
    v = coalitions.members(3).double() @ scores.double().T
    assert coalitions.client_lds(v.exp(), scores).tolist() == pytest.approx([1])
    assert coalitions.client_lds(-v, scores).tolist() == pytest.approx([-1])


def test_client_lds_by_weighted_means_is_one_where_fusing_moves_linearly():
    """v(S) = mean of the members' a, weighted: sums of p_k a_k do not tell its order, weighted means do."""
    p, a = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([[1.0, -2.0, 4.5]]).double()
    sets = coalitions.members(3).double()
    v = (sets * p) @ a.T / (sets @ p).clamp_min(1e-9)[:, None]
    assert coalitions.client_lds(v, p * a, p=p).tolist() == pytest.approx([1])
    assert coalitions.client_lds(v, p * a).item() < 0.95
    with pytest.raises(TraceFLError, match=r"weights must be above 0 to predict by weighted means, got 0\.0"):
        coalitions.client_lds(v, a, p=torch.tensor([1.0, 0.0, 1.0]))


def test_too_many_clients():
    model, clients, _, incoming, x, targets = game(K=1)
    many = {f"c{k}": clients["c0"] for k in range(20)}
    with pytest.raises(TraceFLError, match=r"must be 1 to 14, got 20 \(2\^20 coalitions\)"):
        coalitions.values(model, many, dict.fromkeys(many, 1), incoming, x, targets)
