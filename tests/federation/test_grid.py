"""The view of a grid, and how the server learns which node is which client."""

import threading

import pytest
from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict

from tests.federation.instant import NODES, InstantGrid
from tests.federation.local import LocalGrid
from tracefl.errors import TraceFLError
from tracefl.federation import server_app
from tracefl.federation.grid import GridView
from tracefl.federation.server_app import identify_nodes


def messages(*nodes: int) -> list[Message]:
    content = {"config": ConfigRecord({"server-round": 1})}
    return [Message(RecordDict(content), message_type=MessageType.TRAIN, dst_node_id=node) for node in nodes]


def test_a_view_shows_the_given_nodes_and_everything_else_of_its_grid():
    grid = InstantGrid()
    view = GridView(GridView(grid), nodes=[900, 914])
    assert view.get_node_ids() == [900, 914]
    assert GridView(grid).get_node_ids() == list(NODES)
    assert view.sent is grid.sent


def test_every_reply_is_handed_over_as_it_comes_and_returned():
    heard = []
    view = GridView(InstantGrid(seed=3), on_reply=lambda reply: heard.append(reply.metadata.src_node_id))
    replies = view.send_and_receive(messages(900, 907, 914))
    assert [reply.metadata.src_node_id for reply in replies] == heard
    assert sorted(heard) == [900, 907, 914]


def test_after_the_timeout_the_replies_so_far_are_returned():
    replies = GridView(InstantGrid({1: "silent"})).send_and_receive(messages(900, 907, 914), timeout=0)
    assert sorted(reply.metadata.src_node_id for reply in replies) == [900, 914]


def test_a_stopped_view_waits_for_nothing():
    stop = threading.Event()
    view = GridView(InstantGrid({1: "silent"}), on_reply=lambda _: stop.set(), stop=stop)
    with pytest.raises(InterruptedError):
        view.send_and_receive(messages(900, 907))
    with pytest.raises(InterruptedError):
        view.get_node_ids()


def test_nodes_are_identified_by_their_partitions():
    assert identify_nodes(GridView(LocalGrid(3)), 3) == {100: "0", 101: "1", 102: "2"}


def test_other_partitions_than_wanted_are_refused(monkeypatch):
    monkeypatch.setattr(server_app, "IDENTIFY_TIMEOUT_S", 0.0)
    with pytest.raises(TraceFLError, match=r"must hold partitions 0 to 3 .*got \['0', '1', '2'\] from 3 nodes"):
        identify_nodes(GridView(LocalGrid(3)), 4)


def test_a_node_that_fails_to_answer_is_reported(monkeypatch):
    grid = LocalGrid(2)
    monkeypatch.setattr(grid, "answer", lambda message: Message(Error(2, "no such partition"), reply_to=message))
    with pytest.raises(TraceFLError, match="no such partition"):
        identify_nodes(GridView(grid), 2)
