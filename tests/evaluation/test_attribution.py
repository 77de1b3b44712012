"""Which inputs are traced, and the table that comes out, on a recorded run of two hand-made clients."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from tracefl.data.examples import Examples
from tracefl.errors import TraceFLError
from tracefl.evaluation.attribution import (
    COLUMNS,
    Settings,
    evaluate_rounds,
    select_correct,
    select_flipped,
    trace_round,
)
from tracefl.models import exchanged_state
from tracefl.runs import ClientInfo, Participant, Run, client_file

LABELS = torch.tensor([0] * 8 + [1] * 8 + [2] * 2)


def test_correct_predictions_are_balanced_over_the_labels_that_participants_hold():
    predictions = LABELS.clone()
    predictions[:3] = 1  # three mistakes on label 0
    rows = select_correct(predictions, LABELS, {0, 1}, per_label=2, seed=[0, 1])
    assert (predictions[rows] == LABELS[rows]).all()
    assert np.bincount(LABELS[rows]).tolist() == [5, 5]  # at least ten in all
    assert len(set(rows.tolist())) == len(rows)
    assert np.bincount(LABELS[select_correct(LABELS, LABELS, {0, 1, 2}, 6, [0, 1])]).tolist() == [6, 6, 2]


def test_the_choice_depends_on_the_seed_alone():
    first, again, other = (select_correct(LABELS, LABELS, {0, 1}, 2, [0, t]) for t in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_nothing_correct_selects_nothing():
    assert len(select_correct((LABELS + 1) % 3, LABELS, {0, 1, 2}, 2, [0, 1])) == 0


def test_flipped_predictions_go_from_a_flipped_label_to_its_target():
    predictions = torch.tensor([2] * 8 + [2] * 4 + [1] * 4 + [2] * 2)
    rows = select_flipped(predictions, LABELS, {0: 2, 1: 2, 2: 2}, limit=9, seed=[0, 1])
    assert len(rows) == 9
    assert set(LABELS[rows].tolist()) <= {0, 1}
    assert (predictions[rows] == 2).all()


@pytest.fixture
def recorded(tmp_path):
    """Client 0 pushes every logit of class 0 up, client 1 that of class 1."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    states = []
    for client in (0, 1):
        weight = torch.zeros(2, 4)
        weight[client, 2 * client : 2 * client + 2] = 1.0
        states.append({"1.weight": weight, "1.bias": torch.zeros(2)})
    released = {name: (states[0][name] + states[1][name]) / 2 for name in states[0]}
    labels = torch.arange(12) % 2
    inputs = torch.zeros(12, 1, 2, 2)
    inputs[labels == 0, :, 0] = 1.0
    inputs[labels == 1, :, 1] = 1.0
    run = Run.create(
        tmp_path, initial=exchanged_state(model), clients=[ClientInfo("0", {0: 30}), ClientInfo("1", {1: 10})], seed=0
    )
    participants = [
        Participant(str(k), n, n / 40, client_file(str(k)), run.record_client(1, str(k), states[k]))
        for k, n in ((0, 30), (1, 10))
    ]
    run.record_round(1, participants, released, labels, 0.1, 1.0, {})
    return run, model, Examples(inputs, labels)


def settings(**changes):
    base = {"methods": ["neuron", "influence"], "inputs_per_label": 2, "max_mispredictions": 10, "layer_decay": 0.9}
    return Settings(**{**base, "weighted": False, "label2flip": {}, "faulty": [], **changes})


def test_the_table_names_the_client_that_caused_each_prediction(recorded):
    table = trace_round(recorded[0], 1, recorded[1], recorded[2], settings())
    assert list(table.columns) == COLUMNS
    assert len(table) == 2 * 10 * 2  # methods, inputs, clients
    first = table[table["rank"] == 1]
    assert (first["client"].astype(int) == first["label"]).all()
    assert table["label_examples"].isin([0, 10, 30]).all()
    neuron = table[table["method"] == "neuron"]
    assert set(zip(neuron["client"], neuron["label"], neuron["contribution"], strict=True)) == {
        ("0", 0, 2.0), ("1", 0, 0.0), ("0", 1, 0.0), ("1", 1, 2.0),
    }  # fmt: skip
    assert neuron.groupby("input")["score"].sum().to_numpy() == pytest.approx(1.0)


def test_shares_times_p(recorded):
    table = trace_round(*recorded[:1], 1, *recorded[1:], settings(methods=["neuron"], weighted=True))
    assert set(table.loc[table["rank"] == 1, "contribution"]) == {1.5, 0.5}


def test_rounds_are_judged_beside_their_chance(recorded):
    run = recorded[0]
    table = trace_round(run, 1, recorded[1], recorded[2], settings())
    row = evaluate_rounds(run, table, ["neuron", "influence"], faulty=set()).iloc[0]
    assert row["num_inputs"] == 10
    assert (row["localization_accuracy"], row["localization_accuracy_influence"]) == (1.0, 1.0)
    assert row["chance_accuracy"] == row["largest_client_accuracy"] == row["top_holder_chance"] == 0.5
    blamed = evaluate_rounds(run, table, ["neuron"], faulty={"1"}).iloc[0]
    assert (blamed["localization_accuracy"], blamed["chance_accuracy"]) == (0.5, 0.5)


def test_a_round_without_inputs_keeps_its_row(recorded):
    run, model, examples = recorded
    table = trace_round(run, 1, model, examples, settings(label2flip={0: 1}, faulty=["1"]))
    assert table.empty
    rounds = evaluate_rounds(run, pd.DataFrame(columns=COLUMNS), ["neuron"], {"1"})
    assert rounds.loc[0, "num_inputs"] == 0
    assert np.isnan(rounds.loc[0, "localization_accuracy"])
    assert rounds.loc[0, "accuracy"] == 1.0


def test_a_round_without_a_faulty_participant_has_nothing_to_trace(recorded):
    run, model, examples = recorded
    wrong = Examples(examples.inputs, 1 - examples.labels)
    assert trace_round(run, 1, model, wrong, settings(label2flip={0: 1}, faulty=["5"])).empty
    assert len(trace_round(run, 1, model, wrong, settings(label2flip={0: 1}, faulty=["1"]))) == 2 * 6 * 2


def test_a_damaged_client_is_named_with_its_round(recorded):
    run, model, examples = recorded
    (run.path / "rounds/0001/clients/1.safetensors").write_bytes(b"broken")
    with pytest.raises(TraceFLError, match=r"round 1 cannot be traced: .*1\.safetensors is not the file"):
        trace_round(run, 1, model, examples, settings())
