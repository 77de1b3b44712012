"""Prepared data as they are read: data.json ends with its own hash and holds that of every file.

    digest = SHA-256 over the SHA-256 of every file, by name: what a run records of its data

A file is compared whenever it is read. What is damaged is prepared again at the next start
(`prepare`), since the dataset and the settings are all that it depends on.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tracefl.data.examples import Examples, load_examples
from tracefl.errors import TraceFLError, as_sentence, require
from tracefl.files import read_file
from tracefl.header import COUNTS, OBJECT, SHA256, TEXT, TEXTS, Checker
from tracefl.sealed import KEY, read_sealed

AGAIN = "run the command again, which prepares the data again"
FILE = re.compile(r"server\.safetensors|tokenizer\.json|clients/[0-9]+\.safetensors")
BROKEN = (OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError)


@dataclass(frozen=True)
class PreparedData:
    """A dataset on disk, spread over the clients.

    Attributes:
        folder: Where its files are.
        class_names: Of the labels 0, 1, ...
        label_counts: Number of training examples by client and label.
        digest: SHA-256 over the SHA-256 of every file.
        sha256: Of every file, by its path in the folder.
        text_model: Of texts, the spec of the model that the tokens are for.
        left_out: Number of training examples that no client holds, by reason and label
            (`Partition.left_out`).
        notes: Lines for the user: which columns were used, and how images became bytes.
    """

    folder: Path
    class_names: list[str]
    label_counts: dict[str, dict[int, int]]
    digest: str
    text_model: dict[str, Any] | None = None
    left_out: dict[str, dict[int, int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @cached_property
    def files(self) -> list[Path]:
        """The files of examples that are here; clients' may be on their own machines."""
        files = [self.folder / name for name in self.sha256 if name.endswith(".safetensors")]
        return [file for file in files if file.exists()]

    def client(self, client_id: str) -> Examples:
        """The training examples of a client.

        Raises:
            TraceFLError: They are on the client's own machine only, or damaged.
        """
        file = self.folder / "clients" / f"{client_id}.safetensors"
        away = f"client {client_id}'s examples are not in {self.folder}, but on its own machine"
        require(file.exists(), f"{away}: leave out faulty_clients_ids, whose clients are chosen by their examples")
        return _read(self.folder, f"clients/{client_id}.safetensors", vars(self))

    def server(self) -> Examples:
        """The test examples of the server.

        Raises:
            TraceFLError: They are damaged.
        """
        return _read(self.folder, "server.safetensors", vars(self))


def digest_of(sha256: dict[str, str]) -> str:
    """SHA-256 over the SHA-256 of every file."""
    return hashlib.sha256(json.dumps(sha256, sort_keys=True).encode()).hexdigest()


def read_info(folder: Path) -> dict[str, Any]:
    """data.json of prepared data, its entries checked.

    Raises:
        TraceFLError: it is missing, damaged, or of an earlier version.
    """
    _, info = read_sealed(folder / "data.json", AGAIN)
    file = str(folder / "data.json")
    require(KEY in info, f"{file} is of an earlier version, without a hash: {AGAIN}")
    check = Checker(file, AGAIN)
    rules = {"settings": OBJECT, "sha256": OBJECT, "class_names": TEXTS, "label_counts": OBJECT, "left_out": OBJECT,
             "text_model": OBJECT.or_null(), "notes": TEXTS}  # fmt: skip
    check.record("", info, rules)
    check.require(rules.keys() <= info.keys(), f"it lacks {', '.join(rules.keys() - info.keys())}")
    for name, sha256 in info["sha256"].items():
        check.require(FILE.fullmatch(name), f"sha256 must name files of prepared data, got {name!r}")
        check.entry(f"sha256[{name!r}]", sha256, SHA256)
    for counts in ("label_counts", "left_out"):
        for name, of in info[counts].items():
            check.entry(f"{counts}[{name!r}]", of, COUNTS)
            check.entry(f"{counts}: a key", name, TEXT)
    clients = {f"clients/{client}.safetensors" for client in info["label_counts"]}
    needed = {"server.safetensors"} | clients
    check.require(needed <= info["sha256"].keys(), "sha256 must have the server's file and that of each client")
    return info


def open_prepared(folder: Path, settings: dict[str, Any] | None = None) -> PreparedData:
    """Prepared data, every file compared with its hash; the clients' may be away, all of them.

    Args:
        folder: where they are.
        settings: what they must have been prepared with; None: anything.

    Raises:
        TraceFLError: they are missing or damaged; the message names the file.
    """
    info = read_info(folder)
    other = f"{folder} was prepared with other settings than its name says: {AGAIN}"
    require(settings is None or info["settings"] == json.loads(json.dumps(settings)), other)
    hashes: dict[str, str] = info["sha256"]
    away = not any((folder / name).exists() for name in hashes if name.startswith("clients/"))
    for name, sha256 in hashes.items():
        if not (away and name.startswith("clients/")):
            _compare(folder / name, sha256)
    label_counts, left_out = (
        {key: {int(label): n for label, n in labels.items()} for key, labels in info[counts].items()}
        for counts in ("label_counts", "left_out")
    )
    return PreparedData(
        folder=folder,
        class_names=info["class_names"],
        label_counts=label_counts,
        digest=digest_of(hashes),
        text_model=info["text_model"],
        left_out=left_out,
        notes=tuple(info["notes"]),
        sha256=hashes,
    )


def info_of(folder: Path, digest: str | None) -> dict[str, Any]:
    """data.json of prepared data that have this digest; None: any.

    Raises:
        TraceFLError: it is missing or damaged, or the data are others.
    """
    info = read_info(folder)
    other = f"{folder} holds other data than the run was recorded with: put those back, or train again"
    require(digest in (None, digest_of(info["sha256"])), other)
    return info


def tokenizer_of(folder: Path, digest: str | None) -> Tokenizer:
    """The tokenizer of prepared texts that have this digest; None: any.

    Raises:
        TraceFLError: it is missing or damaged, or the data are others.
    """
    known, file = info_of(folder, digest)["sha256"].get("tokenizer.json"), folder / "tokenizer.json"
    content = read_file(file, AGAIN)
    same = hashlib.sha256(content).hexdigest() == known
    require(same, f"{file} is not what the texts were encoded by: {AGAIN}")
    with as_sentence(f"{file} is no tokenizer", AGAIN, Exception):
        return Tokenizer.from_str(content.decode())


def server_examples(folder: Path, digest: str | None) -> Examples:
    """The server's examples of prepared data that have this digest; None: any.

    Raises:
        TraceFLError: they are missing, damaged, or others.
    """
    return _read(folder, "server.safetensors", info_of(folder, digest))


def _read(folder: Path, name: str, info: Mapping[str, Any]) -> Examples:
    """The examples in a file, of whose data `info` has the hashes and the classes."""
    with as_sentence(f"{folder / name} cannot be read", AGAIN, *BROKEN):
        examples, classes = load_examples(folder / name, info["sha256"][name]), len(info["class_names"])
        known = ((examples.labels >= 0) & (examples.labels < classes)).all()
        require(known, f"{folder / name} has labels that are none of the {classes} classes: {AGAIN}")
        return examples


def _compare(file: Path, sha256: str) -> None:
    with as_sentence(f"{file} cannot be read", AGAIN, OSError):
        require(file.is_file(), f"{file} is missing, or no file: {AGAIN}")
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != sha256:
        raise TraceFLError(f"{file} is not as it was prepared: {AGAIN}")
