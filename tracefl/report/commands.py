"""The commands that give again what a page shows, as a shell takes them."""

import re
import shlex
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf

from tracefl.checks import load
from tracefl.config import Config, leaves
from tracefl.errors import TraceFLError

PLAIN = re.compile(r"(\.{0,2}/)*[A-Za-z_][\w./-]*", re.ASCII)
NO_TEXT = ("null", "true", "false", "nan", "inf", "yes", "no", "on", "off")  # in Hydra's or YAML's grammar
KEYS = tuple(key for key, _ in leaves())


def run_command(settings: Mapping[str, Any]) -> str:
    """The command line of a run: what differs from the defaults, and does not follow from the rest.

    Args:
        settings: of its config.yaml.

    Example:
        >>> print(run_command({"seed": 3, "storage": {"dir": "my runs"}}))
        python -m tracefl.main seed=3 'storage.dir='"'"'my runs'"'"''
    """
    wanted = {key: _at(settings, key) for key in KEYS if _has(settings, key)}
    try:
        chosen = _shortest(wanted)
    except TraceFLError:  # a folder of data that is gone, or an earlier version's settings
        usual = Config()
        chosen = {key: value for key, value in wanted.items() if value != attrgetter(key)(usual)}
    words = [shlex.quote(f"{key}={typed(value)}") for key, value in chosen.items()]
    return " ".join(["python -m tracefl.main", *words])


def _shortest(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that have to be given for all to be as wanted."""
    target, chosen = _loaded(wanted), dict[str, Any]()
    for _ in KEYS:  # what follows from one setting may be what another one would be without it
        got = _loaded(chosen)
        differing = [key for key in KEYS if got[key] != target[key]]
        if not differing:
            break
        chosen |= {key: wanted.get(key, target[key]) for key in differing if key not in chosen}
    for key in [key for key in chosen if attrgetter(key)(Config()) is None]:  # may follow from the rest
        fewer = {name: value for name, value in chosen.items() if name != key}
        try:
            chosen = fewer if _loaded(fewer) == target else chosen
        except TraceFLError:
            continue
    return {key: chosen[key] for key in KEYS if key in chosen}


def _loaded(some: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting, where some are given."""
    given = OmegaConf.create()
    for key, value in some.items():
        OmegaConf.update(given, key, value, force_add=True)
    try:
        config = load(given)
    except TraceFLError:
        if not some:
            raise
        plain = {key: attrgetter(key)(Config()) for key in KEYS}  # settings that need others
        return {**plain, **some}
    return {key: attrgetter(key)(config) for key in KEYS}


def typed(value: Any) -> str:
    """A value as Hydra's grammar has it.

    Example:
        >>> typed({8: 7}), typed([1, "a b"]), typed(None), typed("null"), typed(0.5)
        ('{8:7}', "[1,'a b']", 'null', "'null'", '0.5')
    """
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{typed(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(typed, value))}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str) and not (PLAIN.fullmatch(value) and value.lower() not in NO_TEXT):
        return QuotedString(value, Quote.single).with_quotes()
    return str(value)


def trace_command(folder: str) -> str:
    """The start of the command that traces a prediction of the run again.

    Example:
        >>> trace_command("logs/a run")
        "tracefl trace 'logs/a run'"
    """
    return shlex.join(["tracefl", "trace", folder])


def _has(settings: Mapping[str, Any], key: str) -> bool:
    group, _, name = key.rpartition(".")
    section = settings.get(group, {}) if group else settings
    return isinstance(section, Mapping) and name in section


def _at(settings: Mapping[str, Any], key: str) -> Any:
    group, _, name = key.rpartition(".")
    return settings[group][name] if group else settings[name]
