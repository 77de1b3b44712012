"""Clients that lie: every lie by name, where a client that failed stops the run, and where it is accepted."""

import math
import re

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    FedAvg,
    FedMedian,
)
from torch import nn

from tests.federation import lying
from tests.federation.five import FIVE, MODES, STRICT_ALONE, check_named, evaluate, run_with
from tests.federation.lying import FINITE, FINITE_IN_VALUES, NET, PLAIN, LyingGrid
from tests.federation.own import OwnGrid, arrays, examples_of, new_app, trained
from tests.federation.recording import plain, record, shares
from tracefl import Run
from tracefl.data.examples import Examples
from tracefl.errors import TraceFLError
from tracefl.federation.recorder import Recorder
from tracefl.record import ClientInfo
from tracefl.training import Evaluation
from tracefl.training import evaluate as evaluate_examples


@STRICT_ALONE
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
def test_a_lie_that_can_be_recorded_is_named_in_its_own_round(tmp_path, caplog, accept):
    """Without the server's own data nobody knows what 1e15 does, and an honest client may have far to go."""
    run_with(tmp_path, lying.everywhere(1e15), evaluate=None, accept_failures=accept)
    (told,) = [record.getMessage() for record in caplog.records if "stands apart" in record.getMessage()]
    assert re.search(r"round 1: the released model has values up to 2e\+14 in 'w', and client b's update stands", told)
    assert [client.id for client in Run.open(tmp_path).round(1).clients] == [*"abcde"]
    caplog.clear()
    run_with(
        tmp_path / "all", None, evaluate=None, grid=OwnGrid(FIVE, new_app(lambda content, _: scaled(content, 1e6)))
    )
    run_with(
        tmp_path / "one",
        None,
        evaluate=None,
        grid=OwnGrid(FIVE, new_app(lambda content, client: scaled(content, 1 + 9 * (client == "b")))),
    )
    assert "stands apart" not in caplog.text


def scaled(content, factor):
    """All of a client's real numbers, so many times."""
    state = content["arrays"].to_torch_state_dict()
    content["arrays"] = ArrayRecord({n: v * factor if v.is_floating_point() else v for n, v in state.items()})
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
