"""What follows from the settings: the hash that names a run, and what identifies prepared data.

Every setting is hashed unless its field says `trains=False`. Those that have no effect beside the
others are left out, so that they do not ask for another run.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

from tracefl.config import Config, leaves

# What prepared data depend on beside dataset.* and data_dist.*, and for texts model.*
OF_DATA = ("seed", "num_clients", "dirichlet_alpha")
SINCE_0_1 = ("dataset.config", "dataset.test_share", "data_dist.min_examples_per_class", "exclude_clients")
OF_FAULTS = ("fault.kind", "fault.target", "label2flip", "noise_rate")


def fingerprint(value: Any) -> str:
    """First 8 hex digits of the SHA-256 of `value` as canonical JSON.

    Example:
        >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def training_settings(config: Config) -> dict[str, Any]:
    """Every setting that can change a trained weight, by its key: what the run's hash covers."""
    settings = {key: attrgetter(key)(config) for key, field in leaves() if field.metadata["trains"]}
    usual = Config()
    left_out = ["client_cpus"]
    if config.data_dist.dist_type != "non_iid_dirichlet":
        left_out.append("dirichlet_alpha")
    left_out += [key for key in SINCE_0_1 if settings[key] == attrgetter(key)(usual)]  # earlier runs keep their names
    if config.arch == "cnn":
        left_out.append("dataset.max_tokens")
    if not config.faulty_clients_ids:
        left_out.extend(OF_FAULTS)
    return {key: value for key, value in settings.items() if key not in left_out} | {
        "dataset.path": config.dataset.path and str(Path(config.dataset.path).resolve()),
        "model.files": model_stamps(config.model.path),
        "client_threads": client_threads(config),
    }


def data_settings(config: Config) -> dict[str, Any]:
    """The training settings on which the prepared data depend."""
    groups = ("dataset.", "data_dist.", "model.") if config.arch == "transformer" else ("dataset.", "data_dist.")
    settings = training_settings(config)
    return {key: value for key, value in settings.items() if key in OF_DATA or key.startswith(groups)}


def client_threads(config: Config) -> int:
    """Torch threads of a client, one per CPU. Another number would add floats in another order."""
    return max(1, int(config.client_cpus))


def run_folder(config: Config) -> Path:
    """`<storage.dir>/<exp_key>-<hash>`: one folder per set of training settings."""
    return Path(config.storage.dir) / f"{config.exp_key}-{fingerprint(training_settings(config))}"


def file_stamps(path: str | None) -> list[tuple[str, int, int]]:
    """Name, bytes and time (ns) of every file of a folder, to notice another dataset."""
    return _stamps(path, visible_files(Path(path))) if path else []


def model_stamps(path: str | None) -> list[tuple[str, int, int]]:
    """The same of a model's folder, whose subfolders are no part of the model."""
    files = (entry for entry in _entries(path) if entry.is_file() and entry.name[0] != ".") if path else []
    return _stamps(path or "", files)


def _stamps(path: str, files: Iterable[os.DirEntry[str]]) -> list[tuple[str, int, int]]:
    parent = os.path.join(path, "")
    stats = ((file.path.removeprefix(parent), file.stat()) for file in files)
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def visible_files(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """Files in a folder and its subfolders, but not in hidden ones and those of installed packages.

    A subfolder is read only when its files are asked for.
    """
    entries = _entries(folder)
    yield from (entry for entry in entries if _is_file(entry))
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and not (entry.name[0] == "." or installed(entry.path)):
            yield from visible_files(entry.path)


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file that can be looked at; a link to itself is none."""
    with suppress(OSError):
        return entry.is_file()
    return False


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What a folder holds; nothing if it cannot be read."""
    with suppress(OSError), os.scandir(folder) as found:
        return list(found)
    return []


def installed(folder: str | Path) -> bool:
    """Whether a folder holds installed packages: an environment of Python or conda, or a part."""
    marks = (Path(folder, mark) for mark in ("pyvenv.cfg", "conda-meta"))
    return Path(folder).name in ("node_modules", "site-packages", "__pycache__") or any(mark.exists() for mark in marks)
