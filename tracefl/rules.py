"""Conditions on one value, worded so that they complete "num_clients must ...".

A setting of config.py carries one; checks.py applies them.
"""

import json
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracefl.errors import TraceFLError

LONGEST = 4096  # characters of a text: of a path on Linux
LARGEST = 2**31 - 1  # of whole numbers, but for the seed
WHOLE = re.compile(r"[+-]?[0-9]+(\.0*)?")


@dataclass(frozen=True)
class Rule:
    """A condition on a value: `must` says it in words that follow "must", `holds` tests it.

    Example:
        >>> rule = at_least(1).or_value(-1, "all cores")
        >>> rule.must, rule.holds(-1), rule.holds(0)
        ('be at least 1, or -1 for all cores', True, False)
    """

    must: str
    holds: Callable[[Any], bool]

    def or_value(self, other: Any, meaning: str) -> "Rule":
        """This rule, or the value `other`, which stands for `meaning`."""
        return Rule(f"{self.must}, or {other} for {meaning}", lambda v: v == other or self.holds(v))

    def or_null(self) -> "Rule":
        """This rule, or null."""
        return Rule(f"{self.must}, or null", lambda v: v is None or self.holds(v))

    def check(self, key: str, value: Any) -> None:
        """Raise a TraceFLError, "num_clients must be at least 1, got 0", unless the rule holds."""
        if not self.holds(value):
            raise TraceFLError(f"{key} must {self.must}, got {value}.")


def is_number(value: Any) -> bool:
    """Whether the value is a finite int or float; true and false are no numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def whole_number(name: str) -> int | None:
    """The whole number that a class is named by, if it is.

    Example:
        >>> whole_number("10"), whole_number("2.0"), whole_number("cat")
        (10, 2, None)
    """
    return int(name.partition(".")[0]) if WHOLE.fullmatch(name) else None


def at_least(least: float, most: float | None = None) -> Rule:
    """A finite number of at least `least`, and at most `most`."""
    if most is None:
        return Rule(f"be at least {least}", lambda v: is_number(v) and v >= least)
    return Rule(f"be at least {least} and at most {most}", lambda v: is_number(v) and least <= v <= most)


def above_0(most: float) -> Rule:
    """A number above 0 and at most `most`."""
    return Rule(f"be above 0 and at most {most}", lambda v: is_number(v) and 0 < v <= most)


def integer(least: int) -> Rule:
    """A whole number of at least `least`, for values whose type the schema does not declare."""
    return Rule(f"be a whole number of at least {least}", lambda v: _is_whole(v) and v >= least)


def between(least: float, below: float) -> Rule:
    """A number of at least `least` that is smaller than `below`."""
    return Rule(f"be at least {least} and below {below}", lambda v: is_number(v) and least <= v < below)


def one_of(choices: Collection[Any]) -> Rule:
    """One of the choices."""
    return Rule(f"be one of {', '.join(map(str, choices))}", lambda v: v in choices)


def some_of(choices: Collection[str]) -> Rule:
    """A list of at least one entry, all of them among the choices."""
    return Rule(f"name one or more of {', '.join(choices)}", lambda v: bool(v) and all(entry in choices for entry in v))


def matches(pattern: str, words: str) -> Rule:
    """Text that matches a regular expression as a whole; `words` follow "must"."""
    return Rule(words, lambda v: bool(re.fullmatch(pattern, v)))


def _names_a_model(file: Path) -> bool:
    """Whether the file is there and says of which type the model is, as transformers needs it."""
    try:
        return isinstance(json.loads(file.read_text(encoding="utf-8"))["model_type"], str)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def _is_folder(value: str) -> bool:
    try:
        return Path(value).is_dir()
    except (OSError, ValueError):  # too long a name, a NUL
        return False


def impossible(value: Any) -> str:
    """What makes a value impossible wherever it stands, in words; "" if nothing does."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return next(filter(None, map(impossible, value)), "")
    if isinstance(value, str):
        too_long = len(value) > LONGEST
        return "hold no NUL character" if "\0" in value else f"be at most {LONGEST} characters" if too_long else ""
    return f"be between -{LARGEST} and {LARGEST}" if _is_whole(value) and abs(value) > LARGEST else ""


def _is_label(value: Any) -> bool:
    return re.fullmatch("-?[0-9]{1,18}", str(value)) is not None


def _is_host_port(value: Any) -> bool:
    host, _, port = str(value).rpartition(":")
    named = re.fullmatch(r"[A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\]", host)
    return bool(named and re.fullmatch("[0-9]{1,5}", port)) and 0 < int(port) < 2**16


HOST_PORT = Rule("be HOST:PORT, as 10.0.0.1:6379", _is_host_port)
SHARE = Rule("be a share from 0 to 1", lambda v: is_number(v) and 0 <= v <= 1)
FOLDER = Rule("be a folder that exists", lambda v: not v or _is_folder(v))
PLACE = Rule("be a folder's path, not empty and without ~", lambda v: bool(v.strip()) and v[0] != "~")
NAMED = Rule("not be empty", lambda v: bool(v.strip()))
NUMBERS = Rule("be whole numbers, as [0,3]", lambda v: all(map(_is_whole, v)))
ENTRIES = Rule("have entries, as {NAME:VALUE}", lambda v: isinstance(v, dict))
LABELS = Rule(
    "map labels to labels, as '{8:7,0:7}'",
    lambda v: isinstance(v, dict) and all(map(_is_label, (*v, *v.values()))),
)
PART = Rule("be a share above 0 and below 1", lambda v: is_number(v) and 0 < v < 1)
FILE_NAME = Rule(
    "consist of letters, digits, '.', '-' and '_', of which the first is no '.', in at most 200 bytes",
    lambda v: bool(re.fullmatch(r"[\w-][\w.-]*", v)) and len(v.encode()) <= 200,
)
KEEP = matches(r"all|deltas|last:[1-9][0-9]{0,8}", "be all, last:N with N of 1 or more, or deltas")
DEVICE = matches(r"cpu|cuda(:[0-9]{1,3})?", "be cpu, cuda or cuda:N")
MODEL_FOLDER = Rule(
    "hold config.json, as save_pretrained writes it for a model of transformers",
    lambda v: not v or _names_a_model(Path(v, "config.json")),
)
