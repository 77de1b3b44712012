"""Strategies of somebody's own, or around Flower's: their weights, their state, their loop."""

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAdam, FedAvg, FedAvgM

from tests.federation.own import INITIAL, OwnGrid, new_app
from tests.federation.recording import THREE, FromScratch, plain, record, same, shares, trace_round
from tests.federation.test_recorder import files
from tracefl import Run
from tracefl.errors import TraceFLError


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
