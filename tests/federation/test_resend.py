"""Replies that come twice, late or in pieces, and tasks whose process died."""

import pytest
import torch
from flwr.app import Error, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from tests.federation.five import FIVE, MODES, check_named, evaluate, run_with
from tests.federation.lying import NET, LyingGrid, copy_of
from tests.federation.own import OwnGrid, arrays, trained
from tests.federation.recording import record
from tracefl import Run
from tracefl.errors import TraceFLError


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
