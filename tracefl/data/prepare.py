"""Prepare a dataset once: partition, decode or tokenize, and write one file per client and one for the server.

<storage.dir>/data/<dataset>-<hash>/
    data.json                 settings, class names, label counts of every client, SHA-256 of every file
    server.safetensors        the head of the shuffled test split: labels int64 [N] and, of images, pixels uint8
                              [N, C, 32, 32]; of texts, input_ids int32 [N, T] and lengths int32 [N]
    tokenizer.json            of texts: what made the tokens
    clients/7.safetensors     the same for client 7
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from tracefl.config import Config, data_settings, fault_settings, file_stamps, fingerprint
from tracefl.data.examples import Examples, load_examples
from tracefl.data.faults import client_seed, faulty_examples
from tracefl.data.images import channels_of, encode_images
from tracefl.errors import TraceFLError

SCHEMA = 2


@dataclass(frozen=True)
class PreparedData:
    """A dataset on disk, ready for clients and server."""

    folder: Path
    class_names: list[str]
    label_counts: dict[str, dict[int, int]]  # client id -> label -> number of training examples
    digest: str  # SHA-256 over every file's SHA-256
    text_model: dict[str, Any] | None = None  # config of the text model that the tokens are for

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
        faulty = faulty_examples(self.client(client_id), fault_settings(config, self.num_classes), seed)
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
    settings = data_settings(config) | {"schema": SCHEMA, "files": file_stamps(config.dataset.path)}
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
    return PreparedData(folder, info["class_names"], counts, digest, info["text_model"])


def _write(folder: Path, config: Config, settings: dict[str, Any]) -> None:
    from tracefl.data.sources import load_source  # seconds of imports that cached data do not need

    source = load_source(config.dataset)
    if source.is_text != (config.arch == "transformer"):
        held, wanted = ("text", "image") if source.is_text else ("images", "text")
        raise TraceFLError(
            f"model.name={config.model.name} is a model for {wanted}s, but dataset.name={config.dataset.name} holds "
            f"{held} (column {source.input_columns[0]}): choose another model, for example "
            f"{'distilbert/distilbert-base-uncased' if source.is_text else 'resnet18'}."
        )
    from tracefl.data.partition import partition

    labels = source.labels(source.train)
    clients = partition(labels, config.data_dist, config.seed)
    limit = config.data_dist.max_server_data_size
    server = np.random.default_rng(config.seed).permutation(len(source.test))[: None if limit == -1 else limit]

    text_model: dict[str, Any] | None = None
    tokenizer = ""
    if source.is_text:
        from tracefl.data.text import text_encoder

        encode, tokenizer, text_model = text_encoder(source, config, np.concatenate(clients))
    else:
        encode = partial(encode_images, source, config.dataset.channels or channels_of(source))
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        (unfinished / "clients").mkdir(parents=True)
    except OSError as error:
        raise TraceFLError(f"storage.dir={config.storage.dir} cannot be written to ({error}): name another.") from error
    try:
        sha256 = {}
        for file, split, rows in [
            ("server.safetensors", source.test, server),
            *((f"clients/{client}.safetensors", source.train, rows) for client, rows in enumerate(clients)),
        ]:
            encoded = encode(split, rows) | {"labels": torch.from_numpy(source.labels(split.select(rows)))}
            sha256[file] = _write_hashed(unfinished / file, save(encoded))
        if text_model:
            sha256["tokenizer.json"] = _write_hashed(unfinished / "tokenizer.json", tokenizer.encode())
        info = {
            "settings": settings,
            "class_names": source.class_names,
            "label_counts": {
                str(client): {str(label): n for label, n in sorted(Counter(labels[rows].tolist()).items())}
                for client, rows in enumerate(clients)
            },
            "sha256": sha256,
            "text_model": text_model,
        }
        (unfinished / "data.json").write_text(json.dumps(info, indent=1))
        if not config.check_dataset_cache:
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # another process was faster with the same data: its folder may be in use already
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_hashed(file: Path, content: bytes) -> str:
    file.write_bytes(content)
    return hashlib.sha256(content).hexdigest()
