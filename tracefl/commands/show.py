"""How an answer is printed: as tables, or as strict JSON."""

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.table import Table

SCHEMA = 1  # of every JSON answer
LEAST_WIDTH = 72  # of a table: on a narrower terminal its lines are broken
PIPED_WIDTH = 120  # columns where standard output is no terminal and COLUMNS is not set
Answer = dict[str, Any]


def print_json(answer: Answer) -> None:
    """An answer as strict JSON: a number that is not finite is null."""
    print(json.dumps(_strict({"schema": SCHEMA, **answer}), indent=1, allow_nan=False), flush=True)


def print_tables(parts: Iterable[Table | str]) -> None:
    """Tables and lines, as wide as the terminal; nothing in them is taken for markup."""
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else PIPED_WIDTH
    console = Console(width=width, markup=False, highlight=False, emoji=False)
    console.width = max(console.width, LEAST_WIDTH)
    for part in list(parts):
        console.print(part, soft_wrap=isinstance(part, str))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], words: Sequence[str] = ()) -> Table:
    """A table of these columns; those in `words` hold texts, which may be broken, else numbers."""
    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        text = column in words
        justify: JustifyMethod = "left" if text else "right"
        made.add_column(printable(column), justify=justify, overflow="fold", no_wrap=not text)
    for row in rows:
        made.add_row(*(printable(str(cell)) for cell in row))
    return made


def printable(text: str) -> str:
    """A text without what would steer a terminal.

    Example:
        >>> print(printable("Zürich \\x1b[31m"))
        Zürich \\x1b[31m
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def number(value: float | None, form: str = ".3g", unknown: str = "-") -> str:
    """A number in a form; `unknown` for None and NaN."""
    return unknown if value is None or math.isnan(value) else format(value, form)


def share(value: float | None) -> str:
    """A share in percent with one decimal; "-" if it is not known."""
    return number(None if value is None else 100 * value, ".1f")


def _strict(value: Any) -> Any:
    """JSON knows no infinity and no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(entry) for key, entry in value.items()}
    return [_strict(entry) for entry in value] if isinstance(value, list | tuple) else value
