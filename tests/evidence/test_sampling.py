"""Strata and their estimates: complete ones are exact, drawn ones are right on average."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tracefl.evidence import coalitions
from tracefl.evidence.sampling import FEWEST, Stratum, draw, estimate, standard_error, stratified


@settings(max_examples=60, deadline=None, derandomize=True)
@given(K=st.integers(4, 60), share=st.floats(0, 1))
def test_strata_cover_every_size_once_and_spend_all_draws(K, share):
    most = min(2**K - 2 * K - 2, 3000)
    draws = max(FEWEST, int(share * most))
    strata = stratified(K, draws)
    assert [t for stratum in strata for t in stratum.sizes] == list(range(2, K - 1))
    assert sum(stratum.n for stratum in strata) == draws
    for stratum in strata:
        assert stratum.n >= min(FEWEST, math.comb(K, stratum.sizes[0]))
        assert len(stratum.sizes) > 1 or stratum.n <= math.comb(K, stratum.sizes[0])


@pytest.mark.parametrize(("stratum", "K"), [((2,), 6), ((3,), 12), ((4,), 30), ((2, 3, 4), 8), ((5, 9), 12)])
def test_drawn_coalitions_have_their_sizes(stratum, K):
    sets = draw(Stratum(stratum, 12), K, np.random.default_rng(0))
    assert sets.shape == (12, K)
    assert set(sets.sum(1).tolist()) <= set(stratum)
    if len(stratum) == 1:
        assert len({tuple(row) for row in sets.tolist()}) == 12


def test_complete_strata_give_shapley_values():
    K, v = 6, torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size, phi = coalitions.members(K).sum(1), ((v[-1] - v[0]) / K)[:, None].expand(3, K)
    for t in range(1, K):
        some = coalitions.members(K)[size == t]
        mean, variance = estimate(Stratum((t,), len(some)), some, v[size == t])
        assert variance.abs().max() < 1e-12
        phi = phi + mean
    assert torch.allclose(phi, coalitions.shapley(v))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2,), (3,), (2, 3, 4), (3, 4)])
def test_estimates_and_variances_are_right_on_average(sizes):
    K, v = 7, torch.randn(128, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    size = coalitions.members(K).sum(1)
    truth = sum(
        estimate(Stratum((t,), math.comb(K, t)), coalitions.members(K)[size == t], v[size == t])[0] for t in sizes
    )
    stratum, random, found = Stratum(sizes, 9), np.random.default_rng(0), []
    for _ in range(2000):
        sets = draw(stratum, K, random)
        found.append(estimate(stratum, sets, v[(sets.long() * 2 ** torch.arange(K)).sum(1)]))
    means, variances = (torch.stack(some)[:, 0] for some in zip(*found, strict=True))
    assert ((means.mean(0) - truth[0]).abs() < 4.5 * means.std(0) / math.sqrt(2000)).all()
    assert torch.allclose(means.sum(1), torch.zeros(2000).double(), atol=1e-9)
    assert (variances.mean(0) / means.var(0)).min() > 0.85
    assert (variances.mean(0) / means.var(0)).max() < 1.25


def test_few_draws_make_the_error_wider():
    one, other = torch.full((1, 1), 4.0).double(), torch.zeros(1, 1).double()
    assert standard_error([one, other], [10**6, 5]).item() == pytest.approx(2, rel=1e-5)
    assert standard_error([one, other], [4, 5]).item() == pytest.approx(2 * 3.182446 / 1.959964)
    assert standard_error([other, other], [4, 5]).item() == 0
