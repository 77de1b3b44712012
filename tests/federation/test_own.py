"""The recorder in somebody else's app: nothing is lost, nodes come and go, any strategy, and no central data."""

import json
import logging

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    QFedAvg,
    Strategy,
)
from torch import nn

from tests.federation.own import INITIAL, OwnGrid, arrays, examples_of, new_app, trained
from tests.federation.test_recorder import files
from tracefl import Run, trace
from tracefl.errors import TraceFLError
from tracefl.federation.nodes import Nodes
from tracefl.federation.recorder import Recorder

THREE = {11: "a", 12: "b", 13: "c"}


def plain(**changes) -> FedAvg:
    return FedAvg(**{"fraction_evaluate": 0.0} | changes)


def record(folder, grid=None, rounds=2, strategy=None, initial=None, start=None, **changes):
    grid = grid or OwnGrid(THREE)
    recorder = Recorder(strategy or plain(), folder, grid, **{"node_timeout": 0.3} | changes)
    return recorder.start(
        grid, arrays() if initial is None else initial, num_rounds=rounds, **{"timeout": 0.3} | (start or {})
    )


def shares(run, number=1) -> dict[str, float]:
    return {client.id: client.weight for client in run.round(number).clients}


def mean_of(run, number, name="w"):
    return sum(c.weight * run.round(number).client_state(c.id)[name] for c in run.round(number).clients)


def same(a, b) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


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


# --- nodes come and go ----------------------------------------------------------------------------


def test_a_lost_nodes_answer_is_its_clients_failure(tmp_path):
    grid = OwnGrid(THREE)
    record(tmp_path, grid, rounds=1)
    grid.on_message = lambda message: message.metadata.message_type == "train" and grid.lost.add(12)
    with pytest.raises(TraceFLError, match=r"round 2, client b: its node is lost: .*Rounds 1 to 1 are kept"):
        record(tmp_path, grid)
    grid.lost.clear()
    record(tmp_path, grid, accept_failures=True)
    last = Run.open(tmp_path).round(2)
    assert [client.id for client in last.clients] == ["a", "c"]
    assert "its node is lost" in last.failures["b"]


def test_a_node_that_returns_under_another_number_is_the_same_client(tmp_path):
    def move(number, model):
        if number == 1:
            moving.nodes[99] = moving.nodes.pop(12)

    record(tmp_path / "again", OwnGrid(THREE), rounds=1)
    record(tmp_path / "again", OwnGrid({11: "a", 99: "b", 13: "c"}), rounds=2)
    moving = OwnGrid(THREE)
    record(tmp_path / "moving", moving, rounds=2, start={"evaluate_fn": move})
    for folder in (tmp_path / "again", tmp_path / "moving"):
        run = Run.open(folder)
        assert [[client.id for client in run.round(t).clients] for t in (1, 2)] == [["a", "b", "c"]] * 2
        assert torch.equal(run.round(2).client_state("b")["w"], trained(run.global_state(1), "b")["w"])
    assert moving.trained_nodes()[3:] == [11, 99, 13]


def test_a_node_that_becomes_another_client_under_its_number_is_that_client(tmp_path):
    def swap(number, model):
        if number == 1:
            grid.nodes[11], grid.nodes[12] = grid.nodes[12], grid.nodes[11]

    grid = OwnGrid(THREE)
    record(tmp_path, grid, rounds=2, start={"evaluate_fn": swap})
    run = Run.open(tmp_path)
    for client in "abc":
        expected = trained(dict(run.global_state(1)), client)
        assert torch.equal(run.round(2).client_state(client)["w"], expected["w"])


def test_a_silent_node_takes_no_part_and_is_named(tmp_path, caplog):
    grid = OwnGrid(THREE | {14: "d"}, silent=[14])
    with pytest.raises(TraceFLError, match=r"node 14 did not say within 0.3 s .*accept_failures=true"):
        record(tmp_path, grid, rounds=1)
    record(tmp_path, grid, rounds=1, accept_failures=True)
    assert "node 14 did not say" in caplog.text
    assert [client.id for client in Run.open(tmp_path).round(1).clients] == ["a", "b", "c"]


