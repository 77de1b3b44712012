"""The recorder in apps of other shapes: how they call and declare `start`, what they send, what they find."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg

from tests.federation.own import INITIAL, OwnGrid, arrays, examples_of, new_app
from tests.federation.recording import THREE, FromScratch, plain, record, same, shares
from tracefl import Run
from tracefl.errors import TraceFLError
from tracefl.federation.identity import identify
from tracefl.federation.recorder import Recorder
from tracefl.record import ClientInfo
from tracefl.training import Evaluation

PREDICTED = torch.tensor([0, 1, 1])


# --- how `start` is declared and called -------------------------------------------------------------


class Anything(FedAvg):
    def start(self, *args, **kwargs):
        return super().start(*args, **kwargs)


class ByName(FedAvg):
    def start(self, *, grid, initial_arrays, num_rounds=2, **kwargs):
        return super().start(grid, initial_arrays, num_rounds, **kwargs)


class Turned(FedAvg):
    def start(self, initial_arrays, grid, num_rounds=2, *, config=None, **kwargs):
        return super().start(grid, initial_arrays, num_rounds, **kwargs)


class Renamed(FedAvg):
    def start(self, net, model, rounds=2, timeout=1, train_config=None, evaluate_fn=None):
        return super().start(net, model, rounds, timeout, train_config, evaluate_fn=evaluate_fn)


def in_places(rest):
    """As Flower's own start has them, with evaluate_config between."""
    return rest["train_config"], None, rest["evaluate_fn"]


@pytest.mark.parametrize(
    ("strategy", "call"),
    [
        (FedAvg, lambda start, grid, rest: start(initial_arrays=arrays(), num_rounds=2, grid=grid, **rest)),
        (Anything, lambda start, grid, rest: start(grid, arrays(), 2, 1, **rest)),
        (Anything, lambda start, grid, rest: start(grid, arrays(), 2, 1, *in_places(rest))),
        (Anything, lambda start, grid, rest: start(num_rounds=2, grid=grid, initial_arrays=arrays(), **rest)),
        (ByName, lambda start, grid, rest: start(grid=grid, initial_arrays=arrays(), **rest)),
        (Turned, lambda start, grid, rest: start(arrays(), grid, config="mine", **rest)),
        (Renamed, lambda start, grid, rest: start(grid, arrays(), **rest)),
        (Renamed, lambda start, grid, rest: start(model=arrays(), net=grid, rounds=2, **rest)),
    ],
)  # fmt: skip
def test_start_is_called_as_the_app_called_it(tmp_path, strategy, call):
    calls, grid = [], OwnGrid(THREE)
    rest = {"train_config": ConfigRecord({"lr": 0.1}), "evaluate_fn": lambda number, model: calls.append(number)}
    for _ in range(2):
        result = call(Recorder(strategy(fraction_evaluate=0.0), tmp_path, grid, node_timeout=0.3).start, grid, rest)
    run = Run.open(tmp_path)
    assert calls == [0, 1, 2]
    assert len(run.rounds) == 2
    assert same(result.arrays.to_torch_state_dict(), run.global_state(2))
    assert run["train_config"] == {"lr": 0.1}
    assert dict(rest["train_config"]) == {"lr": 0.1}


class Delegates(FedAvg):
    """Its inner strategy's rounds are not its own."""

    def start(self, *args, **kwargs):
        return plain().start(*args, **kwargs)


class BuildsMessages(FedAvg):
    def start(self, grid, initial_arrays, num_rounds):
        return self.aggregate_train(1, [])


@pytest.mark.parametrize(
    ("strategy", "words"),
    [(Delegates, "asks clients to train before a round"), (BuildsMessages, "aggregates before a round")],
)
def test_a_start_that_goes_past_the_strategys_own_methods_is_named_at_once(tmp_path, strategy, words):
    grid = OwnGrid(THREE)
    with pytest.raises(TraceFLError, match=rf"{strategy.__name__}.start {words}: it must call its own configure_train"):
        Recorder(strategy(fraction_evaluate=0.0), tmp_path, grid, node_timeout=0.3).start(grid, arrays(), 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [({"strategy": FedAvg}, "strategy must be one of flwr.serverapp.strategy, or a subclass, got abc.ABCMeta"),
     ({"clients": [1, 2]}, r"clients must be a list of texts or of ClientInfo, got \[1, 2\]"),
     ({"clients": "abc"}, r"clients must be a list of texts or of ClientInfo, got 'abc'"),
     ({"rounds": "3"}, "num_rounds must be a whole number, got '3'"),
     ({"initial": ArrayRecord()}, "initial_arrays must have at least one entry"),
     ({"clients_per_round": 0}, "clients_per_round must be 1 to 3, the clients that can be drawn, got 0"),
     ({"clients_per_round": 4}, "clients_per_round must be 1 to 3, .* got 4"),
     ({"clients_per_round": 2, "excluded": ["a", "b"]}, "clients_per_round must be 1 to 1, .* got 2"),
     ({"clients_per_round": 1}, "round 1: the strategy waits for more than 1 nodes, the drawn ones after 0.3 s")],
)  # fmt: skip
def test_what_cannot_be_run_ends_in_a_sentence_and_no_hang(tmp_path, given, words):
    with pytest.raises(TraceFLError, match=words):
        record(tmp_path, **given)


