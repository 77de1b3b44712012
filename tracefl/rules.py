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


def whole_number(name: str) -> int | None:
    """The whole number that a class is named by, if it is.

    Example:
        >>> whole_number("10"), whole_number("2.0"), whole_number("cat")
        (10, 2, None)
    """
    return int(name.partition(".")[0]) if WHOLE.fullmatch(name) else None


def at_least(least: float) -> Rule:
    """A finite number of at least `least`."""
    return Rule(f"be at least {least}", lambda v: is_number(v) and v >= least)


def integer(least: int) -> Rule:
    """A whole number of at least `least`, for values whose type the schema does not declare."""
    return Rule(f"be a whole number of at least {least}", lambda v: isinstance(v, int) and at_least(least).holds(v))


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
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _is_host_port(value: Any) -> bool:
    host, _, port = str(value).rpartition(":")
    named = re.fullmatch(r"[A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\]", host)
    return bool(named and re.fullmatch("[0-9]{1,5}", port)) and 0 < int(port) < 2**16


HOST_PORT = Rule("be HOST:PORT, as 10.0.0.1:6379", _is_host_port)
POSITIVE = Rule("be above 0", lambda v: is_number(v) and v > 0)
SHARE = Rule("be a share from 0 to 1", lambda v: is_number(v) and 0 <= v <= 1)
FOLDER = Rule("be a folder that exists", lambda v: not v or Path(v).is_dir())
MODEL_FOLDER = Rule(
    "hold config.json, as save_pretrained writes it for a model of transformers",
    lambda v: not v or _names_a_model(Path(v, "config.json")),
)