def test_a_client_that_is_lost_as_it_joins_has_failed(tmp_path):
    def join(number, model):
        grid.nodes |= {14: {"partition-id": "d"}} if number == 1 else {}

    def lose(message):
        asked = [node for kind, node in grid.asked if kind != "train"]
        grid.lost = {14} if asked.count(14) == 2 else set()

    grid = OwnGrid(THREE, on_message=lose)
    record(tmp_path, grid, rounds=3, accept_failures=True, start={"evaluate_fn": join})
    run = Run.open(tmp_path)
    assert [[*each.failures] for each in run.rounds] == [[], ["d"], []]
    assert [len(each.clients) for each in run.rounds] == [3, 3, 4]


def test_a_node_that_was_silent_is_asked_again_but_not_waited_for_as_long(tmp_path, monkeypatch):
    waits, ask = [], Nodes._ask

    def asked(self, nodes, timeout):
        waits.extend([timeout] * (14 in nodes))
        ask(self, nodes, timeout)
        grid.silent = {14} if len(waits) < 3 else set()

    monkeypatch.setattr(Nodes, "_ask", asked)
    monkeypatch.setattr("tracefl.federation.nodes.AGAIN_S", 0.05)
    grid = OwnGrid(THREE | {14: "d"}, silent=[14])
    record(tmp_path, grid, rounds=4, accept_failures=True)
    assert waits[:4] == [0.3, 0.05, 0.05, 0.05]
    assert [len(each.clients) for each in Run.open(tmp_path).rounds] == [3, 3, 4, 4]


def test_two_nodes_of_one_client_are_both_named(tmp_path):
    with pytest.raises(TraceFLError, match="node 14 says that it is client 'b', as node 12 does"):
        record(tmp_path, OwnGrid(THREE | {14: "b"}), rounds=1)
    record(tmp_path, OwnGrid(THREE | {14: "b"}), rounds=1, accept_failures=True)
    assert [client.id for client in Run.open(tmp_path).round(1).clients] == ["a", "c"]


def test_a_second_node_of_a_client_that_is_there_changes_nothing(tmp_path, caplog):
    def double(number, model):
        if number == 1:
            grid.nodes[14] = {"partition-id": "b"}

    grid = OwnGrid(THREE)
    record(tmp_path, grid, rounds=2, start={"evaluate_fn": double})
    assert "node 14 says that it is client 'b', as node 12 does: it takes no part" in caplog.text
    assert sorted(grid.trained_nodes()[3:]) == [11, 12, 13]


def test_clients_that_are_expected_are_waited_for_and_missing_ones_named(tmp_path):
    with pytest.raises(TraceFLError, match=r"connected clients are a \(node 11\), .*; clients d are missing"):
        record(tmp_path, rounds=1, clients=["a", "b", "c", "d"])
    assert not (tmp_path / "run.json").exists()


def test_a_surplus_node_takes_no_part_and_is_named(tmp_path, caplog):
    grid = OwnGrid(THREE | {14: "hospital/berlin"})
    record(tmp_path, grid, rounds=1, clients=["a", "b", "c"])
    assert 14 not in grid.trained_nodes()
    assert "node 14 says that it is client 'hospital/berlin', which is none of a, b, c" in caplog.text


def test_a_client_may_join_later(tmp_path, caplog):
    def join(number, model):
        if number == 1:
            grid.nodes[14] = {"partition-id": "d"}

    grid = OwnGrid(THREE)
    record(tmp_path, grid, rounds=2, start={"evaluate_fn": join})
    assert "round 2: client 'd' has joined" in caplog.text
    run = Run.open(tmp_path)
    assert [client.id for client in run.clients] == ["a", "b", "c", "d"]
    assert len(run.round(2).clients) == 4
    record(tmp_path, OwnGrid(THREE | {14: "d"}), rounds=3)


@pytest.mark.parametrize(
    "name", ["../../../x", "hospital/berlin", "..", ".", "CON", "a b\n", "ünïcode", "x" * 4000, "7"]
)
def test_any_string_is_an_id_and_none_leads_out_of_the_run(tmp_path, name):
    folder = tmp_path / "deep" / "er" / "run"
    record(folder, OwnGrid({1: {"site": name}, 2: {"site": "b"}}, new_app(key="site")), rounds=1, node_key="site")
    written = {file for file in tmp_path.rglob("*") if file.is_file()}
    assert all(folder in file.parents for file in written)
    assert len(list((folder / "rounds/0001/clients").iterdir())) == 2
    run = Run.open(folder)
    state = run.client_states(1)[name]
    assert torch.equal(state["w"], trained(INITIAL, name)["w"])
    assert trace_round(run).client_ids == [client.id for client in run.round(1).clients]


