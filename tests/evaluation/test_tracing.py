"""The table that comes out of tracing a recorded run of two hand-made clients."""

import numpy as np
import pandas as pd
import pytest
import torch

from tracefl import trace
from tracefl.data.examples import Examples
from tracefl.errors import TraceFLError
from tracefl.evaluation.selection import with_trigger
from tracefl.evaluation.stopwatch import Stopwatch
from tracefl.evaluation.tracing import COLUMNS, LAYER_COLUMNS, trace_round
from tracefl.federation.noise import gaussian_noise
from tracefl.training import Evaluation

FLIP = ("faulty_clients_ids=[1]", "label2flip={0:1}")


def test_the_table_names_the_client_that_caused_each_prediction(recorded, config):
    run, model, examples = recorded
    table = trace_round(config(), run, model, examples, 1)
    assert list(table.columns) == COLUMNS
    assert len(table) == 2 * 10 * 2  # methods, inputs, clients
    assert (table[["contribution", "score", "server", "noise"]].dtypes == "float64").all()
    first = table[table["rank"] == 1]
    assert (first["client"].astype(int) == first["label"]).all()
    assert table["label_examples"].isin([0, 10, 30]).all()
    neuron = table[table["method"] == "neuron"]
    assert set(zip(neuron["client"], neuron["label"], neuron["contribution"], strict=True)) == {
        ("0", 0, 2.0), ("1", 0, 0.0), ("0", 1, 0.0), ("1", 1, 2.0),
    }  # fmt: skip
    assert neuron.groupby("input")["score"].sum().to_numpy() == pytest.approx(1.0)


def test_the_layers_of_the_first_client_add_up_to_its_contribution(recorded, config):
    run, model, examples = recorded
    layers = []
    table = trace_round(config(), run, model, examples, 1, layers=layers)
    through = pd.concat(layers)
    assert list(through.columns) == LAYER_COLUMNS
    assert set(through["layer"]) == {"2"}
    keys = ["round", "method", "input", "client"]
    sums = through.groupby(keys)["contribution"].sum()
    first = table[table["rank"] == 1].set_index(keys)["contribution"]
    assert sums.to_dict() == pytest.approx(first.to_dict())


def test_shares_times_p(recorded, config):
    run, model, examples = recorded
    table = trace_round(
        config("provenance.methods=[neuron]", "client_weights_normalization=true"), run, model, examples, 1
    )
    assert set(table.loc[table["rank"] == 1, "contribution"]) == {1.5, 0.5}


def test_a_round_without_mispredictions_has_nothing_to_trace(recorded, config):
    run, model, examples = recorded
    table = trace_round(config(*FLIP), run, model, examples, 1)
    assert table.empty
    assert list(table.columns) == COLUMNS


def test_a_round_without_a_faulty_participant_has_nothing_to_trace(recorded, config):
    run, model, examples = recorded
    wrong = Examples(examples.inputs, 1 - examples.labels)
    assert trace_round(config("faulty_clients_ids=[5]", "label2flip={0:1}"), run, model, wrong, 1).empty
    assert len(trace_round(config(*FLIP), run, model, wrong, 1)) == 2 * 6 * 2


def test_a_damaged_client_is_named_with_its_round(recorded, config):
    run, model, examples = recorded
    (run.path / "rounds/0001/clients/1.safetensors").write_bytes(b"broken")
    with pytest.raises(TraceFLError, match=r"round 1 cannot be traced: .*1\.safetensors is not the file"):
        trace_round(config(), run, model, examples, 1)


@pytest.mark.parametrize("fault", ["random_labels", "free_rider", "sign_flip"])
def test_any_misprediction_is_traced_to_such_faults(recorded, config, fault):
    run, model, examples = recorded
    wrong = Examples(examples.inputs, torch.where(torch.arange(12) < 4, 1 - examples.labels, examples.labels))
    table = trace_round(config("faulty_clients_ids=[1]", f"fault.kind={fault}"), run, model, wrong, 1)
    assert set(table["input"]) == {0, 1, 2, 3}
    assert (table["label"] != table["predicted"]).all()


def test_a_backdoor_is_traced_on_inputs_with_the_trigger(recorded, config):
    run, model, examples = recorded  # of 2 x 2 pixels, which the trigger covers: both logits become equal
    examples = Examples(examples.inputs.expand(-1, 3, -1, -1), examples.labels)
    backdoor = ("faulty_clients_ids=[1]", "fault.kind=backdoor")
    table = trace_round(config(*backdoor, "fault.target=0"), run, model, examples, 1)
    assert set(table["label"]) == {1}
    assert set(table["predicted"]) == {0}
    assert set(table["input"]) == {1, 3, 5, 7, 9, 11}
    white = with_trigger(examples).inputs[0, 0, 0, 0].item()
    neuron = table[(table["method"] == "neuron") & (table["client"] == "0")]
    assert neuron["contribution"].to_numpy() == pytest.approx(2 * white)
    assert trace_round(config(*backdoor, "fault.target=1"), run, model, examples, 1).empty


def test_coalitions_are_traced_beside_the_methods(recorded, config):
    run, model, examples = recorded
    words = ("evaluation.coalitions=true", "evaluation.coalition_inputs=3", "provenance.methods=[neuron]")
    table = trace_round(config(*words), run, model, examples, 1)
    assert list(table.columns) == [*COLUMNS, "standard_error"]
    plain, shapley = table[table["method"] == "neuron"], table[table["method"] == "shapley"]
    assert len(shapley) == 3 * 2
    assert list(shapley["input"].unique()) == [plain["input"].unique()[i] for i in (0, 4, 9)]
    assert shapley["standard_error"].eq(0).all()  # two clients: all coalitions
    assert plain["standard_error"].isna().all()
    expected = trace(
        model, run.client_states(1), examples.inputs[shapley["input"].unique()],
        weights={"0": 30, "1": 10}, reference=run.global_state(0), method="shapley",
    )  # fmt: skip
    np.testing.assert_allclose(shapley["contribution"], expected.contributions.flatten())
    before = trace_round(config("provenance.methods=[neuron]"), run, model, examples, 1)
    pd.testing.assert_frame_equal(plain[COLUMNS], before)


def test_every_method_is_timed(recorded, config):
    run, model, examples = recorded
    watch = Stopwatch()
    trace_round(config(), run, model, examples, 1, watch)
    assert [(row["method"], row["localizations"]) for row in watch.rows()] == [("neuron", 10), ("influence", 10)]
    assert all(row["seconds"] > 0 for row in watch.rows())


def test_the_noise_of_differential_privacy_is_found_again(recorded, config):
    run, model, examples = recorded
    states = [run.round(1).client_state(str(k)) for k in (0, 1)]
    mean = {name: 0.75 * states[0][name] + 0.25 * states[1][name] for name in states[0]}
    noisy = {name: value + gaussian_noise(name, value, 0.4 / 2, run["seed"], 2) for name, value in mean.items()}
    clients = [run.record_client(2, str(k), states[k], n, n / 40) for k, n in ((0, 30), (1, 10))]
    run.record_round(2, clients, noisy, Evaluation(0.1, 1.0, examples.labels), {})
    influence = "provenance.methods=[influence]"
    table = trace_round(config(influence, "noise_multiplier=0.1", "clipping_norm=4"), run, model, examples, 2)
    assert (table["noise"].abs() > 1e-3).all()
    np.testing.assert_allclose(table["server"], table["noise"], rtol=1e-5)
    quiet = trace_round(config(influence), run, model, examples, 2)
    assert (quiet["noise"] == 0).all()
    assert (quiet["server"] == table["server"]).all()
