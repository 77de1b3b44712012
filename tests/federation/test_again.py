"""A strategy that keeps something aggregates again without the liar, as if it had never heard it."""

import pytest
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    Krum,
)

from tests.federation import lying
from tests.federation.five import FIVE, HONEST, evaluate, run_with
from tests.federation.lying import FINITE, NET, LyingGrid
from tests.federation.own import OwnGrid, arrays
from tests.federation.recording import plain, record
from tracefl import Run
from tracefl.errors import TraceFLError


class Counting(FedAvg):
    """Keeps something of every round; `Told` says what."""

    seen = 0

    def aggregate_train(self, server_round, replies):
        self.seen += 1
        return super().aggregate_train(server_round, replies)


class Told(Counting):
    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def clipped():
    return DifferentialPrivacyServerSideFixedClipping(plain(), 0.0, 0.05, 5)


REALS = {name: value for name, value in NET.items() if value.is_floating_point()}


@pytest.mark.parametrize(
    "strategy", [lambda: FedAdam(fraction_evaluate=0.0), lambda: FedAvgM(fraction_evaluate=0.0, server_momentum=0.9),
                 lambda: Told(fraction_evaluate=0.0)], ids=["FedAdam", "FedAvgM", "own, with state_dict"],
)  # fmt: skip
def test_a_strategy_that_keeps_something_aggregates_again_as_if_it_had_not(tmp_path, strategy):
    def run(name, grid, rounds):
        made = strategy()
        changes = {"strategy": made, "accept_failures": True, "initial": arrays(REALS)}
        record(tmp_path / name, grid, rounds=rounds, evaluate=None, **changes)
        return made

    one = run("lied", LyingGrid(FIVE, lying.everywhere(3e38)), 2)
    other = run("without", OwnGrid(HONEST), 2)
    for number in (1, 2):
        lied, without = (Run.open(tmp_path / name).round(number) for name in ("lied", "without"))
        assert list(lied.failures) == ["b"]
        assert lied.global_sha256 == without.global_sha256
        assert lied.strategy_sha256 == without.strategy_sha256
    assert getattr(one, "seen", 2) == getattr(other, "seen", 2) == 2


def test_a_strategy_whose_state_cannot_be_given_back_ends_the_run(tmp_path):
    with pytest.raises(
        TraceFLError, match=r"round 1, client b: .*Counting.seen has changed, .*give the strategy state_dict"
    ):
        run_with(tmp_path, FINITE["1e38 everywhere"], strategy=Counting(fraction_evaluate=0.0), accept_failures=True)
    assert not Run.open(tmp_path).rounds


@pytest.mark.parametrize("strategy", [lambda: FedMedian(fraction_evaluate=0.0), lambda: Krum(fraction_evaluate=0.0,
                         num_malicious_nodes=1), clipped], ids=["FedMedian", "Krum", "clipping"])  # fmt: skip
def test_a_strategy_that_stands_a_lie_goes_on(tmp_path, strategy):
    grid = LyingGrid(FIVE, lying.everywhere(1e30))
    record(tmp_path, grid, initial=arrays(REALS), evaluate=evaluate, strategy=strategy())
    run = Run.open(tmp_path)
    assert [len(run.round(t).clients) for t in (1, 2)] == [5, 5]
    assert all(float(value.abs().max()) < 100 for value in run.global_state(2).values())


def test_a_reply_in_another_order_changes_nothing(tmp_path):
    """Flower pairs arrays by their place here, and two of these have the same shape."""

    def change(records):
        records["arrays"] = ArrayRecord(dict(reversed(list(records["arrays"].items()))))

    given = {"initial": arrays(REALS), "evaluate": None}
    record(tmp_path / "lied", LyingGrid(FIVE, lying.content(change)), strategy=clipped(), **given)
    record(tmp_path / "honest", OwnGrid(FIVE), strategy=clipped(), **given)
    lied, honest = (Run.open(tmp_path / name).round(2) for name in ("lied", "honest"))
    assert (lied.clients, lied.global_sha256) == (honest.clients, honest.global_sha256)
