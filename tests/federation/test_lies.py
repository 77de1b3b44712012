"""Clients that lie or die: every lie by name, where a client that failed stops the run, and where it is accepted."""

import math
import re

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    Krum,
)
from flwr.supercore.task_identity import TaskIdentity
from torch import nn
from torch.nn import functional as F

from tests.federation import lying
from tests.federation.lying import FINITE, FINITE_IN_VALUES, NET, PLAIN, LyingGrid, copy_of
from tests.federation.own import OwnGrid, arrays, examples_of, new_app, trained
from tests.federation.test_own import plain, record, shares
from tracefl import Run
from tracefl.data.examples import Examples
from tracefl.errors import TraceFLError
from tracefl.federation.recorder import Recorder
from tracefl.record import ClientInfo
from tracefl.training import Evaluation
from tracefl.training import evaluate as evaluate_examples

FIVE = {11: "a", 12: "b", 13: "c", 14: "d", 15: "e"}
HONEST = {node: client for node, client in FIVE.items() if client != "b"}
MODES = pytest.mark.parametrize("accept", [False, True], ids=["strict", "accepting"])


def evaluate(state) -> Evaluation:
    """Three layers of one matrix, so that large weights overflow."""
    w, var = state["w"], state["bn.running_var"]
    logits = (w @ w.T @ w @ torch.eye(3)).T / (var + 1e-5).sqrt()
    labels = torch.tensor([0, 1, 1])
    loss = F.cross_entropy(logits, labels).item()
    return Evaluation(loss, (logits.argmax(1) == labels).double().mean().item(), logits.argmax(1))


def run_with(folder, lie, *, nodes=FIVE, rounds=1, grid=None, **changes):
    grid = grid or LyingGrid(nodes, lie)
    return record(folder, grid, rounds=rounds, initial=arrays(NET), **{"evaluate": evaluate} | changes)


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """The first round as it is without client b."""
    undo = pytest.MonkeyPatch()
    for name in ("task_id", "run_id", "node_id"):
        undo.setattr(TaskIdentity, f"_{name}", 1, raising=False)
    folder = tmp_path_factory.mktemp("without")
    run_with(folder, None, grid=OwnGrid(HONEST))
    undo.undo()
    return Run.open(folder).round(1)


def check_named(folder, lie, words, accept, without, **changes) -> None:
    """Strict: one sentence names round and client. Accepting: the round is as if the client had not been asked."""
    if not accept:
        with pytest.raises(TraceFLError, match=rf"(?s)^round 1, client b: .*(?:{words})") as raised:
            run_with(folder, lie, **changes)
        assert str(raised.value).isprintable()
        assert not Run.open(folder).rounds
        return
    run_with(folder, lie, accept_failures=True, **changes)
    kept = Run.open(folder).round(1)
    assert list(kept.failures) == ["b"]
    assert re.search(words, kept.failures["b"], re.DOTALL)
    assert not (folder / "rounds/0001/clients/b.safetensors").exists()
    assert (kept.clients, kept.global_sha256) == (without.clients, without.global_sha256)


@MODES
@pytest.mark.parametrize("name", PLAIN)
def test_a_reply_that_cannot_be_used_is_its_clients_failure(tmp_path, name, accept, without):
    lie, words = PLAIN[name]
    lying.Pickled.opened.clear()
    check_named(tmp_path, lie, words, accept, without)
    assert not lying.Pickled.opened


@MODES
@pytest.mark.parametrize("name", FINITE | FINITE_IN_VALUES)
def test_a_finite_lie_frames_nobody(tmp_path, name, accept, without):
    """The model would not be finite in values, loss or predictions: it is not recorded, and the liar is named."""
    lie = (FINITE | FINITE_IN_VALUES)[name]
    check_named(tmp_path, lie, "the released model has .*, and its update stands apart", accept, without)


@MODES
@pytest.mark.parametrize("name", FINITE)
def test_it_is_told_from_the_values_where_the_server_has_no_data(tmp_path, name, accept, without):
    check_named(
        tmp_path, FINITE[name], "the released model has .*, and its update stands apart", accept, without, evaluate=None
    )


