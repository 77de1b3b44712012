"""The recorder in somebody else's app: nothing is lost, and no central data."""

import json

import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg

from tests.federation.own import INITIAL, OwnGrid, arrays, examples_of
from tests.federation.recording import THREE, mean_of, plain, record, same, shares, trace_round
from tests.federation.test_recorder import files
from tracefl import Run
from tracefl.errors import TraceFLError
from tracefl.federation.recorder import Recorder

# --- nothing is lost ------------------------------------------------------------------------------


def test_three_lines_record_an_app_as_it_runs_without_them(tmp_path):
    alone = plain().start(OwnGridAsFlowers(THREE), arrays(), num_rounds=2)
    result = record(tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert [client.id for client in run.clients] == ["a", "b", "c"]
    for name, value in alone.arrays.to_torch_state_dict().items():
        torch.testing.assert_close(result.arrays.to_torch_state_dict()[name], value)
    assert result.train_metrics_clientapp[2] == pytest.approx(alone.train_metrics_clientapp[2])
    total = sum(map(examples_of, "abc"))
    assert shares(run, 2) == {c: examples_of(c) / total for c in "abc"}
    torch.testing.assert_close(mean_of(run, 2), run.global_state(2)["w"])


class OwnGridAsFlowers(OwnGrid):
    """With the method that Flower's own grid has, for a strategy without a recorder."""

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(list(messages)))


def test_a_finished_run_started_again_returns_its_model_and_metrics_and_asks_nobody(tmp_path):
    calls = []

    def evaluate_fn(number, model):
        calls.append(number)
        return MetricRecord({"accuracy": 0.1 * number, "at": [1.0, float("nan")]})

    first = record(tmp_path, rounds=3, start={"evaluate_fn": evaluate_fn})
    kept, grid = files(tmp_path), OwnGrid(THREE)
    again = record(tmp_path, grid, rounds=3, start={"evaluate_fn": evaluate_fn})
    assert calls == [0, 1, 2, 3]
    assert not grid.trained_nodes()
    assert files(tmp_path) == kept
    assert same(again.arrays.to_torch_state_dict(), first.arrays.to_torch_state_dict())
    for kind in ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp"):
        assert str(getattr(again, kind)) == str(getattr(first, kind))
    assert list(again.evaluate_metrics_serverapp) == [0, 1, 2, 3]
    assert again.evaluate_metrics_serverapp[3]["accuracy"] == pytest.approx(0.3)
    assert record(tmp_path, OwnGrid({}), rounds=3).arrays.keys() == first.arrays.keys()  # no node is needed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"initial": arrays({**INITIAL, "b": torch.ones(3)})}, r"another model than the one given: 'b' differs"),
        ({"initial": arrays({"w": INITIAL["w"]})}, "another model .*'a' differs"),
        ({"grid": OwnGrid({1: "x", 2: "y"})}, "node 1 says that it is client 'x', which is none of the run's"),
        ({"clients": ["a", "b"]}, "client 'c' of the run is not given"),
        ({"clients": ["a", "b", "c", "d"]}, "client 'd' is none of the run's"),
        ({"settings": {"lr": 0.2}}, r"recorded with settings.lr=0.1, got 0.2"),
        ({"start": {"train_config": ConfigRecord({"epochs": 2})}}, "train_config.epochs=1, got 2"),
        ({"seed": 7}, "recorded with seed=0, got 7"),
        ({"clients_per_round": 2}, "recorded with clients_per_round=None, got 2"),
        ({"strategy": plain(weighted_by_key="n")}, "strategy.FedAvg.weighted_by_key='num-examples', got 'n'"),
        ({"strategy": FedAdam(fraction_evaluate=0.0)}, "recorded with strategy.FedAdam=None"),
    ],
)
def test_a_run_that_goes_on_with_something_else_is_refused_by_name(tmp_path, change, words):
    usual = {"settings": {"lr": 0.1}, "start": {"train_config": ConfigRecord({"epochs": 1})}}
    record(tmp_path, rounds=1, **usual)
    kept = files(tmp_path)
    with pytest.raises(TraceFLError, match=words):
        record(tmp_path, **usual | change)
    assert files(tmp_path) == kept
    record(tmp_path, **usual)
    assert len(Run.open(tmp_path).rounds) == 2


