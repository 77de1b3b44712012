"""The table that comes out of tracing a recorded run of two hand-made clients."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from tracefl.evaluation.attribution import COLUMNS, Settings, evaluate_rounds, trace_round

from tracefl.data.examples import Examples
from tracefl.errors import TraceFLError
from tracefl.evaluation.selection import with_trigger
from tracefl.evaluation.stopwatch import Stopwatch
from tracefl.federation.noise import gaussian_noise
from tracefl.models import exchanged_state
from tracefl.runs import ClientInfo, Participant, Run, client_file


class OneChannel(nn.Module):
    def forward(self, x):
        return x[:, :1]


@pytest.fixture
def recorded(tmp_path):
    """Client 0 pushes every logit of class 0 up, client 1 that of class 1."""
    model = nn.Sequential(OneChannel(), nn.Flatten(), nn.Linear(4, 2))
    states = []
    for client in (0, 1):
        weight = torch.zeros(2, 4)
        weight[client, 2 * client : 2 * client + 2] = 1.0
        states.append({"2.weight": weight, "2.bias": torch.zeros(2)})
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


@pytest.mark.parametrize("fault", ["random_labels", "free_rider", "sign_flip"])
def test_any_misprediction_is_traced_to_such_faults(recorded, fault):
    run, model, examples = recorded
    wrong = Examples(examples.inputs, torch.where(torch.arange(12) < 4, 1 - examples.labels, examples.labels))
    table = trace_round(run, 1, model, wrong, settings(faulty=["1"], fault=fault))
    assert set(table["input"]) == {0, 1, 2, 3}
    assert (table["label"] != table["predicted"]).all()


def test_a_backdoor_is_traced_on_inputs_with_the_trigger(recorded):
    run, model, examples = recorded  # of 2 x 2 pixels, which the trigger covers: both logits become equal
    examples = Examples(examples.inputs.expand(-1, 3, -1, -1), examples.labels)
    table = trace_round(run, 1, model, examples, settings(faulty=["1"], fault="backdoor", target=0))
    assert set(table["label"]) == {1}
    assert set(table["predicted"]) == {0}
    assert set(table["input"]) == {1, 3, 5, 7, 9, 11}
    white = with_trigger(examples).inputs[0, 0, 0, 0].item()
    neuron = table[(table["method"] == "neuron") & (table["client"] == "0")]
    assert neuron["contribution"].to_numpy() == pytest.approx(2 * white)
    assert trace_round(run, 1, model, examples, settings(faulty=["1"], fault="backdoor", target=1)).empty


def test_faulty_clients_are_ranked_beside_their_chance(recorded):
    run, model, examples = recorded
    table = trace_round(run, 1, model, examples, settings())
    row = evaluate_rounds(run, table, ["neuron", "influence"], faulty={"1", "7"}).iloc[0]
    assert row["rank_of_c1"] == row["rank_of_c1_influence"] == row["faulty_rank_chance"] == 1.5
    assert np.isnan(row["rank_of_c7"])  # took no part
    assert (row["faulty_precision"], row["faulty_precision_chance"]) == (0.5, 0.5)  # both are named, one is faulty
    assert row["faulty_recall"] == row["faulty_recall_chance"] == 1.0
    absent = evaluate_rounds(run, table.iloc[:0], ["neuron"], faulty={"7"}).iloc[0]
    assert np.isnan(absent[["faulty_precision", "faulty_recall_chance", "rank_of_c7"]].astype(float)).all()


def test_every_method_is_timed(recorded):
    run, model, examples = recorded
    watch = Stopwatch()
    trace_round(run, 1, model, examples, settings(), watch)
    table = watch.table()
    assert table[["method", "localizations"]].to_numpy().tolist() == [["neuron", 10], ["influence", 10]]
    assert (table["seconds_per_localization"] * 10 == table["seconds"]).all()


def test_the_ledger_finds_the_noise_of_differential_privacy_again(recorded):
    run, model, examples = recorded
    states = [run.round(1).client_state(str(k)) for k in (0, 1)]
    mean = {name: 0.75 * states[0][name] + 0.25 * states[1][name] for name in states[0]}
    noisy = {name: value + gaussian_noise(name, value, 0.4 / 2, run["seed"], 2) for name, value in mean.items()}
    run.record_client(2, "0", states[0])
    run.record_client(2, "1", states[1])
    run.record_round(2, run.round(1).clients, noisy, examples.labels, 0.1, 1.0, {})
    table = trace_round(run, 2, model, examples, settings(methods=["influence"], noise=0.4))
    assert (table["noise"].abs() > 1e-3).all()
    np.testing.assert_allclose(table["server"], table["noise"], rtol=1e-5)
    row = evaluate_rounds(run, table.assign(round=2), ["influence"], faulty=set()).iloc[1]
    assert 0 < row["noise_share"] == pytest.approx(row["server_share"], rel=1e-5)
    quiet = trace_round(run, 2, model, examples, settings(methods=["influence"]))
    assert (quiet["noise"] == 0).all()
    assert (quiet["server"] == table["server"]).all()
