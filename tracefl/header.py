"""What run.json must hold: types, ranges, weights that add up, rounds 1 to n, files in their place.

The same is asked for when a run is opened and when something is added to it. A sentence names the
entry as `rounds[2].clients[0].weight`, its value, and what to do.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from tracefl.errors import require
from tracefl.files import file_stem
from tracefl.record import ClientInfo, Participant, Round
from tracefl.rules import Rule
from tracefl.sealed import KEY
from tracefl.storage import Storing

SCHEMA = 4  # with `KEY`, a hash of the header
STORED_SINCE = 3  # clients' states may be gone, differences or rounded
READABLE = (1, 2, STORED_SINCE, SCHEMA)  # 1: without the order of entries and metrics, always with predictions
SOURCES = ("strategy", "models", "assumed")  # of weights
KINDS = ("train", "evaluate", "server")  # of metrics
TOLERANCE = 1e-4  # of the sum of weights, which may be single-precision numbers


def is_label(key: Any) -> bool:
    """Whether a JSON key is a whole number, written as Python writes it."""
    return isinstance(key, str) and bool(re.fullmatch(r"0|-?[1-9][0-9]{0,17}", key))


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < 2**63
    return type(value) is float or value in ("inf", "-inf", "nan")


def _is_metric(value: Any) -> bool:
    return _is_number(value) or (isinstance(value, list) and all(map(_is_number, value)))


def _is_share(value: Any) -> bool:
    return value == "nan" or (_is_number(value) and (math.isnan(float(value)) or 0 <= float(value) <= 1))


def _is_relative(value: Any) -> bool:
    return isinstance(value, str) and not (PurePosixPath(value).is_absolute() or PureWindowsPath(value).drive)


def _lists(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(holds, value))


def _dicts(holds: Callable[[Any], bool], keys: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(holds, value.values())) and all(map(keys, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


WHOLE = Rule("be a whole number of at least 0", _is_whole)
NUMBER = Rule("be a number", _is_number)
TEXT = Rule("be text", _is_text)
TEXTS = Rule("be a list of texts", _lists(_is_text))
NAMES = Rule("be a list of texts, each once", lambda v: TEXTS.holds(v) and len(set(v)) == len(v))
LIST = Rule("be a list", lambda v: isinstance(v, list))
OBJECT = Rule("be an object", lambda v: isinstance(v, dict))
SHA256 = Rule("be a SHA-256, 64 hex digits", lambda v: isinstance(v, str) and bool(re.fullmatch("[0-9a-f]{64}", v)))
SHARE = Rule("be a share from 0 to 1", lambda v: _is_number(v) and -TOLERANCE <= float(v) <= 1 + TOLERANCE)
COUNTS = Rule("hold whole numbers of at least 0 by label, a whole number", _dicts(_is_whole, is_label))
ACCURACY = Rule("be a share from 0 to 1", _is_share).or_null()  # where it is ours
METRICS = Rule("hold numbers or lists of numbers by name", _dicts(_is_metric, _is_text)).or_null()
FLAG = Rule("be true or false", lambda v: isinstance(v, bool))
HEADER = {  # entries that a run may lack
    "seed": Rule("be a whole number below 2**64", lambda v: type(v) is int and -(2**63) <= v < 2**64),
    "data_sha256": SHA256,
    "data_folder": Rule("be a path from the run's folder", _is_relative),
    "class_names": TEXTS,
    "model": OBJECT,
    "settings": OBJECT,
    "strategy": OBJECT,
    "train_config": OBJECT,
    "clients_per_round": WHOLE.or_null(),
    "versions": Rule("hold texts by name", _dicts(_is_text, _is_text)),
    "entries": NAMES,
    "unsaved": NAMES,
    KEY: SHA256,
}
CLIENT = {
    "id": TEXT,
    "label_counts": COUNTS,
    "flipped_label_counts": COUNTS.or_null(),
    "fault": TEXT.or_null(),
}
PARTICIPANT = {
    "id": TEXT,
    "num_examples": WHOLE,
    "weight": SHARE,
    "file": TEXT,
    "sha256": SHA256,
}
ROUND = {
    "number": WHOLE,
    "clients": LIST,
    "global_sha256": SHA256,
    "predictions_sha256": SHA256.or_null(),
    "loss": NUMBER.or_null(),
    "accuracy": NUMBER.or_null(),
    "failures": Rule("hold texts by client", _dicts(_is_text, _is_text)),
    "strategy_sha256": SHA256.or_null(),
    "metrics": Rule(
        f"hold {', '.join(KINDS)}, each with numbers or lists of numbers by name",
        _dicts(METRICS.holds, lambda key: key in KINDS),
    ),
    "weights_from": Rule(f"be {', '.join(SOURCES)}", lambda v: v in SOURCES),
    "kept": FLAG,
}


@dataclass(frozen=True)
class Checker:
    """Checks entries of a run.json.

    Args:
        file: what a sentence begins with.
        remedy: what it ends with.
    """

    file: str
    remedy: str

    def require(self, holds: object, sentence: str) -> None:
        """Raise a TraceFLError, "FILE: SENTENCE: REMEDY", unless it holds."""
        require(holds, f"{self.file}: {sentence}: {self.remedy}")

    def entry(self, name: str, value: Any, rule: Rule) -> None:
        """One value."""
        if not rule.holds(value):
            self.require(False, f"{name} must {rule.must}, got {_short(value)}")

    def record(self, name: str, value: Any, rules: Mapping[str, Rule], kind: type | None = None) -> None:
        """An object; of a dataclass, it holds its fields and no others."""
        self.entry(name or "it", value, OBJECT)
        if kind is not None:
            known = _fields(kind)
            missing = [key for key, needed in known.items() if needed and key not in value]
            odd = [key for key in value if key not in known]
            self.require(not missing, f"{name} lacks {', '.join(missing)}")
            self.require(not odd, f"{name} has an unknown entry {_short(odd[:1])}")
        for key in value.keys() & rules.keys():
            if not rules[key].holds(value[key]):
                self.entry(f"{name}.{key}" if name else key, value[key], rules[key])

    def once(self, name: str, values: Iterable[str]) -> None:
        """Each value stands there once."""
        seen = set[str]()
        for value in values:
            self.require(value not in seen, f"{name}: client {_short(value)} is there twice")
            seen.add(value)

    def header(self, header: Mapping[str, Any]) -> None:
        """A whole header of a known schema."""
        schema = header["schema"]
        self.require((KEY in header) == (schema == SCHEMA), f"schema {schema} and {KEY} do not fit each other")
        self.record("", header, {"initial_sha256": SHA256, "clients": LIST, "rounds": LIST, **HEADER})
        missing = [key for key in ("initial_sha256", "clients", "rounds") if key not in header]
        self.require(not missing, f"it lacks {', '.join(missing)}")
        self.entry("initial_metrics", header.get("initial_metrics", {}), ROUND["metrics"])
        storing = self.storing(header) if schema >= STORED_SINCE else Storing()
        for index, client in enumerate(header["clients"]):
            self.client(f"clients[{index}]", client, len(header.get("class_names", [])))
        self.once("clients", [client["id"] for client in header["clients"]])
        ids, count = {client["id"] for client in header["clients"]}, len(header["rounds"])
        for index, record in enumerate(header["rounds"]):
            self.round(f"rounds[{index}]", record, index + 1, ids, ours="data_sha256" in header)
            kept = storing.rounds is None or index >= count - storing.rounds
            told = f"rounds[{index}].kept must be {str(kept).lower()} with storage.keep={storing.keep}"
            self.require(record.get("kept", True) == kept, told)

    def storing(self, header: Mapping[str, Any]) -> Storing:
        """The storage settings."""
        told = header.get("storage", {})
        known = isinstance(told, dict) and told.keys() <= vars(Storing()).keys() and all(map(_is_text, told.values()))
        self.require(known, f"storage must hold keep and dtype, got {_short(told)}")
        return Storing(**told)

    def client(self, name: str, client: Any, classes: int = 0) -> None:
        """What is said of a client; `classes` is how many there are, 0 if that is not known."""
        self.record(name, client, CLIENT, ClientInfo)
        labels = [*client.get("label_counts", {}), *(client.get("flipped_label_counts") or {})]
        odd = [label for label in labels if classes and not 0 <= int(label) < classes]
        self.require(not odd, f"{name}: labels must be 0 to {classes - 1}, as class_names says, got {odd[:1]}")

    def round(self, name: str, record: Any, number: int, ids: Collection[str], ours: bool) -> None:
        """A round that must have this number; `ids` are the run's clients, none if any may be.

        `ours`: its accuracy is of data that we have prepared; an app's own may be in percent.
        """
        self.record(name, record, ROUND | ({"accuracy": ACCURACY} if ours else {}), Round)
        self.require(record["number"] == number, f"{name}.number must be {number}, got {record['number']}")
        for index, client in enumerate(record["clients"]):
            self.participant(f"{name}.clients[{index}]", client)
        parts = {client["id"]: client["weight"] for client in record["clients"]}
        self.once(f"{name}.clients", [client["id"] for client in record["clients"]])
        failed = record.get("failures", {})
        odd = [client for client in (*parts, *failed) if ids and client not in ids]
        self.require(not odd, f"{name}: client {_short(odd[:1])} is none of the run's")
        both = [client for client in parts if client in failed]
        self.require(not both, f"{name}: client {_short(both[:1])} took part and failed")
        total = sum(float(weight) for weight in parts.values())
        adds = not any(parts.values()) or abs(total - 1) <= TOLERANCE
        self.require(adds, f"{name}: the clients' weights must add up to 1, or all be 0, got {total:g}")
        evaluated = {record[key] is None for key in ("predictions_sha256", "loss", "accuracy")}
        self.require(len(evaluated) == 1, f"{name} must have loss, accuracy and predictions_sha256, or none of them")

    def participant(self, name: str, client: Any) -> None:
        """A client's part in a round."""
        self.record(name, client, PARTICIPANT, Participant)
        place = f"clients/{file_stem(client['id'])}.safetensors"
        self.require(client["file"] == place, f"{name}.file must be {place}, got {_short(client['file'])}")


@cache
def _fields(kind: type) -> dict[str, bool]:
    """The names of a dataclass' fields that run.json holds, and whether it must hold them."""
    held = [each for each in fields(kind) if each.compare]
    return {each.name: each.default is MISSING and each.default_factory is MISSING for each in held}


def _short(value: Any) -> str:
    """A value as a sentence quotes it."""
    text = repr(value[0] if isinstance(value, list) and len(value) == 1 else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
