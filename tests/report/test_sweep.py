"""Several recorded runs as one table."""

import pytest

from tests.report.recorded import record
from tracefl.errors import TraceFLError
from tracefl.report.sweep import find, read_runs, varying


def test_a_row_holds_settings_the_last_accuracy_and_means_over_rounds(tmp_path):
    (row,) = read_runs([record(tmp_path / "a", alpha=0.4, num_rounds=3)]).to_dict("records")
    assert (row["dataset"], row["model"], row["dirichlet_alpha"], row["faulty_clients"]) == (
        "digits",
        "resnet18",
        0.4,
        0,
    )
    assert row["accuracy"] == pytest.approx(0.7)
    assert row["localization_accuracy"] == pytest.approx(0.7)
    assert row["num_inputs"] == 2


def test_settings_that_vary_are_found(tmp_path):
    table = read_runs([record(tmp_path / str(alpha), alpha) for alpha in (0.1, 0.3)])
    assert varying(table) == ["dirichlet_alpha"]
    assert varying(table[:1]) == []


def test_folders_are_found_by_what_they_hold(tmp_path):
    record(tmp_path / "run-1")
    (tmp_path / "run-2").mkdir()
    assert find("runs", f"{tmp_path}/run-*", "rounds.csv") == [tmp_path / "run-1"]
    with pytest.raises(TraceFLError, match=r"runs must match folders with a rounds\.csv, got runs=nowhere/\*"):
        find("runs", "nowhere/*", "rounds.csv")
