"""run.json as text: one line a value, and the text of clients and rounds kept from save to save."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tracefl.errors import TraceFLError
from tracefl.record import ClientInfo, Round
from tracefl.sealed import KEY


class Text:
    """Writes run.json of one run, again and again. Clients and rounds are most of the work."""

    def __init__(self) -> None:
        self._kept: dict[str, list[tuple[Any, str]]] = {}

    def of(self, header: Mapping[str, Any], clients: Sequence[ClientInfo], rounds: Sequence[Round]) -> str:
        """run.json, not sealed yet, its entries in the order of `header`.

        Raises:
            TraceFLError: an entry is no plain JSON.
        """
        lists: dict[str, Sequence[ClientInfo | Round]] = {"clients": clients, "rounds": rounds}
        texts = {
            name: self._list(name, lists[name]) if name in lists else as_text(name, value, 1)
            for name, value in header.items()
            if name != KEY
        }
        return "{\n " + ",\n ".join(f"{json.dumps(name)}: {text}" for name, text in texts.items()) + "\n}"

    def _list(self, name: str, entries: Sequence[ClientInfo | Round]) -> str:
        kept, texts = self._kept.get(name, []), list[tuple[Any, str]]()
        for index, entry in enumerate(entries):
            if index < len(kept) and kept[index][0] is entry:
                texts.append(kept[index])
            else:
                value = entry.as_json() if isinstance(entry, Round) else asdict(entry)
                texts.append((entry, as_text(name, value, 2)))
        self._kept[name] = texts
        return "[\n  " + ",\n  ".join(text for _, text in texts) + "\n ]" if texts else "[]"


def as_text(name: str, value: Any, depth: int = 0) -> str:
    """A value of run.json as text, `depth` levels deep in it.

    Raises:
        TraceFLError: it is no plain JSON; the message calls it `name`.
    """
    try:
        return json.dumps(value, indent=1, allow_nan=False).replace("\n", "\n" + " " * depth)
    except (TypeError, ValueError) as error:
        plain = "must be plain JSON: numbers, strings, lists and dicts"
        raise TraceFLError(f"run.json's entry '{name}' {plain} ({error})") from None


def as_read(name: str, value: Any) -> Any:
    """A value of run.json as a reader will find it."""
    return json.loads(as_text(name, value))
