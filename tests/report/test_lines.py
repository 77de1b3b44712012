"""The artifact's log lines, word for word."""

import re
from itertools import pairwise

import pandas as pd
import pytest

from tracefl.report.lines import provenance_lines


@pytest.fixture
def provenance() -> pd.DataFrame:
    answers = [("19", 0.1, 0.012, 2, 0), ("1", 4.0, 0.978, 1, 5), ("9", 0.0, 0.01, 3, 0)]
    rows = [(3, "neuron", 17, client, 8, 8, *rest) for client, *rest in answers]
    columns = "round method input client label predicted contribution score rank label_examples"
    return pd.DataFrame(rows, columns=columns.split())


ROUNDS = pd.DataFrame(
    [
        {
            "round": 3, "loss": 3.244, "accuracy": 0.18, "num_inputs": 6, "localization_accuracy": 1.0,
            "chance_accuracy": 1 / 3, "largest_client_accuracy": 0.5, "top_holder_accuracy": 1.0,
            "top_holder_chance": 1 / 3, "spearman": 0.9,
        }
    ]
)  # fmt: skip


def test_lines_word_for_word(provenance):
    lines = list(provenance_lines(ROUNDS, provenance, faulty=set()))
    for expected in (
        "*********** Input Label: 8, Responsible Client(s): c1  *************",
        "Traced Client: c1 || Tracing = Correct",
        "TraceFL Clients Contributions Rank:     {'c1': 0.98, 'c19': 0.01, 'c9': 0.01}",
        "[Round 3] TraceFL Localization Accuracy = 100.0 || Total Inputs Used In Prov: 6 || GM_(loss, acc) (3.24,0.18)",
        "Total Rounds: 1",
        "TraceFL Average Localization Accuracy: 100.0",
    ):
        assert expected in lines


def test_every_accuracy_is_followed_by_its_chance(provenance):
    lines = list(provenance_lines(ROUNDS, provenance, faulty=set()))
    for line, following in pairwise(lines):
        if re.search(r"Localization Accuracy( =|:)", line):
            assert "Chance = 33.3" in following
            assert "Top Holder = 100.0 (chance 33.3)" in following
    assert "Chance" in lines[-1]


def test_a_wrong_answer_and_a_faulty_client(provenance):
    assert "Traced Client: c1 || Tracing = Wrong" in provenance_lines(ROUNDS, provenance, faulty={"9"})
    assert "Traced Client: c1 || Tracing = Correct" in provenance_lines(ROUNDS, provenance, faulty={"1", "9"})


def test_a_round_without_inputs_says_so(provenance):
    empty = ROUNDS.assign(num_inputs=0, **{c: float("nan") for c in ROUNDS.columns if "accuracy_" in c})
    lines = list(provenance_lines(empty, provenance.iloc[:0], faulty=set()))
    assert any("found no input to trace" in line for line in lines)
    assert "Average over the 0 of 1 rounds" in lines[-1]


FAULTY = {
    "faulty_precision": 0.5, "faulty_precision_chance": 0.2, "faulty_recall": 0.5, "faulty_recall_chance": 0.2,
    "rank_of_c1": 1.25, "rank_of_c9": float("nan"), "faulty_rank_chance": 5.5, "feddebug_accuracy": 0.3,
    "feddebug_chance": 0.2,
}  # fmt: skip


def test_faulty_clients_are_ranked_and_compared_with_feddebug(provenance):
    lines = list(provenance_lines(ROUNDS.assign(**FAULTY), provenance, faulty={"1", "9"}))
    ranked = "Faulty Clients: Rank = {'c1': 1.2} (chance 5.5)"
    several = f"{ranked}, Precision = 50.0 (chance 20.0), Recall = 50.0 (chance 20.0)"
    assert f"[Round 3] {several}" in lines
    assert "[Round 3] FedDebug: Localization = 30.0 (chance 20.0)" in lines
    assert f"Average over the 1 of 1 rounds with inputs to trace: {several}" in lines
    assert lines[-1] == "Average over 1 rounds: FedDebug: Localization = 30.0 (chance 20.0)"
    assert f"[Round 3] {ranked}" in provenance_lines(ROUNDS.assign(**FAULTY), provenance, faulty={"1"})
