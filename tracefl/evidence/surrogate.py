"""A stand-in for the coalition game that costs no model: fitted to the ends, then only numbers.

Fusing the clients of S moves the model by Σ_k c_k (W_k - W_all),

    c_k(S) = 1[k in S] p_k / Σ_{j in S} p_j - p_k.

To first order y follows as Σ_k c_k a_k, a weighted mean. Where networks are least linear, at single
clients, the second order counts as much; with clients that deviate independently it is
Σ_k c_k² h_k. Networks of ReLUs bend along a line sooner than a square does, those with BatchNorm
later, so that the power is left open:

    s(S) = v(all) + Σ_k c_k a_k + Σ_k |c_k|^power h_k,        s(∅) = v(∅)

Every client alone and all without it are 2 K values for the 2 K numbers a, h; but a constant on all
a's changes nothing, since Σ_k c_k = 0. So one equation is left over for each input, and the power
is the one that meets it best. No gradient takes part: leaving a client out tells what its
derivative (influence) would.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tracefl.evidence.coalitions import MOST_CLIENTS, members, shapley

POWERS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0)
ROUNDING = 1e-5  # of outputs in single precision: what a client of less weight moves is lost in it
ORDERS, FEWEST_CYCLES = 1 << 14, 8  # of clients, to add up marginal contributions: at least so many
CELLS = 1 << 21  # numbers to work on at a time


@dataclass(frozen=True)
class Surrogate:
    """s, for N inputs and K clients."""

    p: Tensor  # [K] weights, which add up to 1
    nobody: Tensor  # [N] v(∅)
    everyone: Tensor  # [N] v(all)
    a: Tensor  # [K, N]
    h: Tensor  # [K, N]
    power: Tensor  # [N]

    @classmethod
    def fit(cls, p: Tensor, nobody: Tensor, everyone: Tensor, alone: Tensor, without: Tensor) -> "Surrogate":
        """The surrogate nearest to the values of every client alone and all without it, [K, N]."""
        K = len(p)
        one = torch.eye(K, dtype=torch.bool)
        c, v = moves(torch.cat([one, ~one]), p), torch.cat([alone, without]) - everyone
        v, few = torch.cat([v, v.new_zeros(2 * K, v.shape[1])]), ROUNDING * torch.eye(2 * K, dtype=c.dtype)
        missed, found = list[Tensor](), list[Tensor]()
        for power in POWERS:
            M = torch.cat([torch.cat([c, c.abs() ** power], 1), few])
            found.append(torch.linalg.lstsq(M, v, driver="gels").solution)
            missed.append((M @ found[-1] - v).square().sum(0))
        best = torch.stack(missed).argmin(0)
        x = torch.stack(found)[best, :, torch.arange(len(best))].T
        return cls(p, nobody, everyone, x[:K], x[K:], torch.tensor(POWERS, dtype=p.dtype)[best])

    def values(self, sets: Tensor) -> Tensor:
        """s of sets, bool [M, K] -> [M, N]."""
        c = moves(sets, self.p)
        s = self.everyone + c @ self.a
        for power in self.power.unique().tolist():
            some = self.power == power
            s[:, some] += c.abs() ** power @ self.h[:, some]
        return torch.where(sets.any(1, keepdim=True), s, self.nobody)

    def shapley(self, seed: int) -> tuple[Tensor, Tensor]:
        """Shapley values of s and the variance of their error, both [N, K].

        Exact up to MOST_CLIENTS; else the mean over random orders, each of them begun at every
        client in turn, so that every client is at every place equally often.
        """
        K, N = len(self.p), len(self.nobody)
        if K <= MOST_CLIENTS:
            phi = torch.cat([shapley(self.some(i).values(members(K))) for i in _slices(N, 2**K)])
            return phi, torch.zeros_like(phi)
        generator = torch.Generator().manual_seed(seed)
        cycles = max(FEWEST_CYCLES, -(-ORDERS // K))
        orders = [torch.randperm(K, generator=generator) for _ in range(cycles)]
        found = torch.stack([torch.cat([self.some(i)._gained(order) for i in _slices(N, K * K)]) for order in orders])
        return found.mean(0), found.var(0) / cycles

    def some(self, inputs: slice) -> "Surrogate":
        """The surrogate of some inputs."""
        i = inputs
        return Surrogate(self.p, self.nobody[i], self.everyone[i], self.a[:, i], self.h[:, i], self.power[i])

    def _gained(self, order: Tensor) -> Tensor:
        """[N, K] what a client adds when it comes, mean over an order begun at every place.

        With P the weight of those who came, s = v(all) + Σ_came p_k a_k / P - Σ p_k a_k
        + ((1 - P) / P)^power Σ_came p_k^power h_k + Σ_others p_k^power h_k.
        """
        K = len(order)
        turned = order[(torch.arange(K)[:, None] + torch.arange(K)) % K]  # [K, K], a row each begin
        bent = self.p[:, None] ** self.power * self.h
        P = self.p[turned].cumsum(1)[:, :, None]
        P[:, -1] = 1  # whatever rounding leaves
        came = bent[turned].cumsum(1)
        s = self.everyone + (self.p[:, None] * self.a)[turned].cumsum(1) / P - self.p @ self.a
        s += ((1 - P).clamp_min(0) / P) ** self.power * came + (bent.sum(0) - came)
        s[:, -1] = self.everyone
        gained = s.diff(dim=1, prepend=self.nobody.expand(K, 1, -1))
        total = torch.zeros(K, len(self.nobody), dtype=s.dtype)
        return total.index_add_(0, turned.flatten(), gained.flatten(0, 1)).T / K


def moves(sets: Tensor, p: Tensor) -> Tensor:
    """c [M, K] of sets, bool [M, K]; of the empty set 0."""
    weight = (sets.double() @ p)[:, None]
    return torch.where(weight > 0, sets * p / weight.clamp_min(torch.finfo(p.dtype).tiny) - p, 0.0)


def _slices(N: int, rows: int) -> list[slice]:
    """Of N inputs with so many rows each, those that are worked on at a time."""
    at_once = max(1, CELLS // rows)
    return [slice(first, first + at_once) for first in range(0, N, at_once)]