def test_a_recorder_holds_its_folder_until_it_is_done(tmp_path):
    grid = OwnGrid(THREE)
    one = Recorder(plain(), tmp_path, grid)
    with pytest.raises(TraceFLError, match="is being written by another process"):
        Recorder(plain(), tmp_path, grid)
    one.start(grid, arrays(), num_rounds=1, timeout=1)
    assert len(record(tmp_path, rounds=2).train_metrics_clientapp) == 2


# --- no central data ------------------------------------------------------------------------------


def test_a_run_without_predictions_is_recorded_and_traced(tmp_path):
    record(tmp_path)
    run = Run.open(tmp_path)
    assert (run.round(1).loss, run.round(1).accuracy) == (None, None)
    with pytest.raises(TraceFLError, match=r"round 1 of .* has no predictions: it was recorded without evaluate"):
        run.predictions(1)
    answer = trace_round(run, 2)
    assert answer.client_ids == ["a", "b", "c"]
    assert answer.contributions.abs().min() > 0


def test_the_header_stays_strict_json(tmp_path):
    def constant(name):
        raise AssertionError(f"{name} is no JSON")

    found = {"loss": float("nan"), "up": float("inf"), "down": [-float("inf"), 1.5], "count": 3}
    record(tmp_path, rounds=1, start={"evaluate_fn": lambda number, model: MetricRecord(found)})
    header = json.loads((tmp_path / "run.json").read_text(), parse_constant=constant)
    assert header["rounds"][0]["metrics"]["server"]["loss"] == "nan"
    again = Run.open(tmp_path).metrics(1)["server"]
    assert str(again) == str({name: found[name] for name in again})


def test_what_is_sampled_is_asked_and_waited_for_and_nobody_else(tmp_path):
    ten = {100 + k: str(k) for k in range(10)}
    grid = OwnGrid(ten)
    record(tmp_path, grid, rounds=3, strategy=plain(fraction_train=0.3))
    run = Run.open(tmp_path)
    assert len(run.clients) == 10
    for number in (1, 2, 3):
        asked = [ten[node] for node in grid.trained_nodes()[3 * number - 3 : 3 * number]]
        assert sorted(asked) == sorted(shares(run, number))
        assert not run.round(number).failures


def test_clients_evaluate_as_the_strategy_has_it_and_their_metrics_are_kept(tmp_path):
    first = record(tmp_path, strategy=FedAvg())
    assert list(first.evaluate_metrics_clientapp) == [1, 2]
    total = float(sum(value.sum() for value in Run.open(tmp_path).global_state(2).values()))
    assert first.evaluate_metrics_clientapp[2]["sum"] == pytest.approx(total)
    again = record(tmp_path, OwnGrid({}), strategy=FedAvg())
    assert again.evaluate_metrics_clientapp == first.evaluate_metrics_clientapp


def test_a_run_that_goes_on_evaluates_under_the_true_round_numbers(tmp_path):
    calls = []

    def evaluate_fn(number, model):
        calls.append((number, model.to_torch_state_dict()["w"].clone()))
        return MetricRecord({"number": number})

    record(tmp_path, rounds=2, start={"evaluate_fn": evaluate_fn})
    result = record(tmp_path, rounds=4, start={"evaluate_fn": evaluate_fn})
    assert [number for number, _ in calls] == [0, 1, 2, 3, 4]
    run = Run.open(tmp_path)
    assert all(torch.equal(w, run.global_state(number)["w"]) for number, w in calls)
    assert [m["number"] for m in result.evaluate_metrics_serverapp.values()] == [0, 1, 2, 3, 4]


def test_a_round_that_was_not_evaluated_yet_is_evaluated_when_the_run_goes_on(tmp_path):
    def killed(number, model):
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(tmp_path, rounds=3, start={"evaluate_fn": killed})
    calls = []
    record(tmp_path, rounds=3, start={"evaluate_fn": lambda number, model: calls.append(number)})
    assert calls == [2, 3]


def test_what_the_recorder_cannot_take_is_said(tmp_path):
    with pytest.raises(TraceFLError, match="clients must be distinct, got 'a' more than once"):
        record(tmp_path, clients=["a", "b", "a"])
    with pytest.raises(TraceFLError, match=r"evaluate must return a tracefl.flower.Evaluation, got 0.9"):
        record(tmp_path, evaluate=lambda state: 0.9)
    with pytest.raises(TraceFLError, match="initial_arrays must be an ArrayRecord, got a dict"):
        record(tmp_path, initial=dict(INITIAL))
    (tmp_path / "file").touch()
    with pytest.raises(TraceFLError, match=r"file cannot be made for a run .*: choose another folder"):
        record(tmp_path / "file")