@pytest.mark.parametrize("value", [1e20, 1e38, 3e38])
def test_of_two_clients_the_one_that_lies_is_named(tmp_path, value):
    with pytest.raises(
        TraceFLError, match=r"^round 1, client b: .*stands apart: it is \d.* from the model that was sent"
    ):
        run_with(tmp_path, lying.everywhere(value), nodes={11: "a", 12: "b"})


def test_several_liars_are_left_out_one_after_the_other(tmp_path):
    def train(content, client):
        size = {"b": 1e38, "d": 1e22}.get(client)
        if size:
            content["arrays"] = ArrayRecord(
                {n: v * 0 + size for n, v in content["arrays"].to_torch_state_dict().items()}
            )
        return content

    small = {name: value for name, value in NET.items() if value.is_floating_point()}
    grid = OwnGrid(FIVE, new_app(train))
    record(tmp_path, grid, rounds=1, initial=arrays(small), evaluate=evaluate, accept_failures=True)
    kept = Run.open(tmp_path).round(1)
    assert list(kept.failures) == ["b", "d"]
    assert [client.id for client in kept.clients] == ["a", "c", "e"]


def test_nobody_is_blamed_where_no_update_stands_apart(tmp_path):
    """Everyone trains alike, but the model's loss is not finite."""
    for accept in (False, True):
        with pytest.raises(
            TraceFLError, match=r"round 1: the released model has a loss of nan.*training itself diverges"
        ):
            run_with(
                tmp_path / str(accept), None, grid=OwnGrid(FIVE), accept_failures=accept,
                evaluate=lambda state: Evaluation(math.nan, 0.5, torch.zeros(1)),
            )  # fmt: skip


@pytest.mark.parametrize(
    ("found", "words"),
    [((math.inf, 0.5, torch.zeros(1)), "a loss of inf"), ((1.0, math.nan, torch.zeros(1)), "an accuracy of nan"),
     ((1.0, 0.5, torch.tensor([math.nan])), "predictions that are not finite")],
)  # fmt: skip
def test_a_round_whose_loss_accuracy_or_predictions_are_not_finite_is_not_recorded(tmp_path, found, words):
    with pytest.raises(TraceFLError, match=f"round 1: the released model has {words}"):
        run_with(tmp_path, None, grid=OwnGrid(FIVE), evaluate=lambda state: Evaluation(*found))
    assert not Run.open(tmp_path).rounds


@MODES
def test_a_model_that_cannot_be_evaluated_is_the_fault_of_whose_update_stands_apart(tmp_path, accept, without):
    def strict(state):
        found = evaluate(state)
        if not math.isfinite(found.loss):
            raise ValueError("Input contains NaN.")  # as scikit-learn's metrics do
        return found

    words = r"the released model cannot be evaluated \(Input contains NaN\), and its update stands apart"
    check_named(tmp_path, FINITE_IN_VALUES["1e15 everywhere"], words, accept, without, evaluate=strict)


def test_an_error_in_evaluate_is_one_sentence_and_shows_where_it_is_from(tmp_path):
    with pytest.raises(TraceFLError, match=r"cannot be evaluated \('accuracy'\); .* apart, correct evaluate") as raised:
        run_with(tmp_path, None, grid=OwnGrid(FIVE), evaluate=lambda state: {}["accuracy"])
    assert isinstance(raised.value.__cause__, KeyError)


def test_an_output_that_is_not_finite_makes_the_loss_nan():
    """Minus infinity of a class that no example has leaves cross-entropy finite."""
    model = nn.Linear(2, 3)
    model.bias.data = torch.tensor([0.0, 1.0, -math.inf])
    found = evaluate_examples(model, Examples(torch.ones(4, 2), torch.tensor([0, 1, 0, 1])))
    assert math.isnan(found.loss)


def diverging(content, client):
    """An honest client: where the model that it is sent has large values, so that training ends in NaN."""
    state = content["arrays"].to_torch_state_dict()
    if max(float(value.abs().max()) for value in state.values()) > 1e12:
        content["arrays"] = ArrayRecord({n: v * float("nan") if v.is_floating_point() else v for n, v in state.items()})
    return content


