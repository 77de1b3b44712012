"""Prepare a dataset once: partition, encode, and write a file per client and one for the server.

<storage.dir>/data/<dataset>-<hash>/
    data.json                 settings, class names, label counts of clients and of what no client
                              holds, SHA-256 of files and of itself; written last
    server.safetensors        the head of the shuffled test split: labels int64 [N] and, of images,
                              pixels uint8 [N, C, 32, 32]; of texts, input_ids int32 [N, T] and
                              lengths int32 [N]
    tokenizer.json            of texts: what made the tokens
    clients/7.safetensors     the same for client 7
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import Timeout
from safetensors.torch import save

from tracefl.config import Config
from tracefl.data.examples import count_labels
from tracefl.data.prepared import AGAIN, PreparedData, open_prepared
from tracefl.errors import TraceFLError, as_sentence
from tracefl.files import LOCK, PARTIAL, lock_of, make_folder, waiting, write_atomically
from tracefl.sealed import sealed
from tracefl.settings import data_settings, file_stamps, fingerprint

SCHEMA = 4
log = logging.getLogger("tracefl")


def prepare(config: Config) -> PreparedData:
    """Prepare the data of a configuration, or open them if there and `check_dataset_cache`.

    Data that are damaged are prepared again, which a line of `notes` says. One process prepares,
    and others wait for it.

    Raises:
        TraceFLError: The data cannot be loaded, partitioned as asked or encoded for the model.
    """
    settings = data_settings(config) | {"schema": SCHEMA, "files": file_stamps(config.dataset.path)}
    name = config.dataset.name.rsplit("/", 1)[-1]
    folder = Path(config.storage.dir) / "data" / f"{name}-{fingerprint(settings)}"
    sweep_unfinished(folder.parent, but=folder.name)
    if not config.check_dataset_cache:
        return _write(folder, config, settings, reuse=False)
    try:
        return open_prepared(folder, settings)
    except TraceFLError as damage:
        if not _is_there(folder / "data.json"):
            return _write(folder, config, settings)
        told = f"{folder} is prepared again: {str(damage).removesuffix(f': {AGAIN}').removesuffix(f': {AGAIN}.')}"
        log.warning(told)
        data = _write(folder, config, settings)
        return replace(data, notes=(told, *data.notes))


def _is_there(file: Path) -> bool:
    with suppress(OSError):
        return file.exists()
    return True


def _write(folder: Path, config: Config, settings: dict[str, Any], reuse: bool = True) -> PreparedData:
    """Prepare the data; with `reuse` not if another process has done so meanwhile."""
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
    info: dict[str, Any] = {
        "settings": settings,
        "class_names": source.class_names,
        "label_counts": {client: count_labels(labels[rows]) for client, rows in enumerate(clients)},
        "left_out": spread.left_out,
        "sha256": {},
        "text_model": text_model,
        "input_columns": source.input_columns,
        "label_column": source.label_column,
        "images": None if source.is_text else form.as_dict(),
        "notes": notes,
    }
    with as_sentence(f"storage.dir={config.storage.dir} cannot be written to", "name another folder", OSError):
        make_folder(folder)
    with waiting(folder), _all_or_nothing(folder):
        if reuse:
            with suppress(TraceFLError):
                return open_prepared(folder, settings)
        for file, (split, rows) in parts.items():
            encoded = encode(split, rows) | {"labels": torch.from_numpy(source.labels(split)[rows])}
            info["sha256"][file] = _write_hashed(folder / file, save(encoded))
        if text_model:
            info["sha256"]["tokenizer.json"] = _write_hashed(folder / "tokenizer.json", tokenizer.encode())
        write_atomically(folder / "data.json", sealed(json.dumps(info, indent=1)))
        return open_prepared(folder, settings)


@contextmanager
def _all_or_nothing(folder: Path) -> Iterator[None]:
    """What is not complete is removed if the block fails; what was complete stays."""
    try:
        yield
    except BaseException:
        if not _is_there(folder / "data.json"):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def sweep_unfinished(parent: Path, but: str) -> None:
    """Remove what processes that died while they prepared data have left, and nothing else.

    Args:
        parent: where prepared data are.
        but: the name of a folder to leave as it is.
    """
    for folder in parent.glob("*-????????"):
        with suppress(OSError, Timeout):
            if folder.name != but and (folder / LOCK).exists() and not (folder / "data.json").exists():
                with lock_of(folder).acquire(blocking=False):
                    if not (folder / "data.json").exists() and all(map(_is_ours, folder.iterdir())):
                        shutil.rmtree(folder)


def _is_ours(file: Path) -> bool:
    return file.name in (LOCK, "clients", "server.safetensors", "tokenizer.json") or file.name.endswith(PARTIAL)


def _write_hashed(file: Path, content: bytes) -> str:
    write_atomically(file, content)
    return hashlib.sha256(content).hexdigest()
