"""Prepare a dataset once: partition, decode, resize, and write one file per client and one for the server.

<storage.dir>/data/<dataset>-<hash>/
    data.json                 settings, class names, label counts of every client, SHA-256 of every file
    server.safetensors        pixels uint8 [N, C, 32, 32], labels int64 [N]: the head of the shuffled test split
    clients/7.safetensors     the same for client 7
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from tracefl.config import Config, data_settings, fault_settings, fingerprint
from tracefl.data.examples import IMAGE_SIZE, Examples, load_examples
from tracefl.data.faults import client_seed, faulty_examples
from tracefl.errors import TraceFLError

if TYPE_CHECKING:
    from tracefl.data.sources import Source

SCHEMA = 1


@dataclass(frozen=True)
class PreparedData:
    """A dataset on disk, ready for clients and server."""

    folder: Path
    class_names: list[str]
    label_counts: dict[str, dict[int, int]]  # client id -> label -> number of training examples
    digest: str  # SHA-256 over every file's SHA-256

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def client(self, client_id: str) -> Examples:
        return load_examples(self.folder / "clients" / f"{client_id}.safetensors")

    def flipped_label_counts(self, config: Config, client_id: str) -> dict[int, int] | None:
        """Labels that a faulty client trains on; None for any other client, and for one whose labels stay."""
        if int(client_id) not in config.faulty_clients_ids or config.fault.kind in ("free_rider", "sign_flip"):
            return None
        seed = client_seed(config.seed, 0, int(client_id))
        faulty = faulty_examples(self.client(client_id), fault_settings(config), self.num_classes, seed)
        return dict(sorted(Counter(faulty.labels.tolist()).items()))

    def server(self) -> Examples:
        return load_examples(self.folder / "server.safetensors")


def prepare(config: Config) -> PreparedData:
    """The prepared data of this configuration, from the cache if `check_dataset_cache` and it is there.

    Raises:
        TraceFLError: the data cannot be had or cannot be partitioned as asked.
    """
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise TraceFLError(f"device={config.device} cannot be: torch sees no GPU on this machine; set device=cpu.")
    settings = data_settings(config) | {"schema": SCHEMA, "files": _file_stamps(config.dataset.path)}
    name = config.dataset.name.rsplit("/", 1)[-1]
    folder = Path(config.storage.dir) / "data" / f"{name}-{fingerprint(settings)}"
    if not (config.check_dataset_cache and (folder / "data.json").exists()):
        _write(folder, config, settings)
    info = json.loads((folder / "data.json").read_text())
    counts = {client: {int(label): n for label, n in labels.items()} for client, labels in info["label_counts"].items()}
    targets = config.label2flip.values()
    setting = f"label2flip={config.label2flip} flips"
    if config.fault.kind == "backdoor":
        targets, setting = [config.fault.target], f"fault.target={config.fault.target} leads"
    for target in targets:
        if not 0 <= target < len(info["class_names"]):
            raise TraceFLError(
                f"{setting} to label {target}, but {config.dataset.name} has labels 0 to "
                f"{len(info['class_names']) - 1}: choose a target among them."
            )
    digest = hashlib.sha256(json.dumps(info["sha256"], sort_keys=True).encode()).hexdigest()
    return PreparedData(folder, info["class_names"], counts, digest)


def _write(folder: Path, config: Config, settings: dict[str, Any]) -> None:
    from tracefl.data.sources import load_source  # seconds of imports that cached data do not need

    source = load_source(config.dataset)
    from tracefl.data.partition import partition

    labels = source.labels(source.train)
    clients = partition(labels, config.data_dist, config.seed)
    limit = config.data_dist.max_server_data_size
    server = np.random.default_rng(config.seed).permutation(len(source.test))[: None if limit == -1 else limit]

    channels = config.dataset.channels or _channels(source)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        (partial / "clients").mkdir(parents=True)
    except OSError as error:
        raise TraceFLError(f"storage.dir={config.storage.dir} cannot be written to ({error}): name another.") from error
    try:
        sha256 = {
            "server.safetensors": _save(partial / "server.safetensors", _encode(source, source.test, server, channels))
        }
        for client, rows in enumerate(clients):
            file = f"clients/{client}.safetensors"
            sha256[file] = _save(partial / file, _encode(source, source.train, rows, channels))
        info = {
            "settings": settings,
            "class_names": source.class_names,
            "label_counts": {
                str(client): {str(label): n for label, n in sorted(Counter(labels[rows].tolist()).items())}
                for client, rows in enumerate(clients)
            },
            "sha256": sha256,
        }
        (partial / "data.json").write_text(json.dumps(info, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        if not (folder / "data.json").exists():  # another process may have been faster
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _encode(source: "Source", split: Any, rows: np.ndarray, channels: int) -> dict[str, Tensor]:
    images = split.select(rows)[source.input_columns[0]]
    pixels = np.ascontiguousarray([_pixels(image, channels) for image in images])
    return {"pixels": torch.from_numpy(pixels), "labels": torch.from_numpy(source.labels(split.select(rows)))}


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    resized = image.convert("RGB" if channels == 3 else "L").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    return np.asarray(resized).reshape(IMAGE_SIZE, IMAGE_SIZE, channels).transpose(2, 0, 1)


def _channels(source: "Source") -> int:
    return 1 if source.train[0][source.input_columns[0]].mode in ("1", "L", "I", "I;16", "F") else 3


def _save(file: Path, tensors: dict[str, Tensor]) -> str:
    content = save(tensors)
    file.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def _file_stamps(path: str | None) -> list[tuple[str, int, int]]:
    """Name, size and time of every file of a local dataset: a change there prepares anew."""
    if not path:
        return []
    root = Path(path)
    stats = [(str(file.relative_to(root)), file.stat()) for file in sorted(root.rglob("*")) if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