@MODES
def test_no_client_is_blamed_for_the_model_that_it_was_sent(tmp_path, accept):
    """Without the server's own data, 1e15 is recorded in round 1; in round 2 everybody's training diverges."""
    grid = LyingGrid(FIVE, lying.everywhere(1e15), rounds=(1,), app=new_app(diverging))
    with pytest.raises(TraceFLError) as raised:
        record(tmp_path, grid, initial=arrays(NET), evaluate=None, accept_failures=accept)
    told = str(raised.value)
    assert told.startswith("round 2: 5 of 5 clients answer with non-finite values: training on the model of round 1")
    assert "client b's update stands apart there" in told
    assert "client a" not in told


@MODES
def test_one_client_is_not_blamed_for_it_either(tmp_path, accept):
    """In round 2 only client a's training diverges, but it was client b's update that stood apart."""
    alone = new_app(lambda content, client: diverging(content, client) if client == "a" else content)
    grid = LyingGrid(FIVE, lying.everywhere(1e15), rounds=(1,), app=alone)
    given = {"initial": arrays(NET), "evaluate": None, "accept_failures": accept}
    words = "the model of round 1 (client b's update stands apart there"
    if not accept:
        with pytest.raises(TraceFLError, match=r"^round 2: 1 of 5 clients answer with non-finite values") as raised:
            record(tmp_path, grid, **given)
        assert words in str(raised.value)
    else:
        record(tmp_path, grid, **given)
        failures = Run.open(tmp_path).round(2).failures
        assert list(failures) == ["a"]
        assert words in failures["a"]


def test_most_clients_that_diverge_are_left_out_without_blame(tmp_path):
    def train(content, client):
        return numbers_of(content, float("nan")) if client in "abd" else content

    def numbers_of(content, value):
        state = content["arrays"].to_torch_state_dict()
        content["arrays"] = ArrayRecord({n: v * value if v.is_floating_point() else v for n, v in state.items()})
        return content

    grid = OwnGrid(FIVE, new_app(train))
    with pytest.raises(TraceFLError, match=r"^round 1: 3 of 5 clients answer with non-finite values: .* initial model"):
        record(tmp_path / "strict", grid, initial=arrays(NET))
    record(tmp_path, grid, rounds=1, initial=arrays(NET), accept_failures=True)
    failures = Run.open(tmp_path).round(1).failures
    assert list(failures) == ["a", "b", "d"]
    assert all("of which the initial model that it was sent may be the cause" in why for why in failures.values())


@pytest.mark.parametrize(("name", "value"), [("w", math.nan), ("a", math.inf)])
def test_a_broken_initial_model_is_sent_to_nobody(tmp_path, name, value):
    grid, broken = OwnGrid(FIVE), {**NET, name: torch.full_like(NET[name], value)}
    with pytest.raises(TraceFLError, match=f"round 1: the initial model has non-finite values in '{name}'"):
        record(tmp_path, grid, initial=arrays(broken))
    assert not grid.trained_nodes()


def test_a_run_that_an_earlier_version_has_broken_blames_nobody_but_the_liar(tmp_path):
    """Its last model has no finite loss: nobody is asked to train it, and the sentence says whose update it was."""
    run = Run.create(tmp_path, initial=NET, clients=[ClientInfo(client) for client in "abc"])
    states = {client: trained(NET, client) for client in "ac"} | {"b": {n: v * 0 + 7e17 for n, v in NET.items()}}
    parts = [run.record_client(1, c, states[c], examples_of(c), 1 / 3) for c in "abc"]
    mean = {n: sum(states[c][n].double() for c in "abc").div(3).to(v.dtype) for n, v in NET.items()}
    run.record_round(1, parts, mean, Evaluation(math.nan, 0.5, torch.zeros(1)), {})
    grid = OwnGrid({11: "a", 12: "b", 13: "c"})
    strategy = plain(min_train_nodes=3, min_available_nodes=3)
    with pytest.raises(
        TraceFLError, match=r"round 2: the model of round 1 has a loss of nan.*client b's update of round 1"
    ):
        Recorder(strategy, Run.open(tmp_path), {11: "a", 12: "b", 13: "c"}).start(grid, arrays(NET), 2)
    assert not grid.trained_nodes()


# --- strategies -------------------------------------------------------------------------------------


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


