"""Metrics by hand, and chance levels against simulated chance."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from tracefl.evaluation.localization import localize, name_faulty
from tracefl.judged import spearman

COUNTS = np.array([[10, 0, 30], [0, 20, 20], [5, 5, 5]])
SIZES = np.array([40, 90, 60])


def judged(contributions):
    return localize(np.asarray(contributions, dtype=float), COUNTS, COUNTS > 0, SIZES)


def test_metrics_by_hand():
    found = judged([[3, 2, 1], [9, 1, 2], [0, 1, 0]])
    assert found["num_inputs"].value == 3
    assert found["localization"].value == pytest.approx(
        2 / 3
    )  # client 0 holds 10; client 0 holds none; client 1 holds 5
    assert found["localization"].chance == pytest.approx((2 + 2 + 3) / 9)
    assert found["largest_client"].value == pytest.approx(2 / 3)  # client 1 holds none, 20, 5
    assert found["top_holder"].value == pytest.approx(1 / 3)  # ties count: only the third
    assert found["top_holder"].chance == pytest.approx((1 + 2 + 3) / 9)
    assert found["spearman"].value == pytest.approx(
        (-0.5 - 1.0 * np.sqrt(3) / 2) / 2
    )  # the third's counts are constant


def test_a_perfect_ranking_scores_one():
    found = judged(COUNTS + 0.0)
    assert (found["localization"].value, found["top_holder"].value) == (1.0, 1.0)
    assert found["spearman"].value == pytest.approx(1.0)


def test_chance_levels_are_what_random_rankings_get():
    rng = np.random.default_rng(0)
    runs = [judged(rng.random((3, 3))) for _ in range(4000)]
    assert np.mean([r["localization"].value for r in runs]) == pytest.approx(runs[0]["localization"].chance, abs=0.02)
    assert np.mean([r["top_holder"].value for r in runs]) == pytest.approx(runs[0]["top_holder"].chance, abs=0.02)
    assert np.mean([r["spearman"].value for r in runs]) == pytest.approx(0, abs=0.03)


def test_faulty_clients_are_the_only_culprits():
    culprits = np.tile([False, True, False], (2, 1))
    found = localize(np.array([[0.0, 2, 1], [5, 1, 1]]), COUNTS[:2], culprits, SIZES)
    assert (found["localization"].value, found["localization"].chance, found["largest_client"].value) == (
        0.5,
        pytest.approx(1 / 3),
        1.0,
    )


def test_no_input_gives_no_number():
    found = localize(np.empty((0, 3)), np.empty((0, 3)), np.empty((0, 3), bool), SIZES)
    assert found["num_inputs"].value == 0
    assert np.isnan(
        [found["localization"].value, found["localization"].chance, found["top_holder"].value, found["spearman"].value]
    ).all()


def test_one_input_is_enough():
    found = localize(np.array([[0.0, 1.0]]), np.array([[0, 4]]), np.array([[False, True]]), np.array([4, 4]))
    assert (found["localization"].value, found["localization"].chance) == (1.0, 0.5)


def test_of_equally_large_clients_any_may_be_named():
    culprits = np.array([[True, False, False]])
    found = localize(np.array([[0.0, 1.0, 2.0]]), COUNTS[:1], culprits, np.array([50, 50, 40]))
    assert found["largest_client"].value == 0.5


def test_naming_faulty_clients_by_hand():
    ranks = np.array([[1, 2, 3, 4, 5], [4, 3, 1, 5, 2]])
    found = name_faulty(ranks, ["0", "1", "2", "3", "4"], faulty={"0", "4", "9"})  # 9 takes no part
    assert found["faulty_precision"] == pytest.approx(((1 + 1) / 2 / 3, 2 / 5))
    assert found["faulty_recall"] == pytest.approx(((1 + 1) / 2 / 2, 3 / 5))
    assert [found[f"rank_of_c{client}"].value for client in (0, 4)] == [2.5, 3.5]
    assert np.isnan(found["rank_of_c9"].value)
    assert {found[f"rank_of_c{client}"].chance for client in (0, 4, 9)} == {3}


def test_chance_of_naming_faulty_clients_is_what_random_rankings_get():
    rng = np.random.default_rng(0)
    clients = [str(k) for k in range(6)]
    for count in (2, 4, 9):
        faulty = {"0", "1", *(str(absent) for absent in range(6, 4 + count))}
        found = name_faulty(np.argsort(rng.random((20_000, 6)), axis=1) + 1, clients, faulty)
        assert found["faulty_precision"].value == pytest.approx(found["faulty_precision"].chance, abs=0.01)
        assert found["faulty_recall"].value == pytest.approx(found["faulty_recall"].chance, abs=0.01)
        for client in (0, 1):
            assert found[f"rank_of_c{client}"].value == pytest.approx(found[f"rank_of_c{client}"].chance, abs=0.05)


@pytest.mark.parametrize(("inputs", "faulty"), [(0, "0"), (3, "7")])
def test_naming_without_inputs_or_faulty_participants_gives_no_number(inputs, faulty):
    found = name_faulty(np.ones((inputs, 2), int), ["0", "1"], {faulty})
    assert found.keys() == {"faulty_precision", "faulty_recall", f"rank_of_c{faulty}"}
    assert np.isnan(list(found.values())).all()


def test_spearman_is_scipys_to_the_last_bit():
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 5, (40, 9)), rng.normal(size=(40, 9))
    assert spearman(a, b).tolist() == [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert np.isnan(spearman(np.ones((1, 4)), b[:1, :4])).all()


def test_where_all_shares_are_the_same_nobody_is_named():
    counts, culprits, sizes = np.array([[5, 1], [1, 5]]), np.array([[True, False]] * 2), np.array([6, 6])
    nobody = localize(np.zeros((2, 2)), counts, culprits, sizes)
    assert nobody["num_inputs"].value == 2
    assert np.isnan(nobody["localization"].value)
    half = localize(np.array([[0.0, 0.0], [2.0, 1.0]]), counts, culprits, sizes)
    assert (half["num_inputs"].value, half["localization"].value, half["top_holder"].value) == (2, 1.0, 0.0)
    assert localize(np.zeros((1, 1)), counts[:1, :1], culprits[:1, :1], sizes[:1])["localization"].value == 1.0