def test_ids_that_differ_only_by_case_have_files_of_their_own(tmp_path):
    record(tmp_path, OwnGrid({1: "Berlin", 2: "berlin"}), rounds=1)
    names = [file.name.lower() for file in (tmp_path / "rounds/0001/clients").iterdir()]
    assert len(set(names)) == 2


def test_a_node_without_the_key_is_told_which_it_has(tmp_path):
    grid = OwnGrid({1: {"site": "a", "data-path": "/x"}, 2: {"site": "b"}})
    with pytest.raises(TraceFLError, match=r"no 'partition-id', it has data-path, site: name the key by node_key"):
        record(tmp_path, grid, rounds=1)


def test_a_client_app_that_cannot_identify_itself_is_told_how(tmp_path):
    app = new_app()
    del app._registered_funcs["query.identify"]
    with pytest.raises(TraceFLError, match=r'register app\.query\("identify"\)\(identify\) in its client app'):
        record(tmp_path, OwnGrid(THREE, app), rounds=1)


def test_too_few_nodes_for_the_strategy_end_in_a_sentence(tmp_path):
    strategy = plain(min_train_nodes=4, min_available_nodes=4)
    with pytest.raises(TraceFLError, match=r"connected clients are a \(node 11\).*at least 4 are needed"):
        record(tmp_path, strategy=strategy, rounds=1)

    def leave(number, model):
        if number == 1:
            del grid.nodes[11], grid.nodes[12]

    grid = OwnGrid(THREE)
    with pytest.raises(TraceFLError, match=r"round 2: the strategy waits for more than 1 nodes"):
        record(tmp_path, grid, start={"evaluate_fn": leave})
    assert len(Run.open(tmp_path).rounds) == 1


def test_a_client_whose_node_has_gone_is_named_and_not_waited_for(tmp_path, caplog):
    def leave(number, model):
        if number == 1:
            del grid.nodes[12]

    grid = OwnGrid(THREE)
    record(tmp_path, grid, start={"evaluate_fn": leave})
    assert "round 2: no node is there for client b" in caplog.text
    assert list(shares(Run.open(tmp_path), 2)) == ["a", "c"]


def test_a_node_that_is_lost_before_it_trains_is_its_clients_failure(tmp_path):
    grid = OwnGrid(THREE)
    record(tmp_path, grid, rounds=1)
    grid.on_message = lambda message: grid.lost.add(12) if len(grid.asked) > 12 else None
    with pytest.raises(TraceFLError, match="round 2, client b: node 12 is lost"):
        record(tmp_path, grid)


def test_drawn_clients_are_waited_for_and_a_missing_one_fails(tmp_path):
    """As the pipeline does: the recorder draws, the strategy takes every node that it is shown."""
    strategy = lambda: plain(min_train_nodes=2, min_available_nodes=2)  # noqa: E731
    record(tmp_path, rounds=1, strategy=strategy(), clients_per_round=2, seed=3)
    one = Recorder(strategy(), tmp_path, OwnGrid({11: "a", 12: "b"}), clients_per_round=2, seed=3, node_timeout=0.2)
    number = next(t for t in range(2, 30) if "c" in one.participants(t))
    del one
    with pytest.raises(TraceFLError, match=f"round {number}, client c: none of the connected nodes says"):
        record(tmp_path, OwnGrid({11: "a", 12: "b"}), rounds=number, strategy=strategy(), clients_per_round=2, seed=3)
    more = {"clients_per_round": 2, "seed": 3, "accept_failures": True}
    record(tmp_path, OwnGrid({11: "a", 12: "b"}), rounds=number, strategy=strategy(), **more)
    last = Run.open(tmp_path).round(number)
    assert list(last.failures) == ["c"]
    assert len(last.clients) == 1


# --- the order of entries, and strategies with state ----------------------------------------------


def clipped(strategy):
    return DifferentialPrivacyServerSideFixedClipping(strategy, 0.0, 0.05, 3)


