"""From a composed configuration to a checked one.

One loop holds each setting to its own rule (config.py); the rules of this file look at several.
Two checks need more than settings: `check_device` the machine, `check_targets` the prepared data.
"""

import difflib
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError

from tracefl.config import ALIASES, HUB_NAMES, IMAGE_MODELS, MEDMNIST, STRATEGIES, TRACED_METHODS, Config, leaves
from tracefl.errors import TraceFLError
from tracefl.rules import POSITIVE, SHARE, whole
from tracefl.settings import visible_files

# Kinds of files that the datasets library reads examples from, the usual ones.
TABLES = (".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt", ".xml", ".h5", ".hdf5")
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".lz4", ".7z")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def load(composed: DictConfig) -> Config:
    """Check a composed configuration, and fill in the values that follow from others.

    Args:
        composed: Of conf/base.yaml and the command line by Hydra, or a run's config.yaml.

    Raises:
        TraceFLError: A key is unknown or a value impossible; the message says what to do.
    """
    plain = OmegaConf.to_container(composed, resolve=True)  # so that +key=value is held to the schema too
    try:
        config: Config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))  # type: ignore[assignment]
    except ConfigKeyError as error:
        raise TraceFLError(unknown(str(error.full_key))) from error
    config.model.config = _entries("model.config", config.model.config)
    config.strategy.options = _entries("strategy.options", config.strategy.options)
    config.label2flip = _label_map(config.label2flip)
    if config.noise_rate == config.label2flip:  # this is how the artifact's command lines say "all of them"
        config.noise_rate = 1.0
    if config.dataset.path and config.dataset.name == "digits":  # a folder is not the bundled set
        config.dataset.name = Path(config.dataset.path).resolve().name
    if config.client.lr is None:
        config.client.lr = _usual_lr(config)

    for key, field in leaves():
        if rule := field.metadata["rule"]:
            rule.check(key, attrgetter(key)(config))
    if problem := next(
        chain(_federation(config), _strategy(config), _data(config), _model(config), _faults(config)), None
    ):
        raise TraceFLError(f"{problem}.")
    config.provenance.methods = [method for method in TRACED_METHODS if method in config.provenance.methods]
    return config


def check_device(config: Config) -> None:
    """Raise a TraceFLError if the run wants a GPU and torch sees none."""
    if config.device.startswith("cuda"):
        import torch  # takes seconds, so only where a GPU is asked for

        if not torch.cuda.is_available():
            raise TraceFLError(f"device must be cpu where torch sees no GPU, got {config.device}: set device=cpu.")


def check_targets(config: Config, class_names: Sequence[str]) -> None:
    """Raise a TraceFLError if a fault leads to a label that the prepared data do not have."""
    key, targets = "label2flip", config.label2flip.values()
    if config.fault.kind == "backdoor":
        key, targets = "fault.target", [config.fault.target]
    for target in targets:
        if not 0 <= target < len(class_names):
            raise TraceFLError(
                f"{key} must lead to a label of {config.dataset.name}, 0 to {len(class_names) - 1}, got {target}: "
                "choose one of those."
            )


def unknown(key: str) -> str:
    """The message for a key that is no setting, with the one that was probably meant."""
    known = [*(name for name, _ in leaves()), *ALIASES]
    near = ALIASES.get(key) or next(iter(difflib.get_close_matches(key, known, n=1)), "")
    return f"{key} is no setting of TraceFL: {near and f'did you mean {near}? '}All stand in tracefl/conf/base.yaml."


def _usual_lr(c: Config) -> float:
    if c.model.pretrained and c.model.name not in IMAGE_MODELS:
        return 0.00005
    return 0.0003 if c.dataset.name == "digits" and not c.dataset.path else 0.001


# Each of the following yields a sentence for everything that is wrong with a configuration c.


def _federation(c: Config) -> Iterator[str]:
    chosen, cpus = c.clients_per_round, c.total_cpus or os.cpu_count() or 1
    if chosen > c.num_clients:
        yield f"clients_per_round must be at most num_clients={c.num_clients}, got {chosen}: lower it, or raise that"
    if c.data_dist.dist_type == "non_iid_dirichlet":
        POSITIVE.check("dirichlet_alpha", c.dirichlet_alpha)
    if c.client_cpus > cpus and "RAY_ADDRESS" not in os.environ:
        yield f"client_cpus must be at most total_cpus={cpus}, got {c.client_cpus}: lower it or raise total_cpus"


