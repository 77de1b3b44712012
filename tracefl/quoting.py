"""Texts on the command line: what Hydra's grammar cannot read, or not as text, is quoted for it.

In that grammar a text with `=`, `(`, `#`, quotes or letters beyond ASCII has to be in quotes inside
of those that a shell takes away. Here 'dataset.path=/data/größe (1)' is enough. What stands for
something else in the grammar, such as [a] or a,b, is refused or left to it.
"""

import re
import shlex
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from tracefl.errors import TraceFLError

# An entry of a list or sweep: what is between commas that are not inside of quotes or brackets.
ENTRY = re.compile(r"""(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\[[^\]]*\]|[^,])+""", re.DOTALL)


def readable(key: str, kind: Any, value: str, multirun: bool) -> str:
    """The value of a setting as Hydra's grammar has it.

    Args:
        key: The setting.
        kind: Its type in the schema.
        value: What was typed for it.
        multirun: Whether a,b stands for two values.

    Raises:
        TraceFLError: The value is a list, a mapping or a sweep where a text is wanted, or a sweep
            without --multirun.

    Example:
        >>> readable("dataset.path", str, "/data/x=1 (a)", False)
        "'/data/x=1 (a)'"
        >>> readable("dataset.input_columns", list[str], "[größe,Text]", False)
        "['größe',Text]"
    """
    override = _read(value)
    is_text = kind in (str, str | None)
    if override is not None and override.is_sweep_override():
        if multirun:
            return value
        as_text = f", or quote it as one text: {_for_shell(f'{key}={_quoted(value)}')}" if is_text else ""
        raise TraceFLError(f"{key}={value} gives several values: add --multirun for a run of each{as_text}.")
    if kind == list[str]:
        return _each(value, _list) if override is None and multirun else _list(value)
    if not is_text:
        return value
    if override is not None and isinstance(override.value(), (list, dict)):
        raise TraceFLError(f"{key} must be text, got {value}: quote it, as {_for_shell(f'{key}={_quoted(value)}')}.")
    return _each(value, _text) if override is None and multirun else _text(value)


def _read(value: str) -> Override | None:
    """What Hydra makes of a value; None if it cannot read it."""
    try:
        return OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return None


def _text(value: str) -> str:
    """A text as it is, unless Hydra would read something else: no text, or less of it."""
    override = _read(value)
    read = override and override.value()
    shortened = value != value.strip() and value.strip()[:1] not in ("'", '"')
    return _quoted(value) if override is None or isinstance(read, (bool, int, float)) or shortened else value


def _list(value: str) -> str:
    """A list of texts in brackets, or what is none."""
    if _read(value) is not None:
        return value
    in_brackets = value.startswith("[") and value.endswith("]")
    return f"[{_each(value[1:-1], _text)}]" if in_brackets else _quoted(value)


def _each(value: str, change: Any) -> str:
    return ",".join(change(entry) for entry in ENTRY.findall(value))


def _quoted(value: str) -> str:
    return QuotedString(value, Quote.single).with_quotes()


def _for_shell(word: str) -> str:
    """The word as a POSIX shell takes it, in double quotes where that is enough."""
    return shlex.quote(word) if set(word) & {*'"$`\\!'} else f'"{word}"'
