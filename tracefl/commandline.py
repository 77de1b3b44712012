"""What the user typed, turned into what Hydra accepts.

- Flags such as --multirun and --cfg job may stand anywhere; Hydra wants them together.
- label2flip={8:7,0:7} without quotes arrives from bash as label2flip=8:7 label2flip=0:7.
- strategy.num_rounds=3 and the other aliases of config.py set num_rounds and so on.
- The original's keys that nothing reads are left out, and the user is told.
- A text that Hydra's grammar cannot read is quoted for it (quoting.py).
- A key that base.yaml lacks is added all the same (++): `checks.load` says what is wrong with it.
"""

import re
from collections.abc import Sequence
from typing import Any

from tracefl.config import ALIASES, WITHOUT_EFFECT, leaves
from tracefl.errors import require
from tracefl.quoting import readable

SETTINGS = {key: field.type for key, field in leaves()}
HYDRA_KNOWS = re.compile(r"[+~].*|hydra[./].*|scale")  # its own words: conf/scale is a group
MAPPINGS = {key for key, kind in SETTINGS.items() if kind is Any}
MULTIRUN = re.compile(r"--mu(l(t(i(r(un?)?)?)?)?)?")  # as argparse shortens it
PAIR = re.compile(r"[^{}\[\],:'\"]+:[^{}\[\],:]+")  # 8:7


def hydra_words(typed: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words for Hydra's own parser, and notes for the user.

    Args:
        typed: The words of the command line after the program's name.

    Raises:
        TraceFLError: A setting has two spellings with different values, a label is mapped twice, or
            a value is several without --multirun.

    Example:
        >>> hydra_words(["-m", "label2flip=8:7", "label2flip=0:7", "strategy.num_rounds=2,3"])
        (['label2flip={8:7,0:7}', 'num_rounds=2,3', '-m'], [])
    """
    given: dict[str, list[tuple[str, str]]] = {}  # setting -> what was typed for it: spelling and value
    flags: list[str] = []
    notes: list[str] = []
    for word in typed:
        key, equals, value = word.partition("=")
        spelling = key.lstrip("+")
        if word.startswith("-") or not equals:
            flags.append(word)  # or a flag's value
        elif spelling in WITHOUT_EFFECT:
            notes.append(f"{spelling} has no effect: nothing reads it")
        else:
            given.setdefault(ALIASES.get(spelling, key), []).append((spelling, value))
    multirun = any(flag in ("-m", "hydra.mode=MULTIRUN") or MULTIRUN.fullmatch(flag) for flag in typed)
    # Mappings come first, so that model.config.NAME=VALUE adds to model.config={...}.
    ordered = sorted(given, key=lambda key: key.lstrip("+") not in MAPPINGS)
    return [_word(key, given[key], multirun) for key in ordered] + flags, notes


def _word(key: str, given: list[tuple[str, str]], multirun: bool) -> str:
    """One word for all that was typed for a setting: the last value, or the pairs of a mapping."""
    spelling, value = given[-1]
    for other, its in given:
        same = other == spelling or its == value
        require(same, f"{other}={its} and {spelling}={value} set the same, differently: leave one out.")
    if key.lstrip("+") in MAPPINGS and PAIR.fullmatch(value):
        pairs = [pair for _, pair in given if PAIR.fullmatch(pair)]
        labels = [pair.split(":")[0] for pair in pairs]
        twice = {label for label in labels if labels.count(label) > 1}
        must = f"{key} must give one value for {', '.join(twice)}, got {', '.join(pairs)}"
        require(not twice, f"{must}: quote it, as '{key}={{8:7,0:7}}'.")
        value = f"{{{','.join(pairs)}}}"
    if (setting := key.lstrip("+")) in SETTINGS:
        value = readable(setting, SETTINGS[setting], value, multirun)
    added = "" if key in SETTINGS or HYDRA_KNOWS.fullmatch(key) else "++"
    return f"{added}{key}={value}"
