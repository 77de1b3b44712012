"""A view of Flower's grid: some of its nodes, each reply once and as soon as it comes, an end on
request."""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Error, Message, Metadata
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from tracefl.federation.replies import UNREADABLE, as_line

PULL_INTERVAL_S = 0.1
BROKEN = (ValueError, TypeError, LookupError, AttributeError, AssertionError, RecursionError, DecodeError)
log = logging.getLogger("tracefl")


@dataclass
class GridView:
    """Everything of `grid`, changed by what is given.

    Args:
        grid: the grid that is viewed; it may be a view itself.
        nodes: gives the only node ids that `get_node_ids` shows, or is their list; None: those of
            the grid.
        on_reply: called with every reply that is pulled, as soon as it is there.
        stop: once it is set, waiting for nodes or replies raises InterruptedError.

    Attributes:
        asked: message id -> the metadata of the message that was sent. A reply belongs to the node
            that was asked: for a lost node, the SuperLink answers in its own name.
    """

    grid: Grid
    nodes: list[int] | Callable[[], list[int]] | None = None
    on_reply: Callable[[Message], None] = lambda _: None
    stop: threading.Event = field(default_factory=threading.Event)
    asked: dict[str, Metadata] = field(default_factory=dict, init=False)
    _answered: set[str] = field(default_factory=set, init=False)

    def get_node_ids(self) -> Iterable[int]:
        self._check()
        if self.nodes is None:
            return self.grid.get_node_ids()
        return self.nodes() if callable(self.nodes) else self.nodes

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        ids = list(self.grid.push_messages(messages)) if messages else []
        self.asked |= {sent: message.metadata for sent, message in zip(ids, messages, strict=False) if sent}
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self._check()
        replies = []
        for reply in self._pull(list(message_ids)):
            answers = reply.metadata.reply_to_message_id
            if answers in self._answered:
                log.warning("node %s answers a message twice: its first answer counts", reply.metadata.src_node_id)
                continue
            self._answered.add(answers)
            self.on_reply(reply)
            replies.append(reply)
        return replies

    def _pull(self, message_ids: list[str]) -> list[Message]:
        """The replies; from a SuperLink one by one: what cannot be put together takes others along.

        A view gives what it has from its own grid.
        """
        if type(self.grid).__name__ != "HttpGrid":
            return list(self.grid.pull_messages(message_ids))
        replies = list[Message]()
        for sent in message_ids:
            try:
                replies += self.grid.pull_messages([sent])
            except BROKEN as error:
                replies.append(_unreadable(self.asked[sent], sent, error))
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The replies that came within `timeout` seconds; None: wait for all."""
        waiting, replies = {sent for sent in self.push_messages(messages) if sent}, list[Message]()
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while waiting:
            pulled = self.pull_messages(waiting)
            replies += pulled
            waiting -= {reply.metadata.reply_to_message_id for reply in pulled}
            if pulled:
                continue  # none is late because others were read before it
            if time.monotonic() > deadline:
                break
            time.sleep(PULL_INTERVAL_S)
        return replies

    def _check(self) -> None:
        if self.stop.is_set():
            raise InterruptedError("stopped while waiting for clients")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)


def _unreadable(asked: Metadata, sent: str, error: Exception) -> Message:
    """Stands for a reply that Flower cannot put together from what the client has sent."""
    about = Metadata(
        run_id=asked.run_id,
        message_id="",
        src_node_id=asked.dst_node_id,
        dst_node_id=asked.src_node_id,
        reply_to_message_id=sent,
        group_id=asked.group_id,
        created_at=asked.created_at,
        ttl=asked.ttl,
        message_type=asked.message_type,
    )
    return Message(Error(UNREADABLE, as_line(error)), metadata=about)  # type: ignore[call-overload]