def test_arguments_of_another_kind_are_named(tmp_path):
    for folder, grid, more, words in [
        (None, OwnGrid(THREE), {}, "run must be a Run or the folder of one, got a NoneType"),
        (tmp_path, None, {}, "nodes must be the app's grid, or a dict of node to client, got a NoneType"),
        (tmp_path, OwnGrid(THREE), {"settings": ["a"]}, "settings must be a dict, got a list"),
    ]:
        with pytest.raises(TraceFLError, match=words):
            Recorder(plain(), folder, grid, **more)


# --- strategies ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frozen(FromScratch):
    note: str = "mine"


def test_a_frozen_strategy_is_recorded_and_left_as_it_was(tmp_path):
    strategy = Frozen()
    record(tmp_path, strategy=strategy)
    assert shares(Run.open(tmp_path), 2) == pytest.approx(dict.fromkeys("abc", 1 / 3))
    assert vars(strategy) == {"note": "mine"}


class SendsNothing(FromScratch):
    def configure_train(self, server_round, arrays, config, grid):
        return super().configure_train(server_round, arrays, config, grid) if server_round != 2 else None

    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, replies) if replies else (None, None)


class Asks(FromScratch):
    def configure_train(self, server_round, arrays, config, grid):
        messages = super().configure_train(server_round, arrays, config, grid)
        return [Message(m.content, message_type="query.state", dst_node_id=m.metadata.dst_node_id) for m in messages]


def test_a_round_may_ask_nobody_but_nothing_else_than_to_train(tmp_path):
    record(tmp_path / "nobody", rounds=3, strategy=SendsNothing())
    run = Run.open(tmp_path / "nobody")
    assert [len(run.round(number).clients) for number in (1, 2, 3)] == [3, 0, 3]
    assert same(run.global_state(1), run.global_state(2))
    with pytest.raises(TraceFLError, match=r"configure_train must give messages to train, got 'query\.state'"):
        record(tmp_path / "query", strategy=Asks())


class AddsDifferences(FromScratch):
    def __init__(self, rate):
        self.rate = rate

    def configure_train(self, server_round, arrays, config, grid):
        self.sent = arrays.to_torch_state_dict()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        mean = super().aggregate_train(server_round, replies)[0].to_torch_state_dict()
        return ArrayRecord({n: self.sent[n] + self.rate * mean[n] for n in mean}), None


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_clients_that_send_differences_are_not_taken_for_models(tmp_path, rate):
    def difference(content, client):
        state = content["arrays"].to_torch_state_dict()
        content["arrays"] = ArrayRecord({n: v - INITIAL[n] for n, v in state.items()})
        return content

    with pytest.raises(TraceFLError, match="round 1: the clients send differences to the model, not models"):
        record(tmp_path, OwnGrid(THREE, new_app(difference)), rounds=1, strategy=AddsDifferences(rate))


# --- who is who, where a mod is in the way ------------------------------------------------------------


def clipping_app(everywhere: bool):
    app = new_app()
    train = app._registered_funcs.pop("train.default")
    app._mods = [fixedclipping_mod] if everywhere else []
    for name in [*app._registered_funcs]:
        del app._registered_funcs[name]
    app.query("identify")(identify)
    app.train(mods=[] if everywhere else [fixedclipping_mod])(train)
    return app


def test_a_mod_for_training_that_refuses_the_question_is_named_with_its_place(tmp_path):
    strategy = lambda: DifferentialPrivacyClientSideFixedClipping(plain(), 0.0, 0.05, 3)  # noqa: E731
    with pytest.raises(TraceFLError, match=r"fixedclipping_mod expects .*give those for training to app.train\(mods="):
        record(tmp_path, OwnGrid(THREE, clipping_app(everywhere=True)), strategy=strategy())
    record(tmp_path, OwnGrid(THREE, clipping_app(everywhere=False)), strategy=strategy())
    run = Run.open(tmp_path)
    total = sum(map(examples_of, "abc"))
    assert shares(run, 2) == {c: examples_of(c) / total for c in "abc"}
    sent = run.round(1).client_state("a")
    assert sum(float((sent[n] - INITIAL[n]).norm()) ** 2 for n in sent) == pytest.approx(0.05**2, rel=1e-4)


