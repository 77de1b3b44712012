"""A view of Flower's grid: some of its nodes, each reply as soon as it comes, an end on request."""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

PULL_INTERVAL_S = 0.1


@dataclass
class GridView:
    """Everything of `grid`, changed by what is given.

    Args:
        grid: the grid that is viewed; it may be a view itself.
        nodes: the only node ids that `get_node_ids` gives; None: those of the grid.
        on_reply: called with every reply that `send_and_receive` waits for, as soon as it is there.
        stop: once it is set, waiting for nodes or replies raises InterruptedError.
    """

    grid: Grid
    nodes: list[int] | None = None
    on_reply: Callable[[Message], None] = lambda _: None
    stop: threading.Event = field(default_factory=threading.Event)

    def get_node_ids(self) -> Iterable[int]:
        self._check()
        return self.grid.get_node_ids() if self.nodes is None else self.nodes

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._check()
        return self.grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The replies that came within `timeout` seconds; None: wait for all."""
        waiting, replies = set(self.grid.push_messages(messages)), []
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while True:
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
                self.on_reply(reply)
            if not waiting or time.monotonic() > deadline:
                return replies
            time.sleep(PULL_INTERVAL_S)

    def _check(self) -> None:
        if self.stop.is_set():
            raise InterruptedError("stopped while waiting for clients")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)
