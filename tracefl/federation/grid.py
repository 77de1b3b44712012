"""Views of Flower's grid: only the drawn participants, each reply as it comes, an end on request."""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, cast

from flwr.app import Message
from flwr.serverapp import Grid

PULL_INTERVAL_S = 0.1


class ParticipantsGrid:
    """A grid with no nodes but the given ones, for a strategy whose participants are drawn already."""

    def __init__(self, grid: Grid, node_ids: list[int]) -> None:
        self._grid, self._node_ids = grid, node_ids

    def get_node_ids(self) -> Iterable[int]:
        return self._node_ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


class WatchedGrid:
    """A grid whose `send_and_receive` calls `on_reply` with every reply as soon as it is there."""

    def __init__(self, grid: Grid, on_reply: Callable[[Message], None]) -> None:
        self._grid, self._on_reply = grid, on_reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        open_ids, replies = set(self._grid.push_messages(messages)), []
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while open_ids:
            for reply in self._grid.pull_messages(open_ids):
                open_ids.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
                self._on_reply(reply)
            if time.monotonic() > deadline:
                break
            if open_ids:
                time.sleep(PULL_INTERVAL_S)
        return replies

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


class StoppableGrid:
    """A grid that stops waiting for replies once `stop` is set."""

    def __init__(self, grid: Grid, stop: threading.Event) -> None:
        self._grid, self._stop = grid, stop

    def _check(self) -> None:
        if self._stop.is_set():
            raise InterruptedError("stopped while waiting for clients")

    def get_node_ids(self) -> Iterable[int]:
        self._check()
        return self._grid.get_node_ids()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._check()
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return WatchedGrid(cast(Grid, self), lambda _: None).send_and_receive(messages, timeout=timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)
