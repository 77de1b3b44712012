"""What the user typed, turned into what Hydra accepts.

- Flags such as --multirun and --cfg job may stand anywhere; Hydra wants them together.
- label2flip={8:7,0:7} without quotes arrives from bash as label2flip=8:7 label2flip=0:7.
- strategy.num_rounds=3 and the other aliases of config.py set num_rounds and so on.
- The original's keys that nothing reads are left out, and the user is told.
"""

import re
from collections.abc import Sequence
from typing import Any

from tracefl.config import ALIASES, WITHOUT_EFFECT, leaves
from tracefl.errors import TraceFLError

# Hydra's flags that take a value; --info may.
WITH_VALUE = {
    *("--cfg", "-c", "--package", "-p", "--info", "-i", "--experimental-rerun"),
    *("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
}
MAPPINGS = {key for key, field in leaves() if field.type is Any}
OPEN_GROUPS = ("model.config.", "strategy.options.")  # any entry may be set, for which Hydra wants ++
PAIR = re.compile(r"[^{}\[\],:'\"]+:[^{}\[\],:]+")  # 8:7


def hydra_words(typed: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words for Hydra's own parser, and notes for the user.

    Args:
        typed: The words of the command line after the program's name.

    Raises:
        TraceFLError: A setting has two spellings with different values, or a label is mapped twice.

    Example:
        >>> hydra_words(["-m", "label2flip=8:7", "label2flip=0:7", "strategy.num_rounds=2,3"])
        (['label2flip={8:7,0:7}', 'num_rounds=2,3', '-m'], [])
    """
    overrides, flags = _split(typed)
    overrides, notes = _rename(_join_pairs(overrides))
    return [*(f"++{word}" if word.startswith(OPEN_GROUPS) else word for word in overrides), *flags], notes


def _split(typed: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides and flags; a value that belongs to a flag goes with it."""
    overrides: list[str] = []
    flags: list[str] = []
    previous = ""
    for word in typed:
        is_flag = word.startswith("-") or (previous in WITH_VALUE and "=" not in word)
        (flags if is_flag else overrides).append(word)
        previous = word
    return overrides, flags


def _join_pairs(words: list[str]) -> list[str]:
    """key=8:7 key=0:7 as key={8:7,0:7}, for settings that are mappings.

    Of several mappings the last one counts, as of other settings; Hydra would merge them. They come
    first, so that model.config.NAME=VALUE adds to model.config={...}.
    """
    pairs: dict[str, list[str]] = {}
    mappings: dict[str, str] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key.lstrip("+") in MAPPINGS:
            mappings[key] = word
            if PAIR.fullmatch(value):
                pairs.setdefault(key, []).append(value)
                mappings[key] = f"{key}={{{','.join(pairs[key])}}}"
    for key, values in pairs.items():
        names = [value.split(":")[0] for value in values]
        if twice := [name for name in names if names.count(name) > 1]:
            raise TraceFLError(
                f"{key} must give one value for {twice[0]}, got {', '.join(values)}: quote it, as '{key}={{8:7,0:7}}'."
            )
    return [*mappings.values(), *(word for word in words if word.partition("=")[0] not in mappings)]


def _rename(words: list[str]) -> tuple[list[str], list[str]]:
    """Aliases replaced by their settings, keys without effect left out, and notes about those."""
    renamed: list[str] = []
    notes: list[str] = []
    given: dict[str, tuple[str, str]] = {}  # setting -> its spelling and value
    for word in words:
        typed, equals, value = word.partition("=")
        key = typed.lstrip("+")
        if key in WITHOUT_EFFECT:
            notes.append(f"{key} has no effect: nothing reads it")
            continue
        name = ALIASES.get(key, key)
        spelling, other = given.setdefault(name, (key, value))
        if spelling != key and other != value:
            raise TraceFLError(f"{spelling}={other} and {key}={value} set the same, differently: leave one out.")
        renamed.append(f"{name}={value}" if key in ALIASES and equals else word)
    return renamed, notes