@pytest.mark.parametrize(
    "strategy",
    [lambda: FedAvgM(fraction_evaluate=0.0, server_momentum=0.9), lambda: clipped(plain()),
     lambda: clipped(FedAvgM(fraction_evaluate=0.0, server_momentum=0.5)), lambda: FedAdam(fraction_evaluate=0.0)],
)  # fmt: skip
def test_strategies_that_pair_arrays_by_place_go_on_as_if_never_stopped(tmp_path, strategy):
    whole = record(tmp_path / "whole", rounds=3, strategy=strategy())
    for rounds in (1, 2, 3):
        result = record(tmp_path / "parts", rounds=rounds, strategy=strategy())
    run = Run.open(tmp_path / "parts")
    assert list(run.global_state(2)) == list(INITIAL) == list(run.round(2).client_state("a"))
    assert same(result.arrays.to_torch_state_dict(), whole.arrays.to_torch_state_dict())
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def linear(state) -> nn.Module:
    """A model of these entries."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in state.items():
                setattr(self, name, nn.Parameter(value.clone(), requires_grad=value.is_floating_point()))

        def forward(self, x):
            return x @ self.w * self.a + self.b

    return Model()


def trace_round(run, number=1):
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    model = linear(run.global_state(number))
    return trace(model, run.client_states(number), x, weights=shares(run, number), method="influence")


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


# --- any strategy ---------------------------------------------------------------------------------


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


class ByLoss(FedAvg):
    """Weighs by its own formula, and without what Flower's classes call."""

    def aggregate_train(self, server_round, replies):
        contents = [reply.content for reply in replies]
        losses = [content["metrics"]["train_loss"] for content in contents]
        states = [content["arrays"].to_torch_state_dict() for content in contents]
        mean = {n: sum(x * s[n] for x, s in zip(losses, states, strict=True)) / sum(losses) for n in states[0]}
        return ArrayRecord(mean), None


class AfterFlowers(FedAvg):
    """Looks at what Flower's class has made of the replies."""

    def aggregate_train(self, server_round, replies):
        released, metrics = super().aggregate_train(server_round, replies)
        self.seen = [*getattr(self, "seen", []), server_round]
        return released, metrics


class Around(FedAvg):
    """A wrapper whose inner strategy has another name, and which changes what is released."""

    def __init__(self, base, factor):
        super().__init__(fraction_evaluate=0.0)
        self.base, self.factor = base, factor

    def configure_train(self, server_round, arrays, config, grid):
        self.sent = arrays.to_torch_state_dict()
        return self.base.configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        released, metrics = self.base.aggregate_train(server_round, replies)
        new = released.to_torch_state_dict()
        return ArrayRecord({n: self.sent[n] + self.factor * (new[n] - self.sent[n]) for n in new}), metrics


def test_weights_of_a_strategy_with_a_formula_of_its_own_are_found_from_its_model(tmp_path):
    record(tmp_path, strategy=ByLoss(fraction_evaluate=0.0))
    run, inverse = Run.open(tmp_path), {c: 1 / examples_of(c) for c in "abc"}
    assert run.round(1).weights_from == "models"
    assert shares(run) == pytest.approx({c: inverse[c] / sum(inverse.values()) for c in "abc"}, abs=1e-3)


@pytest.mark.parametrize("strategy", [AfterFlowers(fraction_evaluate=0.0), Around(plain(), 1.0), Around(plain(), 0.5)])
def test_a_strategy_around_flowers_own_weighs_as_that_does(tmp_path, strategy):
    record(tmp_path, strategy=strategy)
    total = sum(map(examples_of, "abc"))
    assert shares(Run.open(tmp_path), 2) == pytest.approx({c: examples_of(c) / total for c in "abc"}, rel=1e-3)


def test_where_weights_cannot_be_learnt_examples_are_assumed_and_it_is_said(tmp_path, caplog):
    class Noisy(FedAvg):
        def aggregate_train(self, server_round, replies):
            mean = super().aggregate_train(server_round, replies)[0].to_torch_state_dict()
            noise = torch.Generator().manual_seed(server_round)
            return ArrayRecord({n: v + torch.randn(v.shape, generator=noise) for n, v in mean.items()}), None

    record(tmp_path, rounds=1, strategy=Noisy(fraction_evaluate=0.0))
    run, total = Run.open(tmp_path), sum(map(examples_of, "abc"))
    assert run.round(1).weights_from == "assumed"
    assert shares(run) == pytest.approx({c: examples_of(c) / total for c in "abc"})
    assert "round 1: what weights Noisy gave the updates cannot be told" in caplog.text
    assert "num-examples is assumed" in caplog.text
    caplog.clear()
    answer = run.trace(inputs=torch.ones(1, 2), model=linear(run.global_state(1)), targets=[0])
    assert answer.client_ids == ["a", "b", "c"]
    assert "round 1: how the strategy weighed the updates is not known" in caplog.text


