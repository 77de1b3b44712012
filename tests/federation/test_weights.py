"""How much every update counts: what a strategy weighed by is seen, found or assumed."""

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg, QFedAvg

from tests.federation.own import OwnGrid, examples_of, new_app
from tests.federation.recording import THREE, linear, mean_of, plain, record, shares
from tracefl import Run
from tracefl.errors import TraceFLError


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
