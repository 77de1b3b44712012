"""Answers as sets: by hand, what confidence promises where nothing distinguishes clients, and who gets no answer."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from tracefl import Provenance, TraceFLError, answer_sets
from tracefl.evidence.answers import AnswerSets, critical, members


def found(contributions, targets=None, error=None):
    c = torch.as_tensor(np.asarray(contributions), dtype=torch.float64)
    targets = torch.zeros(len(c), dtype=torch.int64) if targets is None else torch.as_tensor(targets)
    error = None if error is None else torch.as_tensor(error, dtype=torch.float64)
    ids = [f"c{k}" for k in range(c.shape[1])]
    return Provenance("shapley", ids, targets, c[None], ["all"], None, None, error)


def test_standard_errors_by_hand():
    error = [[0.3, 0.4, 0.0, 0.1]]
    q = critical(0.9, 4, math.inf)
    sigma = math.sqrt((0.3**2 + 0.4**2) * 3 / 2)  # three clients were drawn
    for gap, expected in ((q * sigma - 1e-6, ["c0", "c1"]), (q * sigma + 1e-6, ["c0"])):
        assert answer_sets(found([[5, 5 - gap, 1, 0]], error=error)).sets == [expected]


def test_the_spread_of_a_class_by_hand():
    """Two classes: differences of c0 and c1 deviate by 0.3 in the one and by 1 in the other."""
    gaps = np.array([2.1, 2.7, 4.0, 6.0])
    contributions = np.stack([20 + gaps, np.full(4, 20.0), np.zeros(4)], 1)
    targets = [0, 0, 1, 1]
    own, both = np.array([0.18, 0.18, 2, 2]), (0.18 + 2) / 2
    sigma, q = np.sqrt(np.maximum(own, both)), critical(0.9, 3, 2)
    expected = [["c0", "c1"] if gap <= q * s else ["c0"] for gap, s in zip(gaps, sigma, strict=True)]
    assert {tuple(names) for names in expected} == {("c0", "c1"), ("c0",)}
    assert answer_sets(found(contributions, targets)).sets == expected


def test_groups_of_ones_own_take_the_place_of_classes_and_errors():
    contributions = [[5.0, 1.0, 0.0], [5.1, 1.1, 0.0], [1.0, 5.0, 0.0], [1.1, 5.2, 0.0]]
    mixed = answer_sets(found(contributions))
    assert mixed.sets == [[]] * 4 or all("c1" in names for names in mixed.sets)
    apart = answer_sets(found(contributions, error=np.full((4, 3), 9.0)), by=["a", "a", "b", "b"])
    assert apart.sets == [["c0"], ["c0"], ["c1"], ["c1"]]


@pytest.mark.parametrize("source", ["error", "spread"])
def test_clients_that_nothing_distinguishes_are_in_as_often_as_promised(source):
    """Any given client is in the answer, or nobody is, in at least 90 % of the cases."""
    random, N, K = np.random.default_rng(0), 4000, 6
    c = random.normal(size=(N, K))
    if source == "error":  # independent errors whose rows add up to 0: what Shapley's are
        c -= c.mean(1, keepdims=True)
        named = members(c, range(N), np.full((N, K), math.sqrt(1 - 1 / K)))
    else:
        named = np.concatenate([members(part, [0, 0, 1, 1, 1], None) for part in c.reshape(-1, 5, K)])
    held = (named[:, 0] | ~named.any(1)).mean()
    assert 0.88 < held < (0.92 if source == "error" else 0.98)  # the larger of two spreads is on the safe side


def test_a_lead_beyond_doubt_is_named_alone_whatever_the_scale():
    random = np.random.default_rng(1)
    c = random.normal(size=(12, 5)) * 1e-9 + np.array([0, 0, 1e-7, 0, 0])
    assert answer_sets(found(c, [0] * 6 + [1] * 6)).sets == [["c2"]] * 12
    assert answer_sets(found(1e12 * c, [0] * 6 + [1] * 6)).sets == [["c2"]] * 12


@pytest.mark.parametrize(
    ("contributions", "targets", "error"),
    [
        ([[1.0, 1.0, 1.0]], [0], np.zeros((1, 3))),  # all contribute the same
        ([[0.0, 0.0, 0.0]] * 2, [0, 0], None),
        ([[3.0, 2.0, 1.0]], [0], np.full((1, 3), 9.0)),  # the set would hold everybody
        ([[3.0, 2.0, 1.0]], [0], None),  # no spread is known
        ([[3.0, 2.0, 1.0], [0.0, 9.0, 1.0]], [0, 1], np.full((2, 3), math.nan)),
    ],
)
def test_nobody_is_named_where_nothing_can_be_told(contributions, targets, error):
    sets = answer_sets(found(contributions, targets, error))
    assert sets.sets == [[]] * len(targets)
    assert (math.isnan(sets.size), sets.nobody) == (True, 1.0)
    assert math.isnan(sets.coverage(["c0"] * len(targets)).value)


def test_exact_values_name_the_first_and_those_that_equal_it():
    sets = answer_sets(found([[3.0, 2.0, 1.0], [2.0, 4.0, 4.0]], [0, 1], np.zeros((2, 3))))
    assert sets.sets == [["c0"], ["c1", "c2"]]


def test_a_single_client_is_named():
    assert answer_sets(found([[0.5], [0.0]])).sets == [["c0"], ["c0"]]


def test_more_confidence_takes_more_clients_in():
    c = np.random.default_rng(2).normal(size=(10, 8)) + np.arange(8)
    sizes = [answer_sets(found(c, [0] * 10), confidence=p).size for p in (0.05, 0.5, 0.9, 0.99)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_the_order_of_clients_and_inputs_does_not_matter():
    random = np.random.default_rng(3)
    c, targets = random.normal(size=(9, 5)) + np.arange(5), np.arange(9) % 3
    rows, columns = random.permutation(9), random.permutation(5)
    there = members(c[rows][:, columns], targets[rows].tolist(), None)
    assert (there == members(c, targets.tolist(), None)[rows][:, columns]).all()


def test_coverage_beside_random_sets_of_the_same_size():
    sets = AnswerSets([["a"], ["b", "c"], [], ["a", "b"]], ["a", "b", "c", "d"], 0.9)
    assert sets.coverage(["a", "b", "d", "d"]) == (2 / 3, pytest.approx((1 / 4 + 1 / 2 + 1 / 2) / 3))
    assert sets.coverage([["a", "d"], {"d"}, [], []]) == (1 / 3, pytest.approx((1 / 2 + 1 / 2 + 0) / 3))
    with pytest.raises(TraceFLError, match="truth must be 4 clients, one per input, got 1"):
        sets.coverage(["a"])
    with pytest.raises(TraceFLError, match="truth must name clients of a, b, c, d, got e"):
        sets.coverage(["a", "e", "a", "a"])
    with pytest.raises(TraceFLError, match="truth must name clients of a, b, c, d, got 3"):
        sets.coverage([0, 1, 2, 3][::-1])
    with pytest.raises(TraceFLError, match="truth must be 4 clients, one per input, got 'abcd'"):
        sets.coverage("abcd")


@pytest.mark.parametrize("confidence", [0, 1, 90, -0.1, "0.9", None, math.nan])
def test_confidence_is_a_share(confidence):
    with pytest.raises(TraceFLError, match="confidence must be above 0 and below 1"):
        found([[1.0, 2.0]]).sets(confidence=confidence)


def test_a_group_for_every_input():
    with pytest.raises(TraceFLError, match="by must be 1 groups, one per input, got 2"):
        answer_sets(found([[1.0, 2.0]]), by=[0, 1])
    for by in (3, [[0]]):
        with pytest.raises(TraceFLError, match=r"by must be 1 groups, one per input .*: give the name or number"):
            answer_sets(found([[1.0, 2.0]]), by=by)


def test_without_inputs_there_are_no_sets():
    sets = found(np.zeros((0, 3)), []).sets()
    assert sets.sets == []
    assert math.isnan(sets.nobody)


@pytest.mark.parametrize(("K", "freedom"), [(2, 5), (2, 1), (7, math.inf), (40, 12), (10, 2)])
def test_the_critical_value_by_drawing(K, freedom):
    if K == 2:
        expected = stats.t.ppf(0.9, freedom)
        assert critical(0.9, K, freedom) == pytest.approx(expected, rel=2e-3)
    random, n = np.random.default_rng(0), 40_000
    S = 1.0 if math.isinf(freedom) else np.sqrt(random.chisquare(freedom, n) / freedom)
    z = random.normal(size=(n, K))
    held = (z.max(1) - z[:, 0] <= critical(0.9, K, freedom) * math.sqrt(2) * S).mean()
    assert held == pytest.approx(0.9, abs=0.006)


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("answers")


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "alpha", "norm"), [(0, 0.3, False), (1, 0.7, False), (2, 0.5, True), (3, 100, False)])
def test_on_digits_answers_hold_the_client_that_is_first_in_truth(benchmark, seed, alpha, norm):
    of = benchmark.federation(seed, rounds=3, inputs=90, alpha=alpha, norm=norm)
    truth = benchmark.exact_values(of)
    first = [list(of.states)[k] for k in truth.argmax(1).tolist()]
    for method, evaluations in (("influence", None), ("shapley", None), ("shapley", 60)):
        sets = benchmark.explained(of, method, evaluations).sets()
        held = sets.coverage(first)
        if sets.nobody < 1:
            assert held.value >= 0.9
            assert held.value > held.chance
        if alpha < 1:
            assert sets.nobody < 0.1
            assert sets.size < 3


@pytest.mark.slow
def test_on_digits_shuffled_weights_destroy_the_answer(benchmark):
    """Model randomisation, over three federations, one with BatchNorm: who is responsible can no longer be told.

    Of influence and Shapley values nothing but chance is left. The paper's method then ranks the clients by how far
    their weights have grown, which goes with the number of their examples, the same for every input.
    """
    rounds = [benchmark.federation(seed, rounds=3, inputs=60, norm=seed == 2) for seed in range(3)]
    pairs = [(of, benchmark.exact_values(of)) for of in rounds]
    for method in ("neuron", "influence", "shapley"):
        assert min(benchmark.agreement(*both, method, "as it is", shuffles=1) for both in pairs) > 0.6
        for how in ("alike", "apart"):
            kept = [benchmark.agreement(*both, method, how, shuffles=20) for both in pairs]
            assert max(kept) < 0.2
            if method != "neuron":
                assert min(kept) > -0.2
                assert abs(np.mean(kept)) < 0.1
    for of in rounds:
        assert benchmark.agreement(of, benchmark.sizes(of), "neuron", "alike", shuffles=20) < -0.5