@pytest.mark.slow
def test_q_fedavg_weighs_by_losses(tmp_path):
    """p_k in proportion to loss^q, whatever the step."""
    strategy = QFedAvg(client_learning_rate=0.1, q=2.0, fraction_evaluate=0.0)
    record(tmp_path, rounds=1, strategy=strategy)
    run, losses = Run.open(tmp_path), {c: 1 / examples_of(c) ** 2 for c in "abc"}
    assert run.round(1).weights_from == "models"
    assert shares(run) == pytest.approx({c: losses[c] / sum(losses.values()) for c in "abc"}, abs=1e-3)


def test_an_update_that_a_loop_leaves_out_counts_nothing(tmp_path):
    class Drops(FedAvg):
        def start(self, grid, initial_arrays, num_rounds=3, timeout=3600):
            for number in range(1, num_rounds + 1):
                messages = self.configure_train(number, initial_arrays, ConfigRecord(), grid)
                replies = list(grid.send_and_receive(messages, timeout=timeout))
                kept = [reply for reply in replies if reply.content["metrics"]["num-examples"] != examples_of("b")]
                self.aggregate_train(number, kept)

    record(tmp_path, rounds=1, strategy=Drops(fraction_evaluate=0.0))
    run, total = Run.open(tmp_path), examples_of("a") + examples_of("c")
    assert shares(run) == {"a": examples_of("a") / total, "b": 0.0, "c": examples_of("c") / total}
    torch.testing.assert_close(mean_of(run, 1), run.global_state(1)["w"])


def test_a_strategy_may_weigh_by_another_key(tmp_path):
    def batches(content, client):
        content["metrics"] = MetricRecord({"batches": 2.5 if client == "a" else 5.0})
        return content

    record(tmp_path, OwnGrid(THREE, new_app(batches)), rounds=1, strategy=plain(weighted_by_key="batches"))
    assert shares(Run.open(tmp_path)) == {"a": 0.2, "b": 0.4, "c": 0.4}
    with pytest.raises(TraceFLError, match=r"client .: its samples must be a number of at least 0, got None"):
        record(tmp_path / "b", OwnGrid(THREE, new_app(batches)), rounds=1, strategy=plain(weighted_by_key="samples"))


def test_a_strategy_that_releases_nothing_leaves_the_model_and_the_round_says_so(tmp_path, caplog):
    class EverySecond(FedAvg):
        def aggregate_train(self, server_round, replies):
            return super().aggregate_train(server_round, replies) if server_round % 2 == 0 else (None, None)

    result = record(tmp_path, rounds=2, strategy=EverySecond(fraction_evaluate=0.0))
    run = Run.open(tmp_path)
    assert "round 1: EverySecond released no model" in caplog.text
    assert same(run.global_state(1), {name: INITIAL[name] for name in INITIAL})
    assert shares(run, 1) == {"a": 0.0, "b": 0.0, "c": 0.0}
    assert sum(shares(run, 2).values()) == pytest.approx(1)
    assert same(result.arrays.to_torch_state_dict(), run.global_state(2))


def test_a_strategy_may_release_other_entries(tmp_path):
    class Control(FedAvg):
        def aggregate_train(self, server_round, replies):
            mean = super().aggregate_train(server_round, replies)[0].to_torch_state_dict()
            del mean["a"]
            return ArrayRecord({**mean, "control": torch.full((2,), float(server_round))}), None

    record(tmp_path, rounds=2, strategy=Control(fraction_evaluate=0.0))
    run = Run.open(tmp_path)
    assert list(run.global_state(1)) == [*INITIAL, "control"]
    assert torch.equal(run.global_state(1)["a"], INITIAL["a"])
    assert run.global_state(2)["control"].tolist() == [2.0, 2.0]


def test_a_strategy_that_changes_a_shape_is_named(tmp_path):
    class Wider(FedAvg):
        def aggregate_train(self, server_round, replies):
            return ArrayRecord({**INITIAL, "w": torch.zeros(4, 3)}), None

    with pytest.raises(TraceFLError, match=r"released 'w' must have the shape \(2, 3\) .* got \(4, 3\)"):
        record(tmp_path, rounds=1, strategy=Wider(fraction_evaluate=0.0))


class Momentum(FedAvg):
    """State of its own: a velocity, and a count."""

    def __init__(self):
        super().__init__(fraction_evaluate=0.0)
        self.velocity, self.count = {}, 0

    def configure_train(self, server_round, arrays, config, grid):
        self.sent = arrays.to_torch_state_dict()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        mean = super().aggregate_train(server_round, replies)[0].to_torch_state_dict()
        self.count += 1
        self.velocity = {n: 0.9 * self.velocity.get(n, 0) + mean[n] - self.sent[n] for n in mean}
        return ArrayRecord({n: self.sent[n] + self.velocity[n] for n in mean}), None


