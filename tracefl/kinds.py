"""Values of the kind that their setting takes, before OmegaConf turns some of them into others."""

from typing import Any, get_args

from tracefl.config import leaves
from tracefl.errors import require
from tracefl.rules import impossible

# What a setting takes, by the name of its type.
KINDS = {"list": "a list", "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
SHOWN = 60  # characters of a value that is too long


def check_kinds(plain: dict[str, Any]) -> None:
    """Refuse what is of another kind than its setting; empty text stands for null.

    Args:
        plain: What was given, by setting and group.

    Raises:
        TraceFLError: A value is of another kind, or impossible whatever the setting.
    """
    for key, field in leaves():
        group, _, name = key.rpartition(".")
        section = plain.get(group, {}) if group else plain
        require(isinstance(section, dict), f"{group}={section} sets a group of settings: set one, such as {key}.")
        if section.get(name) == "" and (type(None) in get_args(field.type) or field.type is Any):
            section[name] = None
        value, kind = section.get(name), next((words for name, words in KINDS.items() if name in str(field.type)), "")
        if value is None:
            continue
        must = impossible(value) if key != "seed" else ""
        require(not must, f"{key} must {must}, got {shown(value)}.")
        require(not kind or _is_of(kind, value), f"{key} must be {kind}, got {shown(value)}.")


def _is_of(kind: str, value: Any) -> bool:
    if kind == KINDS["list"]:
        return isinstance(value, list) and not any(isinstance(entry, list | dict | bool) for entry in value)
    if kind == KINDS["bool"] and isinstance(value, int | float):
        return value in (0, 1)
    return not isinstance(value, list | dict) and (kind == KINDS["str"] or not isinstance(value, bool))


def shown(value: Any) -> str:
    """A value as a message quotes it: not too long, and on one line."""
    text = "null" if value is None else str(value)
    return text if len(text) <= SHOWN and text.isprintable() else f"{text[:SHOWN]!r}..."