def test_of_many_nodes_that_cannot_be_told_some_are_named(tmp_path):
    grid = OwnGrid({node: {"site": "x"} for node in range(40)})
    with pytest.raises(TraceFLError, match=r"node 4 could not say .*; and 35 more nodes take no part: start") as raised:
        record(tmp_path, grid)
    assert "node 5 " not in str(raised.value)


# --- what an app finds --------------------------------------------------------------------------------


def test_an_apps_own_accuracy_may_be_in_percent_and_is_shown_as_it_is(tmp_path, capsys):
    from tracefl.cli import main

    found = iter([62.5, 87.5])
    record(tmp_path, evaluate=lambda state: Evaluation(1.0, next(found), PREDICTED))
    assert [each.accuracy for each in Run.open(tmp_path).rounds] == [62.5, 87.5]
    for command in ("report", "list"):
        with pytest.raises(SystemExit) as ended:
            main([command, str(tmp_path)])
        assert not ended.value.code
    page = (tmp_path / "report.html").read_text()
    assert "accuracy: 62.5 in round 1, 87.5 in round 2." in page
    shown = page.replace("87.5 %", "") + capsys.readouterr().out
    assert "87.5" in shown
    assert "8750" not in shown


def test_what_trace_fl_computes_itself_is_a_share(tmp_path):
    run = Run.create(tmp_path, initial=INITIAL, clients=[ClientInfo("a")], data_sha256="ab" * 32)
    part = run.record_client(1, "a", INITIAL, 3, 1.0)
    with pytest.raises(TraceFLError, match=r"round 1.accuracy must be a share from 0 to 1"):
        run.record_round(1, [part], INITIAL, Evaluation(0.5, 87.5, PREDICTED), {})


@pytest.mark.parametrize(
    "found",
    [(np.float32(0.5), np.float64(0.25), PREDICTED.numpy()), (torch.tensor(0.5), torch.tensor(0.25), [0, 1, 1])],
)  # fmt: skip
def test_an_evaluation_may_hold_arrays_and_tensors(tmp_path, found):
    record(tmp_path, rounds=1, evaluate=lambda state: Evaluation(*found))
    run = Run.open(tmp_path)
    assert (run.round(1).loss, run.round(1).accuracy) == (0.5, 0.25)
    assert run.predictions(1).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("given", "words"),
    [({"evaluate": lambda state: Evaluation(None, 0.5, PREDICTED)}, "evaluate must return .* of a loss, an accuracy"),
     ({"evaluate": lambda state: Evaluation("low", 0.5, PREDICTED)}, "evaluate must return .* of a loss, an accuracy"),
     ({"start": {"evaluate_fn": lambda number, model: 0.5}}, "evaluate_fn must return a MetricRecord or None, got 0.5"),
     ({"start": {"evaluate_fn": lambda number, model: {"x": "high"}}}, "each with numbers or lists of numbers by name"),
     ({"start": {"evaluate_fn": lambda number, model: (0.5, {})}}, r"evaluate_fn must return .* got \(0.5, \{\}\)")],
)  # fmt: skip
def test_an_evaluation_that_is_none_is_named(tmp_path, given, words):
    with pytest.raises(TraceFLError, match=words):
        record(tmp_path, **given)


def test_who_does_not_evaluate_in_time_is_named(tmp_path, caplog):
    grid = OwnGrid(THREE)

    def hear(message):
        grid.silent = {12} if message.metadata.message_type == "evaluate" else set()

    grid.on_message = hear
    record(tmp_path, grid, rounds=1, strategy=FedAvg())
    assert "round 1: client b did not evaluate the model in time" in caplog.text
    assert "client a did not" not in caplog.text


# --- types --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.uint16, torch.uint32, torch.uint64, torch.bool])
def test_whole_numbers_of_any_type_are_recorded(tmp_path, kind):
    count = torch.ones(2).to(kind)

    def counts(content, client):
        content["arrays"] = ArrayRecord({**content["arrays"].to_torch_state_dict(), "count": count})
        return content

    initial = {**INITIAL, "count": count, "empty": torch.zeros(0, 3), "scale": torch.tensor(2.0)}
    record(tmp_path, OwnGrid(THREE, new_app(counts)), initial=arrays(initial))
    released = Run.open(tmp_path).global_state(2)
    assert released["count"].dtype == kind
    assert released["count"].tolist() == count.tolist()
    assert (released["empty"].shape, released["scale"].shape) == ((0, 3), ())


def test_single_precision_may_answer_for_double(tmp_path):
    def single(content, client):
        state = content["arrays"].to_torch_state_dict()
        content["arrays"] = ArrayRecord({name: value.float() for name, value in state.items()})
        return content

    initial = {name: value.double() for name, value in INITIAL.items()}
    record(tmp_path, OwnGrid(THREE, new_app(single)), initial=arrays(initial))
    run = Run.open(tmp_path)
    assert run.round(2).client_state("a")["w"].dtype == torch.float32
    assert run.global_state(2)["w"].dtype == torch.float64