class SavedMomentum(Momentum):
    def state_dict(self):
        return {"velocity": self.velocity, "rest": [self.count, 0.1, None, ("x", True)], 3: float("inf")}

    def load_state_dict(self, state):
        assert state["rest"] == [self.count + state["rest"][0], 0.1, None, ("x", True)]
        assert state[3] == float("inf")
        self.velocity, self.count = state["velocity"], state["rest"][0]


def test_a_strategys_state_dict_is_kept_and_given_back(tmp_path):
    record(tmp_path / "whole", rounds=3, strategy=SavedMomentum())
    record(tmp_path / "parts", rounds=1, strategy=SavedMomentum())
    strategy = SavedMomentum()
    record(tmp_path / "parts", rounds=3, strategy=strategy)
    assert strategy.count == 3
    assert same(Run.open(tmp_path / "parts").global_state(3), Run.open(tmp_path / "whole").global_state(3))


def test_state_that_a_strategy_cannot_give_is_named_when_the_run_goes_on(tmp_path, caplog):
    record(tmp_path, rounds=1, strategy=Momentum())
    assert "is not recorded" not in caplog.text
    record(tmp_path, rounds=1, strategy=Momentum())  # nothing is trained
    assert "is not recorded" not in caplog.text
    record(tmp_path, rounds=2, strategy=Momentum())
    assert "goes on with round 2; Momentum.count, " in caplog.text
    assert "Momentum.velocity" in caplog.text
    caplog.clear()
    record(tmp_path / "b", rounds=1, strategy=SavedMomentum())
    record(tmp_path / "b", rounds=2, strategy=SavedMomentum())
    assert "is not recorded" not in caplog.text


class Checkpoints(FedAvg):
    """As in Flower's advanced example: a loop of its own that keeps the best model."""

    def start(self, grid, initial_arrays, num_rounds=3, timeout=3600, train_config=None, evaluate_fn=None, note=""):
        self.best, self.saved, current = 0.0, {}, initial_arrays
        for number in range(1, num_rounds + 1):
            messages = self.configure_train(number, current, train_config or ConfigRecord(), grid)
            released, _ = self.aggregate_train(number, grid.send_and_receive(messages, timeout=timeout))
            current = released or current
            score = evaluate_fn(number, current)["accuracy"]
            if score > self.best:
                self.best, self.saved[number] = score, current
        return {"note": note, "model": current}


def test_a_strategy_with_a_start_of_its_own_is_run_by_it_and_goes_on(tmp_path):
    scores, calls = {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.95}, []

    def evaluate_fn(number, model):
        calls.append(number)
        return MetricRecord({"accuracy": scores[number]})

    start = {"evaluate_fn": evaluate_fn, "note": "mine"}
    record(tmp_path, rounds=2, strategy=Checkpoints(fraction_evaluate=0.0), start=start)
    strategy = Checkpoints(fraction_evaluate=0.0)
    result = record(tmp_path, rounds=4, strategy=strategy, start=start)
    run = Run.open(tmp_path)
    assert calls == [1, 2, 3, 4]
    assert result["note"] == "mine"
    assert list(strategy.saved) == [1, 2, 4]
    for number, model in {**strategy.saved, 4: result["model"]}.items():
        assert same(model.to_torch_state_dict(), run.global_state(number))
    assert "start" not in vars(strategy)
    assert "configure_train" not in vars(strategy)


def test_fewer_rounds_than_are_recorded_return_the_model_of_the_last_that_is_asked_for(tmp_path):
    record(tmp_path, rounds=3)
    result = record(tmp_path, rounds=2)
    assert same(result.arrays.to_torch_state_dict(), Run.open(tmp_path).global_state(2))
    assert list(result.train_metrics_clientapp) == [1, 2]


class FromScratch(Strategy):
    """No class of Flower's: asks all nodes, takes the plain mean, weighs by nothing and knows no examples."""

    def configure_train(self, server_round, arrays, config, grid):
        content = RecordDict({"arrays": arrays, "config": config})
        return [Message(content, dst_node_id=node, message_type="train") for node in grid.get_node_ids()]

    def aggregate_train(self, server_round, replies):
        states = [reply.content["arrays"].to_torch_state_dict() for reply in replies]
        return ArrayRecord({n: sum(s[n] for s in states) / len(states) for n in states[0]}), None

    def configure_evaluate(self, server_round, arrays, config, grid):
        return []

    def aggregate_evaluate(self, server_round, replies):
        return None

    def summary(self):
        pass


