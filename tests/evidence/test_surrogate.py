"""The surrogate: right where it is fitted, its Shapley values those of its own table."""

from __future__ import annotations

import pytest
import torch

from tests.evidence.small import nonlinear
from tracefl.evidence import coalitions, surrogate
from tracefl.evidence.surrogate import Surrogate, moves


def fitted(K, N=5):
    game = nonlinear(K, N)
    everyone, alone, without = game.ends()
    return game, Surrogate.fit(game.p, game.v[0], everyone, alone, without)


def test_it_meets_the_values_that_it_is_fitted_to():
    game, s = fitted(7)
    table, size = s.values(coalitions.members(7)), coalitions.members(7).sum(1)
    assert torch.equal(table[[0, -1]], game.v[[0, -1]])
    scale = game.v.std(0)
    assert ((table - game.v)[size == 1].abs() < 0.05 * scale).all()
    assert ((table - game.v)[size == 6].abs() < 0.05 * scale).all()
    assert (table - game.v).std(0).mean() < 0.5 * scale.mean()


def test_a_game_of_its_own_kind_is_found_again():
    K, N = 6, 4
    p = torch.arange(1.0, K + 1, dtype=torch.float64) / (K * (K + 1) / 2)
    a, h = torch.randn(2, K, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    power = torch.tensor([1.25, 1.5, 2.0, 3.0], dtype=torch.float64)
    true = Surrogate(p, torch.zeros(N).double(), torch.ones(N).double(), a, h, power)
    one = torch.eye(K, dtype=torch.bool)
    found = Surrogate.fit(p, true.nobody, true.everyone, true.values(one), true.values(~one))
    assert torch.equal(found.power, power)
    assert torch.allclose(found.values(coalitions.members(K)), true.values(coalitions.members(K)), atol=1e-4)


def test_moves_are_what_fusing_does_to_the_model():
    p, W = torch.tensor([0.2, 0.3, 0.5]).double(), torch.tensor([1.0, -2.0, 7.0]).double()
    sets = torch.tensor([[True, False, True], [False, True, False], [True, True, True]])
    fused = torch.stack([(sets[i] * p * W).sum() / (sets[i] * p).sum() for i in range(3)])
    assert torch.allclose(moves(sets, p) @ W, fused - p @ W)


@pytest.mark.slow
@pytest.mark.parametrize("K", [2, 5, 9])
def test_random_orders_agree_with_the_table(K, monkeypatch):
    _, s = fitted(K)
    exact, none = s.shapley(0)
    assert none.eq(0).all()
    assert torch.allclose(exact, coalitions.shapley(s.values(coalitions.members(K))))
    monkeypatch.setattr(surrogate, "MOST_CLIENTS", 1)
    drawn, variance = s.shapley(0)
    assert torch.allclose(drawn.sum(1), s.everyone - s.nobody)
    assert ((drawn - exact).abs() <= 5 * variance.sqrt() + 1e-9).all()
    assert variance.sqrt().max() < 0.04 * exact.abs().mean()
    assert torch.equal(s.shapley(0)[0], drawn)
    monkeypatch.setattr(surrogate, "CELLS", 100)
    assert torch.allclose(s.shapley(0)[0], drawn)