@MODES
@pytest.mark.parametrize("storage", [{"dtype": "float16"}, {"keep": "deltas"}, {"keep": "last:1", "dtype": "bfloat16"}])
def test_a_finite_lie_is_found_however_states_are_kept(tmp_path, storage, accept):
    lie = FINITE["1e38 everywhere"]
    if not accept:
        with pytest.raises(TraceFLError, match=r"^round 1, client b: .*"):
            run_with(tmp_path, lie, **storage)
        return
    run_with(tmp_path, lie, rounds=2, accept_failures=True, **storage)
    assert [list(Run.open(tmp_path).round(t).failures) for t in (1, 2)] == [["b"], ["b"]]


@MODES
def test_an_own_strategys_other_records_are_opened_with_care(tmp_path, accept):
    def change(records):
        records["more"] = ArrayRecord({"c": Array("float32", (2,), "numpy.ndarray", b"garbage")})

    class Own(FedAvg):
        def aggregate_train(self, server_round, replies):
            states = [reply.content["arrays"].to_torch_state_dict() for reply in replies]
            return ArrayRecord({n: sum(s[n] for s in states) / len(states) for n in states[0]}), None

    grid = LyingGrid(FIVE, lying.content(change))
    given = {"strategy": Own(fraction_evaluate=0.0), "rounds": 1, "accept_failures": accept}
    if not accept:
        with pytest.raises(TraceFLError, match=r"^round 1, client b: its 'c' of 'more' is no .npy array"):
            record(tmp_path, grid, **given)
    else:
        record(tmp_path, grid, **given)
        assert list(Run.open(tmp_path).round(1).failures) == ["b"]


def test_an_own_strategy_that_cannot_aggregate_says_whose_reply_is_unlike(tmp_path):
    class Own(FedAvg):
        def aggregate_train(self, server_round, replies):
            return super().aggregate_train(server_round, replies)

    grid = LyingGrid(FIVE, lying.metrics(mine=1.0))
    with pytest.raises(TraceFLError, match="Own cannot aggregate 5 updates; client b: its reply has the metric 'mine'"):
        record(tmp_path, grid, strategy=Own(fraction_evaluate=0.0))


# --- the share --------------------------------------------------------------------------------------


def known(**changes) -> list[ClientInfo]:
    return [
        ClientInfo(client, {0: 4, 1: {**{c: examples_of(c) for c in "abcde"}, **changes}[client] - 4})
        for client in "abcde"
    ]


@MODES
@pytest.mark.parametrize("told", [1, 10, 1000, 2**53])
def test_a_client_does_not_set_its_own_share(tmp_path, told, accept):
    lie = lying.metrics(num_examples=told)
    given = {"clients": known(), "accept_failures": accept, "rounds": 1}
    words = f"num-examples must be {examples_of('b')}, as many as the server knows it to hold, got {told:g}"
    if not accept:
        with pytest.raises(TraceFLError) as raised:
            record(tmp_path, LyingGrid(FIVE, lie), **given)
        assert f"round 1, client b: its {words}" in str(raised.value)
    else:
        record(tmp_path, LyingGrid(FIVE, lie), **given)
        assert words in Run.open(tmp_path).round(1).failures["b"]


def test_it_is_said_once_where_nothing_is_known_of_it(tmp_path, caplog):
    record(tmp_path / "unknown", LyingGrid(FIVE, lying.metrics(num_examples=10**6)), rounds=3)
    said = [line for line in caplog.messages if "is what it says itself (num-examples)" in line]
    assert len(said) == 1
    assert "client a, b, c, d, e" in said[0]
    assert shares(Run.open(tmp_path / "unknown"))["b"] > 0.9
    caplog.clear()
    record(tmp_path / "known", OwnGrid(FIVE), rounds=2, clients=known())
    record(tmp_path / "equal", OwnGrid(FIVE), rounds=2, strategy=FedMedian(fraction_evaluate=0.0))
    assert "what it says itself" not in caplog.text
    app = new_app(lambda content, client: _weighed(content))
    record(tmp_path / "other", OwnGrid(FIVE, app), rounds=1, clients=known(), strategy=plain(weighted_by_key="w"))
    assert "is what it says itself (w)" in caplog.text


def _weighed(content):
    content["metrics"] = MetricRecord({"w": 1.0})
    return content


