"""Metrics by hand, and chance levels against simulated chance."""

import numpy as np
import pytest

from tracefl.evaluation.localization import localize, name_faulty

COUNTS = np.array([[10, 0, 30], [0, 20, 20], [5, 5, 5]])
SIZES = np.array([40, 90, 60])


def judged(contributions):
    return localize(np.asarray(contributions, dtype=float), COUNTS, COUNTS > 0, SIZES)


def test_metrics_by_hand():
    found = judged([[3, 2, 1], [9, 1, 2], [0, 1, 0]])
    assert found.num_inputs == 3
    assert found.accuracy == pytest.approx(2 / 3)  # client 0 holds 10; client 0 holds none; client 1 holds 5
    assert found.chance == pytest.approx((2 + 2 + 3) / 9)
    assert found.largest_client == pytest.approx(2 / 3)  # client 1 holds none, 20, 5
    assert found.top_holder == pytest.approx(1 / 3)  # ties count: only the third
    assert found.top_holder_chance == pytest.approx((1 + 2 + 3) / 9)
    assert found.spearman == pytest.approx((-0.5 - 1.0 * np.sqrt(3) / 2) / 2)  # the third's counts are constant


def test_a_perfect_ranking_scores_one():
    found = judged(COUNTS + 0.0)
    assert (found.accuracy, found.top_holder) == (1.0, 1.0)
    assert found.spearman == pytest.approx(1.0)


def test_chance_levels_are_what_random_rankings_get():
    rng = np.random.default_rng(0)
    runs = [judged(rng.random((3, 3))) for _ in range(4000)]
    assert np.mean([r.accuracy for r in runs]) == pytest.approx(runs[0].chance, abs=0.02)
    assert np.mean([r.top_holder for r in runs]) == pytest.approx(runs[0].top_holder_chance, abs=0.02)
    assert np.mean([r.spearman for r in runs]) == pytest.approx(0, abs=0.03)


def test_faulty_clients_are_the_only_culprits():
    culprits = np.tile([False, True, False], (2, 1))
    found = localize(np.array([[0.0, 2, 1], [5, 1, 1]]), COUNTS[:2], culprits, SIZES)
    assert (found.accuracy, found.chance, found.largest_client) == (0.5, pytest.approx(1 / 3), 1.0)


def test_no_input_gives_no_number():
    found = localize(np.empty((0, 3)), np.empty((0, 3)), np.empty((0, 3), bool), SIZES)
    assert found.num_inputs == 0
    assert np.isnan([found.accuracy, found.chance, found.top_holder, found.spearman]).all()


def test_one_input_is_enough():
    found = localize(np.array([[0.0, 1.0]]), np.array([[0, 4]]), np.array([[False, True]]), np.array([4, 4]))
    assert (found.accuracy, found.chance) == (1.0, 0.5)


def test_of_equally_large_clients_any_may_be_named():
    culprits = np.array([[True, False, False]])
    found = localize(np.array([[0.0, 1.0, 2.0]]), COUNTS[:1], culprits, np.array([50, 50, 40]))
    assert found.largest_client == 0.5


def test_naming_faulty_clients_by_hand():
    ranks = np.array([[1, 2, 3, 4, 5], [4, 3, 1, 5, 2]])
    found = name_faulty(ranks, np.array([True, False, False, False, True]), count=3)  # a third one takes no part
    assert found.precision == pytest.approx((1 + 1) / 2 / 3)
    assert found.recall == pytest.approx((1 + 1) / 2 / 2)
    assert found.ranks.tolist() == [2.5, 3.5]
    assert (found.precision_chance, found.recall_chance, found.rank_chance) == (2 / 5, 3 / 5, 3)


def test_chance_of_naming_faulty_clients_is_what_random_rankings_get():
    rng = np.random.default_rng(0)
    faulty = np.array([True, True, False, False, False, False])
    for count in (2, 4, 9):
        found = name_faulty(np.argsort(rng.random((20_000, 6)), axis=1) + 1, faulty, count)
        assert found.precision == pytest.approx(found.precision_chance, abs=0.01)
        assert found.recall == pytest.approx(found.recall_chance, abs=0.01)
        assert found.ranks == pytest.approx(found.rank_chance, abs=0.05)


def test_naming_without_inputs_gives_no_number():
    found = name_faulty(np.empty((0, 2), int), np.array([True, False]), 1)
    assert np.isnan([found.precision, found.recall, *found.ranks]).all()
    assert np.isnan([found.precision_chance, found.recall_chance, found.rank_chance]).all()


def test_where_all_shares_are_the_same_nobody_is_named():
    counts, culprits, sizes = np.array([[5, 1], [1, 5]]), np.array([[True, False]] * 2), np.array([6, 6])
    nobody = localize(np.zeros((2, 2)), counts, culprits, sizes)
    assert nobody.num_inputs == 2
    assert np.isnan(nobody.accuracy)
    half = localize(np.array([[0.0, 0.0], [2.0, 1.0]]), counts, culprits, sizes)
    assert (half.num_inputs, half.accuracy, half.top_holder) == (2, 1.0, 0.0)
    assert localize(np.zeros((1, 1)), counts[:1, :1], culprits[:1, :1], sizes[:1]).accuracy == 1.0
