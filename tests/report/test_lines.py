"""The artifact's log lines, word for word."""

import re
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from tests.report.metrics import NAN, table, tidy
from tracefl.data.prepared import PreparedData
from tracefl.report.lines import data_lines, exclusion_lines, provenance_lines


@pytest.fixture
def provenance() -> pd.DataFrame:
    answers = [("19", 0.1, 0.012, 2, 0), ("1", 4.0, 0.978, 1, 5), ("9", 0.0, 0.01, 3, 0)]
    rows = [(3, "neuron", 17, client, 8, 8, *rest) for client, *rest in answers]
    columns = "round method input client label predicted contribution score rank label_examples"
    return pd.DataFrame(rows, columns=columns.split())


MODEL = {"loss": 3.244, "accuracy": 0.18}
NEURON = {
    "num_inputs": 6, "localization": (1.0, 1 / 3), "largest_client": (0.5, 1 / 3), "top_holder": (1.0, 1 / 3),
    "spearman": (0.9, 0),
}  # fmt: skip
METRICS = table(tidy(3, model=MODEL, neuron=NEURON))


def test_lines_word_for_word(provenance):
    lines = list(provenance_lines(METRICS, provenance, faulty=set()))
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
    lines = list(provenance_lines(METRICS, provenance, faulty=set()))
    for line, following in pairwise(lines):
        if re.search(r"Localization Accuracy( =|:)", line):
            assert "Chance = 33.3" in following
            assert "Top Holder = 100.0 (chance 33.3)" in following
    assert "Chance" in lines[-1]


def test_sets_and_shapley_values_have_their_lines(provenance):
    sets = {"coverage": (0.75, 0.4), "set_size": 1.5, "named_nobody": 0.125}
    beside = {"shapley_spearman": (0.625, 0), "shapley_first": (0.5, 0.1)}
    tidied = tidy(3, model=MODEL, neuron=NEURON | sets | beside, shapley={**sets, "set_size": NAN})
    lines = list(provenance_lines(table(tidied), provenance, faulty=set()))
    expected = (
        "Answers as Sets: Neuron: Coverage = 75.0 (chance 40.0), Size = 1.50, Nobody = 12.5"
        " || Shapley: Coverage = 75.0 (chance 40.0), Size = n/a, Nobody = 12.5",
        "Beside Shapley Values: Neuron: Spearman = 0.62 (chance 0), the same first = 50.0 (chance 10.0)",
    )
    accuracy = next(i for i, line in enumerate(lines) if "TraceFL Localization Accuracy" in line)
    assert lines[accuracy + 2 : accuracy + 4] == [f"[Round 3] {line}" for line in expected]
    assert lines[-2:] == [f"Average over the 1 of 1 rounds with inputs to trace: {line}" for line in expected]


def test_a_wrong_answer_and_a_faulty_client(provenance):
    assert "Traced Client: c1 || Tracing = Wrong" in provenance_lines(METRICS, provenance, faulty={"9"})
    assert "Traced Client: c1 || Tracing = Correct" in provenance_lines(METRICS, provenance, faulty={"1", "9"})


def test_a_round_without_inputs_says_so(provenance):
    empty = table(tidy(3, model=MODEL, neuron=dict.fromkeys(NEURON, NAN) | {"num_inputs": 0}))
    lines = list(provenance_lines(empty, provenance.iloc[:0], faulty=set()))
    assert any("found no input to trace" in line for line in lines)
    assert "Average over the 0 of 1 rounds" in lines[-1]


FAULTY = table(
    tidy(
        3,
        model=MODEL,
        neuron=NEURON
        | {
            "faulty_precision": (0.5, 0.2), "faulty_recall": (0.5, 0.2), "rank_of_c1": (1.25, 5.5),
            "rank_of_c9": (NAN, 5.5),
        },
        FedDebug={"found": (0.3, 0.2)},
    )
)  # fmt: skip