def test_a_model_with_a_negative_variance_is_not_held_against_clients(tmp_path):
    """Noise of a strategy may have made it so."""
    initial = {**NET, "bn.running_var": torch.tensor([1.0, -0.5])}
    record(tmp_path, OwnGrid(FIVE), rounds=1, initial=arrays(initial))
    assert len(Run.open(tmp_path).round(1).clients) == 5


# --- late, doubled and contradicting replies --------------------------------------------------------


def test_a_doubled_or_contradicting_reply_counts_once_and_the_first(tmp_path, caplog):
    def contradict(reply):
        other = RecordDict({"arrays": arrays({n: v + 1 for n, v in NET.items()}), "metrics": MetricRecord({"x": 1})})
        return [reply, copy_of(reply), copy_of(reply, content=other)]

    run_with(tmp_path / "lied", contradict, rounds=2)
    assert caplog.text.count("node 12 answers a message twice: its first answer counts") == 4
    run_with(tmp_path / "honest", None, grid=OwnGrid(FIVE), rounds=2)
    for number in (1, 2):
        lied, honest = (Run.open(tmp_path / name).round(number) for name in ("lied", "honest"))
        assert (lied.clients, lied.global_sha256) == (honest.clients, honest.global_sha256)


@MODES
def test_an_error_that_comes_first_counts_too(tmp_path, accept, without):
    def lie(reply):
        failed = copy_of(reply)
        failed.__dict__.update(_content=None, _error=Error(2, "no disk"))
        return [failed, reply]

    check_named(tmp_path, lie, "it raised: no disk", accept, without)


@MODES
def test_a_late_reply_is_one_of_no_round(tmp_path, accept):
    class Late(LyingGrid):
        """Client b's reply of round 1 comes with the replies of round 2."""

        held = None

        def pull_messages(self, message_ids):
            found = super().pull_messages(message_ids)
            mine = [r for r in found if r.metadata.src_node_id == 12 and r.metadata.message_type == "train"]
            if mine and self.count == 1:
                self.held = mine[0]
                return [reply for reply in found if reply is not mine[0]]
            return [*([self.held] if mine and self.held else []), *found]

    grid = Late(FIVE, lambda reply: reply)
    given = {"initial": arrays(NET), "evaluate": evaluate, "start": {"timeout": 0.05}}
    if not accept:
        with pytest.raises(TraceFLError, match=r"^round 1, client b: it sent no reply in time"):
            record(tmp_path, grid, **given)
        return
    record(tmp_path, grid, accept_failures=True, **given)
    run = Run.open(tmp_path)
    assert list(run.round(1).failures) == ["b"]
    assert not run.round(2).failures
    assert torch.equal(run.round(2).client_state("b")["w"], trained(run.global_state(1), "b")["w"])


class HttpGrid(OwnGrid):
    """As Flower's of this name on a SuperLink: it cannot put client b's reply together, and loses all that it pulls."""

    def pull_messages(self, message_ids):
        found = super().pull_messages(message_ids)
        if any(reply.metadata.src_node_id == 12 and reply.metadata.message_type == "train" for reply in found):
            raise ValueError("Unexpected set of `children`.")
        return found


@MODES
def test_a_reply_that_flower_cannot_put_together_takes_no_other_along(tmp_path, accept, without):
    words = r"its reply cannot be read \(Unexpected set of `children`.\)"
    check_named(tmp_path, None, words, accept, without, grid=HttpGrid(FIVE))


# --- clients that die -------------------------------------------------------------------------------


class Dying(OwnGrid):
    """Client b's process dies in its first `times` tasks; whose task fails with it, Flower does not say."""

    def __init__(self, nodes, times, code=ErrorCode.UNKNOWN, kind="train") -> None:
        super().__init__(nodes)
        self.times, self.code, self.kind = times, code, kind

    def answer(self, message):
        about = message.metadata
        if about.dst_node_id == 12 and about.message_type == self.kind and self.times:
            self.times -= 1
            reply = super().answer(message)
            reply.__dict__.update(_content=None, _error=Error(self.code, "<class 'ActorDiedError'>:<'killed'>"))
            return reply
        return super().answer(message)


