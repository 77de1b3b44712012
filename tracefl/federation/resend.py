"""A grid on which a task whose process died is sent again: only a client that dies twice fails.

The process may have died of its own client, or of what its machine does: too little memory, an
operator's kill, or a client that ran in it before.
"""

import logging
from collections.abc import Callable, Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from tracefl.federation.grid import GridView
from tracefl.federation.replies import DIED, as_line

log = logging.getLogger("tracefl")


class Resending(GridView):
    """Everything of `grid`; whoever pulls replies sees only how the second try ended.

    Args:
        grid: the grid that is viewed.
        who: node id -> how to call it in a warning.
    """

    def __init__(self, grid: Grid, who: Callable[[int], str] = "node {}".format) -> None:
        super().__init__(grid)
        self._who = who
        self._first: dict[str, Message] = {}  # id -> what was sent, until it is answered
        self._again: dict[str, str] = {}  # id -> that of the second try

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        ids = super().push_messages(messages)
        self._first |= {sent: message for sent, message in zip(ids, messages, strict=False) if sent}
        return ids

    def forget(self) -> None:
        """What was not answered by now is not sent again."""
        self._first.clear()
        self._again.clear()

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        waited = {self._again.get(sent, sent): sent for sent in message_ids}  # id of the last try -> of the first
        replies = []
        for reply in super().pull_messages(list(waited)):
            last = reply.metadata.reply_to_message_id
            sent = waited.get(last, last)
            task = self._first.pop(sent, None)
            if task is None or not _died(reply) or not self._send_again(sent, task, reply):
                reply.metadata.__dict__["_reply_to_message_id"] = sent
                replies.append(reply)
        return replies

    def _send_again(self, sent: str, task: Message, reply: Message) -> bool:
        """Whether the task could be sent once more."""
        about = task.metadata
        to, kind = about.dst_node_id, about.message_type
        message = Message(task.content, to, kind, ttl=about.ttl, group_id=about.group_id)
        again = next(iter(super().push_messages([message])), None)
        if not again:
            return False
        why = as_line(reply.error.reason)
        log.warning("%s: its process died (%s): the task is sent again", self._who(to), why)
        self._again[sent] = again
        return True


def _died(reply: Message) -> bool:
    return reply.has_error() and reply.error.code in DIED