def test_faulty_clients_are_ranked_and_compared_with_feddebug(provenance):
    lines = list(provenance_lines(FAULTY, provenance, faulty={"1", "9"}))
    ranked = "Faulty Clients: Rank = {'c1': 1.2} (chance 5.5)"
    several = f"{ranked}, Precision = 50.0 (chance 20.0), Recall = 50.0 (chance 20.0)"
    assert f"[Round 3] {several}" in lines
    assert "[Round 3] FedDebug: Localization = 30.0 (chance 20.0)" in lines
    assert f"Average over the 1 of 1 rounds with inputs to trace: {several}" in lines
    assert lines[-1] == "Average over 1 rounds: FedDebug: Localization = 30.0 (chance 20.0)"
    assert f"[Round 3] {ranked}" in provenance_lines(FAULTY, provenance, faulty={"1"})


def test_influence_and_the_servers_own_share_have_their_words(provenance):
    influence = {"localization": (0.75, 0.3), "top_holder": (0.5, 0.3), "spearman": (0.25, 0), "num_inputs": 6}
    influence |= {"server_share": 0.125, "noise_share": 0.1, "largest_client": 0.5}
    lines = list(provenance_lines(table(tidy(3, model=MODEL, neuron=NEURON, influence=influence)), provenance, set()))
    beside = " || Influence: Localization = 75.0, Top Holder = 50.0, Spearman = 0.25"
    assert sum(line.endswith(beside) for line in lines) == 2
    server = "[Round 3] Server's own share of the influence = 12.5%s (plain averaging: 0)"
    assert server % ", noise alone 10.0" in lines
    alone = table(tidy(3, model=MODEL, influence=influence | {"noise_share": 0.0}))
    lines = list(provenance_lines(alone, provenance.assign(method="influence"), set()))
    assert "TraceFL Average Localization Accuracy: 75.0" in lines
    assert server % "" in lines


def left_out(**counts: dict[int, int]) -> PreparedData:
    classes = ["cat", "dog", "emu", "fox"]
    return PreparedData(Path(), classes, {"0": {0: 50, 1: 20}, "1": {0: 10}}, "", left_out=counts)


def test_classes_and_examples_that_nobody_trains_on_are_named(config):
    data = left_out(dist_type={}, min_examples_per_class={1: 4, 2: 7}, max_per_client_data_size={0: 30, 2: 12})
    assert list(data_lines(config("data_dist.max_per_client_data_size=70"), data)) == [
        "No client trains on 1 of the training split's 3 classes: emu (19 examples)",
        "No client trains on 53 of the 133 training examples: 11 of classes of which their client has fewer than "
        "data_dist.min_examples_per_class=10, 42 above data_dist.max_per_client_data_size=70",
    ]
    nothing = {"dist_type": {}, "min_examples_per_class": {}, "max_per_client_data_size": {}}
    assert list(data_lines(config(), left_out(**nothing))) == []


def test_of_many_lost_classes_the_first_are_named(config):
    lost = {"dist_type": dict.fromkeys(range(1, 14), 2)}
    data = PreparedData(Path(), [f"c{k}" for k in range(30)], {"0": {0: 9}}, "", left_out=lost)
    first, second = data_lines(config(), data)
    shown = ", ".join(f"c{k} (2 examples)" for k in range(1, 11))
    assert first.endswith(f"13 of the training split's 14 classes: {shown}, and 3 more")
    assert second.endswith(" 35 training examples: 26 given to nobody by data_dist.dist_type=non_iid_dirichlet")


def test_who_never_trains_is_named_with_the_classes_that_nobody_else_has(config):
    counts = {"0": {0: 9, 1: 4}, "1": {1: 5, 2: 6}, "2": {2: 8}}
    data = PreparedData(Path(), ["ant", "bee", "cow"], counts, "")
    words = ("num_clients=3", "clients_per_round=1")
    assert list(exclusion_lines(config(*words), data)) == []
    for out, line in (
        ("[0]", "c0 never train, with 13 training examples; nobody else has class ant"),
        ("[2]", "c2 never train, with 8 training examples"),
        ("[1,2]", "c1, c2 never train, with 19 training examples; nobody else has class cow"),
    ):
        assert list(exclusion_lines(config(*words, f"exclude_clients={out}"), data)) == [f"exclude_clients: {line}"]