@MODES
@pytest.mark.parametrize("code", [ErrorCode.UNKNOWN, ErrorCode.CLIENT_APP_CRASHED])
def test_a_task_whose_process_died_is_sent_again(tmp_path, caplog, code, accept):
    grid = Dying(FIVE, 1, code)
    run_with(tmp_path / "died", None, grid=grid, rounds=2, accept_failures=accept)
    run_with(tmp_path / "honest", None, grid=OwnGrid(FIVE), rounds=2)
    assert caplog.text.count("round 1, client b: its process died") == 1
    assert grid.trained_nodes().count(12) == 3
    for number in (1, 2):
        died, honest = (Run.open(tmp_path / name).round(number) for name in ("died", "honest"))
        assert (died.clients, died.global_sha256) == (honest.clients, honest.global_sha256)


@MODES
def test_a_client_that_dies_twice_has_failed(tmp_path, accept):
    grid = Dying(FIVE, 2)
    if not accept:
        with pytest.raises(TraceFLError, match=r"^round 1, client b: its process died: .*killed"):
            run_with(tmp_path, None, grid=grid)
    else:
        run_with(tmp_path, None, grid=grid, rounds=2, accept_failures=True)
        assert [list(Run.open(tmp_path).round(t).failures) for t in (1, 2)] == [["b"], []]
    assert grid.trained_nodes().count(12) == (3 if accept else 2)


def test_a_process_that_dies_as_it_is_asked_who_it_is_is_asked_again(tmp_path):
    run_with(tmp_path, None, grid=Dying(FIVE, 1, kind="query.identify"))
    assert len(Run.open(tmp_path).round(1).clients) == 5


# --- who they say they are, and what they find ------------------------------------------------------


IDS = ["", "x" * 10**6, "\ud800"]


@pytest.mark.parametrize(
    "said", [None, Error(2, ""), Error(2, " \n"), Error(3, None), RecordDict(),
             *(RecordDict({"config": ConfigRecord({"client": name})}) for name in IDS)],
)  # fmt: skip
def test_a_node_that_answers_anything_to_who_it_is_takes_no_part(tmp_path, said):
    class Odd(OwnGrid):
        def answer(self, message):
            reply = super().answer(message)
            if message.metadata.dst_node_id == 12 and message.metadata.message_type == "query.identify":
                content, error = (said if isinstance(said, kind) else None for kind in (RecordDict, Error))
                reply.__dict__.update(_content=content, _error=error)
            return reply

    run_with(tmp_path, None, grid=Odd(FIVE), accept_failures=True)
    assert [client.id for client in Run.open(tmp_path).round(1).clients] == ["a", "c", "d", "e"]


@MODES
@pytest.mark.parametrize(
    ("found", "words"),
    [({"num-examples": 1, "sum": "x"}, "its metric 'sum' must be a number"),
     ({"num-examples": float("nan"), "sum": 1.0}, "its num-examples must be a number of at least 0"),
     ({"sum": 1.0}, "its num-examples must be a number of at least 0"),
     ({"num-examples": 1}, "its reply lacks the metric 'sum'"),
     ({"num-examples": 1, "sum": [1.0]}, "the metric 'sum'"), ({"num-examples": 1, "sum": []}, "the metric 'sum'"),
     (None, "its reply cannot be read")],
)  # fmt: skip
def test_an_evaluation_that_cannot_be_averaged_is_its_clients_failure(tmp_path, caplog, found, words, accept):
    class Evaluating(OwnGrid):
        def answer(self, message):
            reply = super().answer(message)
            if message.metadata.dst_node_id == 12 and message.metadata.message_type == "evaluate":
                if found is None:
                    reply.__dict__["_content"] = None
                else:
                    reply.content["metrics"].__dict__["_data"] = found
            return reply

    given = {"strategy": FedAvg(), "rounds": 1, "accept_failures": accept}
    if not accept:
        with pytest.raises(TraceFLError, match=f"^round 1, client b: evaluating, .*{words}"):
            record(tmp_path, Evaluating(FIVE), **given)
    else:
        result = record(tmp_path, Evaluating(FIVE), **given)
        assert "round 1, client b: evaluating, " in caplog.text
        assert math.isfinite(result.evaluate_metrics_clientapp[1]["sum"])
    assert len(Run.open(tmp_path).rounds) == 1
