"""Which node is which client: nodes are asked as they come, and again before they train."""

import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import cast

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from tracefl.errors import TraceFLError, require
from tracefl.federation import grid as grid_module
from tracefl.federation.identity import ACTION, KEY
from tracefl.federation.replies import LOST, as_line
from tracefl.federation.resend import Resending

log = logging.getLogger("tracefl")
LONGEST_ID = 10_000  # characters
HOW = 'register app.query("identify")(identify) in its client app'
MODS = "mods of the client app must let the question through: give those for training to app.train(mods=[...])"
MOST_REASONS = 5  # in a sentence
AGAIN_S = 10  # for an answer of a node that was silent before: every round asks it


class Nodes:
    """The nodes of a grid that are known to be a client.

    A node that goes is forgotten, one that comes is asked, so a client that returns as another node
    is the same client. A node that does not answer (silent), that says to be a client which another
    node is (doubled), or one that is not expected (surplus) takes no part; it is named in a
    warning.

    Args:
        grid: Flower's.
        key: of the nodes' configuration; its value is the client's id.
        expected: the ids that there are; None: any.
        timeout: how many seconds an answer may take.

    Attributes:
        clients: node id -> client id.
        refused: node id -> why it takes no part, and whether something is wrong with it (a surplus
            node is as it should be).
    """

    def __init__(
        self, grid: Grid, key: str = KEY, expected: Collection[str] | None = None, timeout: float = 300
    ) -> None:
        self.grid, self.key, self.expected, self.timeout = grid, key, expected, timeout
        self.clients: dict[int, str] = {}
        self.refused: dict[int, tuple[str, bool]] = {}
        self._warned: set[str] = set()
        self._silent: set[int] = set()

    def refresh(self, again: Iterable[int] = (), retry: bool = False) -> dict[int, str]:
        """Forget the nodes that have gone and ask those that have come.

        Args:
            again: nodes to ask once more, where they are still there.
            retry: ask those that were refused once more, too.

        Returns:
            Node id -> client id.
        """
        there, again = dict.fromkeys(self.grid.get_node_ids()), set(again)
        self.clients = {node: client for node, client in self.clients.items() if node in there}
        self.refused = {node: why for node, why in self.refused.items() if node in there and not retry}
        before = self.clients.keys() - again
        known = self.clients.keys() | self.refused.keys()
        asked = [node for node in there if node in again or node not in known]
        silent = [node for node in asked if node in self._silent]
        self._ask([node for node in asked if node not in silent], self.timeout)
        self._ask(silent, min(AGAIN_S, self.timeout))
        doubled = {client for client, count in Counter(self.clients.values()).items() if count > 1}
        self._ask([node for node in before if self.clients[node] in doubled], self.timeout)  # is it still there?
        for client in sorted(doubled):
            nodes = [node for node, name in self.clients.items() if name == client]
            first = [node for node in nodes if node in before][:1]  # it was that client before
            for node in nodes if len(nodes) > 1 else []:
                others = " and ".join(f"node {other}" for other in nodes if other != node)
                if node not in first:
                    self._refuse(node, f"says that it is client '{as_line(client)}', as {others} does", wrong=not first)
        return self.clients

    def _ask(self, nodes: list[int], timeout: float) -> None:
        if not nodes:
            return
        content = RecordDict({"config": ConfigRecord({"key": self.key})})
        kind = f"{MessageType.QUERY}.{ACTION}"
        view = Resending(self.grid)
        queries = [Message(content, message_type=kind, dst_node_id=node) for node in nodes]
        replies = view.send_and_receive(queries, timeout=timeout)
        answers = {
            view.asked[reply.metadata.reply_to_message_id].dst_node_id: reply
            for reply in replies
            if reply.metadata.reply_to_message_id in view.asked
        }
        for node in nodes:
            self.clients.pop(node, None)
            reply = answers.get(node)
            self._silent.discard(node)
            if reply is None:
                self._silent.add(node)
                self._refuse(node, f"did not say within {self.timeout:g} s which client it is")
            elif reply.has_error() and reply.error.code in LOST:
                self._refuse(node, f"is lost ({as_line(reply.error.reason)})")
            elif reply.has_error():
                said = as_line(reply.error.reason)
                remedy = MODS if reply.error.code == ErrorCode.MOD_FAILED_PRECONDITION else HOW
                self._refuse(node, f"could not say which client it is ({said}); {remedy}")
            elif (client := _said(reply)) is None:
                self._refuse(node, f"answered without a client's id, a text of at most {LONGEST_ID} characters; {HOW}")
            elif self.expected is not None and client not in self.expected:
                ids = ", ".join(sorted(self.expected, key=by_number))
                self._refuse(node, f"says that it is client '{as_line(client)}', which is none of {ids}", wrong=False)
            else:
                self.clients[node] = client

    def _refuse(self, node: int, why: str, wrong: bool = True) -> None:
        self.clients.pop(node, None)
        self.refused[node] = f"node {node} {why}", wrong
        if self.refused[node][0] not in self._warned:
            self._warned.add(self.refused[node][0])
            log.warning("%s: it takes no part", self.refused[node][0])

    def wrong(self) -> list[str]:
        """What is wrong with nodes that were refused, one sentence each."""
        return [why for why, wrong in self.refused.values() if wrong]

    def wait(self, count: int = 1, clients: Collection[str] = (), strict: bool = True) -> dict[int, str]:
        """Wait until enough nodes are there, at most `timeout` seconds.

        Args:
            count: how many clients must be there.
            clients: those that must.
            strict: refuse a federation with a node that something is wrong with.

        Raises:
            TraceFLError: they are not there; the message names who is.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            found = self.refresh()
            missing = [client for client in clients if client not in found.values()]
            if len(found) >= count and not missing:
                break
            if time.monotonic() >= deadline or self.wrong():
                there = ", ".join(f"{client} (node {node})" for node, client in found.items()) or "none"
                least = f"clients {', '.join(missing)} are missing" if missing else f"at least {count} are needed"
                told = f"the connected clients are {there}; {least}"
                raise TraceFLError(f"{told}{reasons(self.refused)}: start one node per client")
            time.sleep(max(grid_module.PULL_INTERVAL_S, 0.01))
        problems = self.wrong()
        go_on = "correct it, or set accept_failures=true to go on without it"
        more = f"; and {len(problems) - MOST_REASONS} more" * (len(problems) > MOST_REASONS)
        require(not (strict and problems), f"{'; '.join(problems[:MOST_REASONS])}{more}: {go_on}")
        return found

    def node_of(self, client: str) -> int | None:
        """The node that is a client, or None."""
        return next((node for node, name in self.clients.items() if name == client), None)


class KnownNodes:
    """Nodes whose clients are known from the start and do not change: nobody is asked.

    Args:
        clients: node id -> client id.
    """

    def __init__(self, clients: dict[int, str]) -> None:
        self.clients = clients
        self.refused: dict[int, tuple[str, bool]] = {}

    def refresh(self, again: Iterable[int] = (), retry: bool = False) -> dict[int, str]:
        """As of `Nodes`; nothing has changed."""
        return self.clients

    def wait(self, count: int = 1, clients: Collection[str] = (), strict: bool = True) -> dict[int, str]:
        """As of `Nodes`; they are there."""
        return self.clients

    def node_of(self, client: str) -> int | None:
        """The node that is a client, or None."""
        return next((node for node, name in self.clients.items() if name == client), None)


def _said(reply: Message) -> str | None:
    """The client's id in an answer; an answer of an earlier version has "partition-id"."""
    records = reply.content.config_records.values() if reply.has_content() else ()
    ids = [str(cast(str, record[key])) for record in records for key in ("client", KEY) if key in record]
    return next((client for client in ids if 0 < len(client) <= LONGEST_ID and _is_unicode(client)), None)


def _is_unicode(text: str) -> bool:
    """Whether it can be written: half of a surrogate pair cannot."""
    return text == text.encode(errors="ignore").decode()


def reasons(refused: Mapping[int, tuple[str, bool]]) -> str:
    """Why nodes take no part, to end a sentence with; of many, some."""
    told, more = [f"; {why}" for why, _ in refused.values()], len(refused) - MOST_REASONS
    return "".join(told[:MOST_REASONS]) + f"; and {more} more nodes take no part" * (more > 0)


def by_number(client: str) -> tuple[int, str]:
    """The order of ids: those of digits by value."""
    return len(client), client