def test_a_strategy_from_scratch_is_recorded_and_its_weights_are_found(tmp_path):
    def untold(content, client):
        content["metrics"] = MetricRecord({"loss": 1.0})
        return content

    record(tmp_path, OwnGrid(THREE, new_app(untold)), strategy=FromScratch())
    run = Run.open(tmp_path)
    assert shares(run, 2) == dict.fromkeys("abc", 1 / 3)
    assert run.round(2).weights_from == "models"
    assert [client.num_examples for client in run.round(2).clients] == [0, 0, 0]
    assert trace_round(run, 2).client_ids == ["a", "b", "c"]


@pytest.mark.parametrize("ask", [[11, 77], [11, 11]])
def test_a_strategy_that_asks_unknown_nodes_or_one_twice_is_named(tmp_path, ask):
    class Asks(FromScratch):
        def configure_train(self, server_round, arrays, config, grid):
            content = RecordDict({"arrays": arrays, "config": config})
            return [Message(content, dst_node_id=node, message_type="train") for node in ask]

    words = "asks node 77, which has not said which client it is" if 77 in ask else "client 'a' several messages"
    with pytest.raises(TraceFLError, match=f"round 1: the strategy .*{words}"):
        record(tmp_path, strategy=Asks())


def test_a_reply_that_comes_a_round_late_is_not_taken_for_one_of_that_round(tmp_path):
    class Pulls(FromScratch):
        """Sends, waits for nobody, and looks for all replies that are there."""

        def start(self, grid, initial_arrays, num_rounds=3, timeout=3600):
            sent = []
            for number in range(1, num_rounds + 1):
                messages = self.configure_train(number, initial_arrays, ConfigRecord(), grid)
                sent += grid.push_messages(messages)
                late = {12} if number == 1 else set()
                replies = list(grid.pull_messages([s for s in sent if at[s] not in late]))
                self.aggregate_train(number, replies)

    class Remembers(OwnGrid):
        def push_messages(self, messages):
            ids = super().push_messages(messages)
            at.update(zip(ids, [message.metadata.dst_node_id for message in messages], strict=True))
            return ids

    at, heard = {}, []
    hear = lambda number, client, metrics: heard.append((number, client))  # noqa: E731
    record(tmp_path, Remembers(THREE), strategy=Pulls(), accept_failures=True, on_client=hear)
    assert sorted(heard) == [(1, "a"), (1, "c"), (2, "a"), (2, "b"), (2, "c")]
    run = Run.open(tmp_path)
    assert list(run.round(1).failures) == ["b"]
    assert list(shares(run, 2)) == ["a", "b", "c"]


def test_a_strategy_that_returns_no_array_record_is_named(tmp_path):
    class Returns(FromScratch):
        def aggregate_train(self, server_round, replies):
            return {"w": torch.zeros(2, 3)}, None

    with pytest.raises(
        TraceFLError, match=r"Returns.aggregate_train must return an ArrayRecord or None, .* got a dict"
    ):
        record(tmp_path, strategy=Returns())


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


def test_a_loop_that_ends_early_ends_there_again(tmp_path):
    class Early(FedAvg):
        def start(self, grid, initial_arrays, num_rounds=3, timeout=3600, evaluate_fn=None):
            current = initial_arrays
            for number in range(1, num_rounds + 1):
                messages = self.configure_train(number, current, ConfigRecord(), grid)
                current, _ = self.aggregate_train(number, grid.send_and_receive(messages, timeout=timeout))
                if evaluate_fn(number, current)["accuracy"] > 0.5:
                    return number
            return None

    start = {"evaluate_fn": lambda number, model: MetricRecord({"accuracy": 0.2 * number})}
    ends = [record(tmp_path, rounds=9, strategy=Early(fraction_evaluate=0.0), start=start) for _ in range(2)]
    assert ends == [3, 3]
    assert len(Run.open(tmp_path).rounds) == 3


def test_a_start_that_goes_through_no_round_is_named(tmp_path):
    class Elsewhere(FedAvg):
        def start(self, grid, initial_arrays, num_rounds=3, timeout=3600):
            return None

    with pytest.raises(TraceFLError, match=r"Elsewhere.start went through no round"):
        record(tmp_path, strategy=Elsewhere(fraction_evaluate=0.0))
    with pytest.raises(TraceFLError, match=r"FedAvg.start does not take these arguments"):
        record(tmp_path, start={"rounds": 3})