def _strategy(c: Config) -> Iterator[str]:
    name, options, K = c.strategy.name, c.strategy.options, c.clients_per_round
    for key, value in options.items():
        if key not in STRATEGIES[name]:
            known = ", ".join(STRATEGIES[name]) or "no options"
            yield f"strategy.options.{key}={value} is unknown to {name}, which takes {known}: leave it out"
        STRATEGIES[name][key].check(f"strategy.options.{key}", value)
    if (chosen := options.get("num_nodes_to_select", 1)) > K:
        yield f"strategy.options.num_nodes_to_select must be at most clients_per_round={K}, got {chosen}: lower it"
    without = {"fedprox": ("proximal_mu",), "fedavgm": ("server_momentum", "server_learning_rate")}.get(name)
    if without and not any(options.get(key) for key in without):
        yield f"strategy.name={name} is fedavg without strategy.options.{' or '.join(without)}: set it above 0"
    faulty = options.get("num_malicious_nodes", 0)
    least = {"krum": 2 * faulty + 3, "multikrum": 2 * faulty + 3, "bulyan": 4 * faulty + 3}.get(name, 1)
    if least > K:
        yield f"clients_per_round must be at least {least} for {name} with num_malicious_nodes={faulty}, got {K}"
    noise, norm = c.noise_multiplier, c.clipping_norm
    if (noise == -1) != (norm == -1):
        yield f"noise_multiplier and clipping_norm must be set together, got {noise} and {norm}: set both or neither"
    if noise != -1 and name != "fedavg":
        yield f"strategy.name must be fedavg where noise_multiplier is set, got {name}: leave out one of them"


def _data(c: Config) -> Iterator[str]:
    name, path, known = c.dataset.name, c.dataset.path, ("digits", *HUB_NAMES, *MEDMNIST)
    if not path and name not in known and "/" not in name:
        yield (
            f"dataset.name must be one of {', '.join(known)}, or a name of the hub as owner/name, got {name}: "
            "correct it, or name a folder with dataset.path=FOLDER"
        )
    kinds = {*TABLES, *ARCHIVES, *IMAGES}
    if path and name not in MEDMNIST and not any(f.suffix.lower() in kinds for f in visible_files(Path(path))):
        yield (
            f"dataset.path must hold data in the hub's layout, such as train-*.parquet and test-*.parquet, got {path}: "
            "name another folder"
        )


def _model(c: Config) -> Iterator[str]:
    model = c.model
    if model.name not in (*IMAGE_MODELS, "gpt2") and "/" not in model.name and not model.path:
        yield (
            f"model.name must be one of {', '.join(IMAGE_MODELS)}, or a text classifier of the hub as owner/name, "
            f"got {model.name}: correct it, or name a folder with model.path=FOLDER"
        )
    if model.path and not Path(model.path, "config.json").is_file():
        yield f"model.path must hold config.json, as save_pretrained writes it, got {model.path}: name another folder"
    if model.arch not in (None, c.arch):
        yield f"model.arch must be {c.arch} for model.name={model.name}, got {model.arch}: leave it out"
    for key, value in {"model.config": model.config, "model.tokenizer": model.tokenizer}.items():
        if value and c.arch == "cnn":
            yield f"{key} must be that of a text model, got {value} for the image model {model.name}: leave it out"
    if "vocab_size" in model.config:
        whole(1).check("model.config.vocab_size", model.config["vocab_size"])
    if model.tokenizer == "trained" and model.has_weights:
        yield (
            "model.tokenizer must be own for published weights, which know no other tokens, got trained: set "
            "model.tokenizer=own, or model.pretrained=false and no model.path"
        )


def _faults(c: Config) -> Iterator[str]:
    clients, flips, kind, rate = c.faulty_clients_ids, c.label2flip, c.fault.kind, c.noise_rate
    if not set(clients) <= set(range(c.num_clients)):
        yield f"faulty_clients_ids must be 0 to {c.num_clients - 1}, got {clients}: correct it or raise num_clients"
    if kind == "label_flip" and bool(clients) != bool(flips):
        yield f"faulty_clients_ids and label2flip must be set together, got {clients} and {flips}: set both or neither"
    if kind != "label_flip" and not clients:
        yield f"faulty_clients_ids must name clients for fault.kind={kind}, got []: set it or leave out fault.kind"
    if kind != "label_flip" and flips:
        yield f"label2flip must be left out with fault.kind={kind}, which flips no labels, got {flips}"
    if kind == "backdoor" and c.arch == "transformer" and c.dataset.max_tokens < 2:
        yield "dataset.max_tokens must be at least 2 for a backdoor, whose trigger is the second token, got 1: raise it"
    by_label = rate if isinstance(rate, dict) and kind == "label_flip" else {}
    if unflipped := [label for label in by_label if label not in flips]:
        yield f"noise_rate must be set for labels of label2flip only, got {rate}: leave out {unflipped[0]}"
    for share in by_label.values() if by_label else [rate]:
        SHARE.check("noise_rate", share)


def _entries(key: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise TraceFLError(f"{key} must have entries, got {value}: write {key}.NAME=VALUE.")
    return dict(value or {})


def _label_map(value: Any) -> dict[int, int]:
    try:
        return {int(label): int(target) for label, target in (value or {}).items()}
    except (AttributeError, TypeError, ValueError):
        raise TraceFLError(f"label2flip must map labels to labels, got {value}: write '{{8:7,0:7}}'.") from None
