"""Prepare a dataset once: partition, encode, and write a file per client and one for the server.

<storage.dir>/data/<dataset>-<hash>/
    data.json                 settings, class names, label counts of clients and of what no client
                              holds, SHA-256 of files
    server.safetensors        the head of the shuffled test split: labels int64 [N] and, of images,
                              pixels uint8 [N, C, 32, 32]; of texts, input_ids int32 [N, T] and
                              lengths int32 [N]
    tokenizer.json            of texts: what made the tokens
    clients/7.safetensors     the same for client 7
"""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from tracefl.config import Config
from tracefl.data.examples import Examples, count_labels, load_examples
from tracefl.errors import as_sentence, require
from tracefl.settings import data_settings, file_stamps, fingerprint

SCHEMA = 4


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

    def client(self, client_id: str) -> Examples:
        """The training examples of a client.

        Raises:
            TraceFLError: They are on the client's own machine only.
        """
        file = self.folder / "clients" / f"{client_id}.safetensors"
        away = f"client {client_id}'s examples are not in {self.folder}, but on its own machine"
        require(file.exists(), f"{away}: leave out faulty_clients_ids, whose clients are chosen by their examples")
        return load_examples(file)

    def server(self) -> Examples:
        """The test examples of the server."""
        return load_examples(self.folder / "server.safetensors")


def prepare(config: Config) -> PreparedData:
    """Prepare the data of a configuration, or open them if there and `check_dataset_cache`.

    Raises:
        TraceFLError: The data cannot be loaded, partitioned as asked or encoded for the model.
    """
    settings = data_settings(config) | {"schema": SCHEMA, "files": file_stamps(config.dataset.path)}
    name = config.dataset.name.rsplit("/", 1)[-1]
    folder = Path(config.storage.dir) / "data" / f"{name}-{fingerprint(settings)}"
    if not (config.check_dataset_cache and (folder / "data.json").exists()):
        _write(folder, config, settings)
    info = json.loads((folder / "data.json").read_text())
    label_counts, left_out = (
        {key: {int(label): n for label, n in labels.items()} for key, labels in info[counts].items()}
        for counts in ("label_counts", "left_out")
    )
    digest = hashlib.sha256(json.dumps(info["sha256"], sort_keys=True).encode()).hexdigest()
    text_model, notes = info["text_model"], tuple(info["notes"])
    return PreparedData(folder, info["class_names"], label_counts, digest, text_model, left_out, notes, info["sha256"])


def _write(folder: Path, config: Config, settings: dict[str, Any]) -> None:
    from tracefl.data.images import find_form, pixels  # take seconds to import; cached data do not need them
    from tracefl.data.sources import load_source

    source = load_source(config)
    from tracefl.data.partition import partition

    labels = source.labels(source.train)
    spread = partition(labels, config)
    clients = spread.clients
    limit = config.data_dist.max_server_data_size
    server = np.random.default_rng(config.seed).permutation(len(source.test))[: None if limit == -1 else limit]
    parts = {f"clients/{client}.safetensors": (source.train, rows) for client, rows in enumerate(clients)}
    parts = {"server.safetensors": (source.test, server), **parts}

    text_model: dict[str, Any] | None = None
    notes = list(source.notes())
    if source.is_text:
        from tracefl.data.text import text_encoder

        encode, tokenizer, text_model = text_encoder(source, config, np.concatenate(clients))
    else:
        form = find_form(source.train, source.input_columns[0], config.dataset.channels)
        notes += form.notes()
        encode = partial(pixels, form, source.input_columns[0])
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    with as_sentence(f"storage.dir={config.storage.dir} cannot be written to", "name another folder", OSError):
        (unfinished / "clients").mkdir(parents=True)
    try:
        sha256 = {}
        for file, (split, rows) in parts.items():
            encoded = encode(split, rows) | {"labels": torch.from_numpy(source.labels(split)[rows])}
            sha256[file] = _write_hashed(unfinished / file, save(encoded))
        if text_model:
            sha256["tokenizer.json"] = _write_hashed(unfinished / "tokenizer.json", tokenizer.encode())
        info = {
            "settings": settings,
            "class_names": source.class_names,
            "label_counts": {client: count_labels(labels[rows]) for client, rows in enumerate(clients)},
            "left_out": spread.left_out,
            "sha256": sha256,
            "text_model": text_model,
            "input_columns": source.input_columns,
            "label_column": source.label_column,
            "images": None if source.is_text else form.as_dict(),
            "notes": notes,
        }
        (unfinished / "data.json").write_text(json.dumps(info, indent=1))
        if not config.check_dataset_cache:
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # the folder exists: another process prepared the same data, and may use it
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_hashed(file: Path, content: bytes) -> str:
    file.write_bytes(content)
    return hashlib.sha256(content).hexdigest()