# --- what models are sent -------------------------------------------------------------------------


def test_replies_in_half_precision_are_kept_as_they_came(tmp_path):
    def half(content, client):
        state = content["arrays"].to_torch_state_dict()
        content["arrays"] = ArrayRecord({name: value.half() for name, value in state.items()})
        return content

    record(tmp_path, OwnGrid(THREE, new_app(half)))
    run = Run.open(tmp_path)
    assert run.round(2).client_state("a")["w"].dtype == torch.float16
    assert run.global_state(2)["w"].dtype == torch.float32
    torch.testing.assert_close(mean_of(run, 2).float(), run.global_state(2)["w"], rtol=1e-2, atol=1e-2)


def test_tied_weights_are_kept_under_both_names(tmp_path):
    shared = torch.ones(4)
    initial = {"head": shared, "embedding": shared, "part": shared[:2]}
    run = Run.create(tmp_path / "plain", initial=initial, clients=[], seed=0)
    assert {name: value.tolist() for name, value in run.global_state(0).items()} == {
        name: value.tolist() for name, value in initial.items()
    }
    record(tmp_path / "app", rounds=1, initial=ArrayRecord(initial))
    assert list(Run.open(tmp_path / "app").global_state(1)) == list(initial)


class Scaffold(FedAvg):
    """Takes the model from replies that hold more."""

    def aggregate_train(self, server_round, replies):
        states = [reply.content[self.arrayrecord_key].to_torch_state_dict() for reply in replies]
        return ArrayRecord({n: sum(s[n] for s in states) / len(states) for n in states[0]}), None


def test_among_several_array_records_the_models_is_named(tmp_path):
    def more(content, client):
        model = content.pop("arrays")
        content["controls"], content["model"] = ArrayRecord({"c": torch.ones(2)}), model
        content["timing"] = MetricRecord({"seconds": 1.0})
        return content

    grid = OwnGrid(THREE, new_app(more))
    with pytest.raises(TraceFLError, match="holds the ArrayRecords controls, model: name the model's by arrayrecord_"):
        record(tmp_path, grid, rounds=1, strategy=Scaffold(fraction_evaluate=0.0))

    class Named(Scaffold):
        def aggregate_train(self, server_round, replies):
            states = [reply.content["model"].to_torch_state_dict() for reply in replies]
            return ArrayRecord({n: sum(s[n] for s in states) / len(states) for n in states[0]}), None

    record(tmp_path, grid, rounds=1, strategy=Named(fraction_evaluate=0.0), arrayrecord_key="model")
    run = Run.open(tmp_path)
    assert list(run.round(1).client_state("a")) == list(INITIAL)
    assert shares(run) == pytest.approx(dict.fromkeys("abc", 1 / 3), abs=1e-3)


def test_partial_states_leave_the_rest_as_it_was(tmp_path):
    def head(content, client):
        content["arrays"] = ArrayRecord({"b": content["arrays"]["b"]})
        return content

    record(tmp_path, OwnGrid(THREE, new_app(head)))
    run = Run.open(tmp_path)
    assert list(run.round(1).client_state("b")) == ["b"]
    assert torch.equal(run.global_state(2)["w"], INITIAL["w"])
    torch.testing.assert_close(mean_of(run, 2, "b"), run.global_state(2)["b"])


def test_whole_numbers_are_rounded_not_cut_off(tmp_path):
    """Flower averages them as floats: 7 * 0.1 + 7 * 0.2 + 7 * 0.7 is a little less than 7."""

    def count(content, client):
        state = content["arrays"].to_torch_state_dict()
        content["arrays"] = ArrayRecord({**state, "count": torch.tensor(7), "on": torch.tensor(True)})
        content["metrics"]["num-examples"] = {"a": 1, "b": 2, "c": 7}[client]
        return content

    initial = arrays({**INITIAL, "count": torch.tensor(0), "on": torch.tensor(True)})
    record(tmp_path, OwnGrid(THREE, new_app(count)), rounds=2, initial=initial)
    released = Run.open(tmp_path).global_state(2)
    assert (released["count"].item(), released["count"].dtype) == (7, torch.int64)
    assert released["on"].item() is True


@pytest.fixture(autouse=True)
def _heard(caplog):
    logger = logging.getLogger("tracefl")
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before
