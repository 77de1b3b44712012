"""What follows from the settings: the hash that names a run, and what identifies prepared data.

Every setting is hashed unless its field says `trains=False`. Those that have no effect beside the
others are left out, so that they do not ask for another run.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

from tracefl.config import Config, leaves

# What prepared data depend on beside dataset.* and data_dist.*, and for texts model.*
OF_DATA = ("seed", "num_clients", "dirichlet_alpha")
SINCE_0_1 = ("dataset.config", "dataset.test_share")
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
    left_out = ["client_cpus"]
    if config.data_dist.dist_type != "non_iid_dirichlet":
        left_out.append("dirichlet_alpha")
    left_out += [key for key in SINCE_0_1 if settings[key] is None]  # earlier runs keep their names
    if config.arch == "cnn":
        left_out.append("dataset.max_tokens")
    if not config.faulty_clients_ids:
        left_out.extend(OF_FAULTS)
    return {key: value for key, value in settings.items() if key not in left_out} | {
        "dataset.path": config.dataset.path and str(Path(config.dataset.path).resolve()),
        "model.files": file_stamps(config.model.path),
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
    """Name, bytes and time (ns) of every file of a folder, to notice another dataset or model."""
    files = sorted(visible_files(Path(path))) if path else []
    return [(str(file.relative_to(path or "")), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def visible_files(folder: Path) -> Iterator[Path]:
    """Files in a folder and its subfolders, but not in hidden ones and virtual environments."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "." and not Path(parent, name, "pyvenv.cfg").exists()]
        yield from (Path(parent, name) for name in files if Path(parent, name).is_file())
