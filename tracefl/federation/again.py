"""A strategy and its replies as they are before it aggregates, so that it can aggregate again.

A strategy may keep something of every round, and change the replies that it is given. Flower's
strategies keep it in their attributes; another is given back its `state_dict()`, or must keep
nothing that changes.
"""

import copy
from collections.abc import Callable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp.strategy import Strategy

from tracefl.federation.memory import MOMENTS, OURS, arguments, fingerprints, keeps_state, parts


class Before:
    """What a strategy is given and keeps, as it is now.

    Args:
        strategy: about to aggregate.
        replies: what it will be given.
    """

    def __init__(self, strategy: Strategy, replies: list[Message]) -> None:
        self._strategy = strategy
        self._contents = [(reply, _copy(reply.content)) for reply in replies]
        self._back = [_way_back(part) for part in parts(strategy)]
        self._marks = fingerprints(strategy)

    def restore(self) -> str | None:
        """Give the replies and the strategy back what they had.

        Returns:
            "Class.attribute" of what has changed and cannot be given back; None: there is nothing.
        """
        for reply, content in self._contents:
            reply.content = content
        for back in self._back:
            back()
        now = fingerprints(self._strategy)
        changed = [name for name in {**now, **self._marks} if now.get(name) != self._marks.get(name)]
        return min(changed, default=None)


def _copy(content: RecordDict) -> RecordDict:
    """The same arrays and metrics in records of their own."""
    return RecordDict({name: record.copy() for name, record in content.items()})


def _way_back(part: Strategy) -> Callable[[], None]:
    """What gives a part of a strategy its present values, as far as they are known."""
    flowers = {*arguments(part), *MOMENTS, "current_arrays"}
    whole = type(part).__module__.startswith(OURS)
    own = {name: value for name, value in vars(part).items() if not _is_method(value)}
    kept = {name: _shallow(value) for name, value in own.items() if whole or name in flowers}
    state = copy.deepcopy(part.state_dict()) if keeps_state(part) else None  # type: ignore[attr-defined]

    def give_back() -> None:
        vars(part).update(kept)
        if state is not None:
            part.load_state_dict(state)  # type: ignore[attr-defined]

    return give_back


def _shallow(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, dict | list) else value


def _is_method(value: Any) -> bool:
    return callable(value) or isinstance(value, Strategy)
