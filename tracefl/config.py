"""The typed schema of the configuration, and the checks that come before any work.

Values and their comments stand in conf/base.yaml; this file says what type each has and what is impossible.
"""

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError

from tracefl.errors import TraceFLError

IMAGE_MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "densenet121")
STRATEGIES = ("fedavg",)
METHODS = ("neuron", "influence")
DIST_TYPES = (
    "non_iid_dirichlet",
    *(f"PathologicalPartitioner-{n}" for n in (1, 2, 3)),
    *(f"sharded-non-iid-{n}" for n in (1, 2, 3)),
)
# Hub name of each dataset that the paper or its artifact calls by a short name.
HUB_NAMES = {
    "mnist": "ylecun/mnist",
    "cifar10": "uoft-cs/cifar10",
    "dbpedia_14": "fancyzhx/dbpedia_14",
    "yahoo_answers_topics": "community-datasets/yahoo_answers_topics",
}
MEDMNIST = ("pathmnist", "organamnist")
# Settings that leave the trained weights as they are; every other one is part of the run's hash.
NOT_TRAINING = frozenset(
    {
        *("exp_key", "storage", "total_cpus", "total_gpus", "round_timeout"),
        *("dry_run", "do_training", "do_provenance", "plotting", "convert_cache_to_csv"),
        *("check_dataset_cache", "check_train_cache", "check_prov_cache"),
        *("enable_beta", "client_weights_normalization", "parallel_processes", "provenance", "accept_failures"),
        *("neuron_activation_threshold", "faster_input_generation"),
    }
)
# Top-level names of what the groups strategy, data_dist and client_resources hold; the groups are what is read.
MIRRORED = frozenset(
    {
        *("num_clients", "clients_per_round", "num_rounds", "dirichlet_alpha", "batch_size"),
        *("noise_multiplier", "clipping_norm", "client_cpus", "client_gpu"),
    }
)


@dataclass
class Client:
    epochs: int
    lr: float


@dataclass
class ClientResources:
    cpus: float
    gpus: float


@dataclass
class Model:
    name: str
    arch: str | None
    pretrained: bool


@dataclass
class Dataset:
    name: str
    path: str | None
    num_classes: int | None
    channels: int | None
    input_columns: list[str]
    label_column: str | None
    train_split: str
    test_split: str


@dataclass
class Strategy:
    name: str
    num_rounds: int
    clients_per_round: int
    noise_multiplier: float
    clipping_norm: float


@dataclass
class DataDist:
    dist_type: str
    num_clients: int
    batch_size: int
    dirichlet_alpha: float
    dname: str
    mname: str
    storage_dir: str
    max_per_client_data_size: int
    max_server_data_size: int


@dataclass
class ProvenanceConfig:
    methods: list[str]
    inputs_per_label: int
    max_mispredictions: int


@dataclass
class Storage:
    dir: str


@dataclass
class Config:
    exp_key: str
    seed: int
    num_clients: int
    clients_per_round: int
    num_rounds: int
    dirichlet_alpha: float
    batch_size: int
    noise_multiplier: float
    clipping_norm: float
    total_cpus: int | None
    total_gpus: int | None
    client_cpus: float
    client_gpu: float
    client_resources: ClientResources
    device: str
    client: Client
    model: Model
    dataset: Dataset
    strategy: Strategy
    data_dist: DataDist
    faulty_clients_ids: list[int]
    label2flip: Any  # dict[int, int] or null: Hydra cannot fill a typed dict from the command line
    noise_rate: Any
    dry_run: bool
    do_training: bool
    do_provenance: bool
    check_dataset_cache: bool
    check_train_cache: bool
    check_prov_cache: bool
    plotting: bool
    convert_cache_to_csv: bool
    accept_failures: bool
    round_timeout: float
    enable_beta: bool
    client_weights_normalization: bool
    parallel_processes: int
    provenance: ProvenanceConfig
    neuron_activation_threshold: float
    faster_input_generation: bool
    storage: Storage


ConfigStore.instance().store(name="schema", node=Config)
OmegaConf.register_new_resolver(
    "default_lr", lambda name, path: 0.0003 if name == "digits" and not path else 0.001, replace=True
)


def load(composed: DictConfig) -> Config:
    """The composed configuration as a checked `Config`.

    Raises:
        TraceFLError: a value is impossible; the message names key, value and remedy.
    """
    plain = OmegaConf.to_container(composed, resolve=True)  # so that +key=value is held to the schema too
    try:
        config: Config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))  # type: ignore[assignment]
    except ConfigKeyError as error:
        raise TraceFLError(f"{error.full_key} is no setting of TraceFL: see tracefl/conf/base.yaml.") from error
    config.label2flip = _label_map(config.label2flip)
    if config.dataset.path and config.dataset.name == "digits":  # the bundled set comes from no folder
        config.dataset.name = Path(config.dataset.path).resolve().name
    _check(config)
    config.provenance.methods = [method for method in METHODS if method in config.provenance.methods]
    return config


def refuse_unbuilt(config: Config) -> None:
    """What parses, because the published artifact's users type it, but cannot be run yet.

    Raises:
        TraceFLError: the configuration asks for it.
    """
    unbuilt = {
        f"noise_multiplier={config.strategy.noise_multiplier}": config.strategy.noise_multiplier != -1,
        f"model.name={config.model.name}": config.model.name not in IMAGE_MODELS,
        f"dataset.name={config.dataset.name}": config.dataset.name in MEDMNIST,
    }
    for setting, asked in unbuilt.items():
        if asked:
            raise TraceFLError(
                f"{setting} cannot run yet: this version trains torchvision's image classifiers without differential "
                "privacy, on digits and on images from the hub or a folder; dry_run=true shows the configuration."
            )


def fingerprint(value: Any) -> str:
    """First 8 hex digits of the SHA-256 of `value` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def data_settings(config: Config) -> dict[str, Any]:
    """The settings on which the prepared data depend (paths resolved)."""
    dist, dataset = config.data_dist, config.dataset
    settings: dict[str, Any] = {
        "seed": config.seed,
        "dataset": {**vars(dataset), "path": dataset.path and str(Path(dataset.path).resolve())},
        "dist_type": dist.dist_type,
        "num_clients": dist.num_clients,
        "max_per_client_data_size": dist.max_per_client_data_size,
        "max_server_data_size": dist.max_server_data_size,
    }
    if dist.dist_type == "non_iid_dirichlet":
        settings["dirichlet_alpha"] = dist.dirichlet_alpha
    return settings


def training_settings(config: Config) -> dict[str, Any]:
    """Every setting that can change a trained weight: what the run's hash covers."""
    plain: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[assignment]
    own = plain.keys() - NOT_TRAINING - MIRRORED - {"dataset", "data_dist", "client_resources"}
    return {key: plain[key] for key in own} | {
        "data": data_settings(config),
        "batch_size": config.data_dist.batch_size,
        "threads": client_threads(config),
        "label2flip": sorted(config.label2flip.items()),
        "noise_rate": sorted(flip_rates(config).items()),
    }


def client_threads(config: Config) -> int:
    """Torch threads of a client: one per CPU that it is given. Another number sums in another order."""
    return max(1, int(config.client_resources.cpus))


def run_folder(config: Config) -> Path:
    """`<storage.dir>/<exp_key>-<hash>`: one folder per set of training settings."""
    return Path(config.storage.dir) / f"{config.exp_key}-{fingerprint(training_settings(config))}"


def flip_rates(config: Config) -> dict[int, float]:
    """Share of each flipped label's examples that is flipped, in [0, 1].

    The artifact's command lines repeat `label2flip` as `noise_rate` and mean all examples.
    """
    rate = config.noise_rate
    if rate == config.label2flip:
        return dict.fromkeys(config.label2flip, 1.0)
    if isinstance(rate, dict):
        return {label: float(rate.get(label, 1.0)) for label in config.label2flip}
    return dict.fromkeys(config.label2flip, float(rate))


def _require(holds: bool, key: str, value: Any, remedy: str) -> None:
    if not holds:
        raise TraceFLError(f"{key}={value} cannot be: {remedy}.")


def _check(c: Config) -> None:
    dist, strategy = c.data_dist, c.strategy
    at_least_one = {
        "num_clients": dist.num_clients,
        "clients_per_round": strategy.clients_per_round,
        "num_rounds": strategy.num_rounds,
        "batch_size": dist.batch_size,
        "client.epochs": c.client.epochs,
        "provenance.inputs_per_label": c.provenance.inputs_per_label,
        "provenance.max_mispredictions": c.provenance.max_mispredictions,
    }
    for key, count in at_least_one.items():
        _require(count >= 1, key, count, "give a whole number of at least 1")
    _require(
        strategy.clients_per_round <= dist.num_clients,
        "clients_per_round",
        strategy.clients_per_round,
        f"there are num_clients={dist.num_clients} clients; lower clients_per_round or raise num_clients",
    )
    positive = {
        "client.lr": c.client.lr,
        "client_cpus": c.client_resources.cpus,
        "round_timeout": c.round_timeout,
    }
    if dist.dist_type == "non_iid_dirichlet":
        positive["dirichlet_alpha"] = dist.dirichlet_alpha
    for key, number in positive.items():
        _require(number > 0 and math.isfinite(number), key, number, "give a number above 0")
    for key, size in {
        "data_dist.max_per_client_data_size": dist.max_per_client_data_size,
        "data_dist.max_server_data_size": dist.max_server_data_size,
        "parallel_processes": c.parallel_processes,
    }.items():
        _require(size == -1 or size >= 1, key, size, "give a whole number of at least 1, or -1 for no limit")
    for key, total in {"total_cpus": c.total_cpus, "total_gpus": c.total_gpus}.items():
        _require(total is None or total >= 1, key, total, "give at least 1, or null for all that there are")
    cpus = c.total_cpus or os.cpu_count() or 1
    _require(
        c.client_resources.cpus <= cpus or "RAY_ADDRESS" in os.environ,
        "client_cpus",
        c.client_resources.cpus,
        f"the simulation has {cpus} CPUs; lower it or raise total_cpus",
    )
    _require(c.client_resources.gpus >= 0, "client_gpu", c.client_resources.gpus, "give a share of a GPU, or 0")
    _require(c.dataset.channels in (None, 1, 3), "dataset.channels", c.dataset.channels, "give 1, 3 or null")
    classes = c.dataset.num_classes
    _require(classes is None or classes >= 2, "dataset.num_classes", classes, "give at least 2, or null")
    _one_of("data_dist.dist_type", dist.dist_type, DIST_TYPES)
    _one_of("strategy.name", strategy.name, STRATEGIES)
    _require(
        c.model.name in IMAGE_MODELS or "/" in c.model.name,
        "model.name",
        c.model.name,
        f"give one of {', '.join(IMAGE_MODELS)}, or a text classifier of the hub as 'owner/name'",
    )
    _require(bool(c.provenance.methods), "provenance.methods", [], f"name one of {', '.join(METHODS)}")
    private = (strategy.noise_multiplier, strategy.clipping_norm)
    _require(
        private == (-1, -1) or (private[0] >= 0 and private[1] > 0),
        "noise_multiplier and clipping_norm",
        private,
        "give a noise of at least 0 and a norm above 0, or -1 for both",
    )
    for method in c.provenance.methods:
        _one_of("provenance.methods", method, METHODS)
    _require(bool(re.fullmatch(r"cpu|cuda(:\d+)?", c.device)), "device", c.device, "give cpu, cuda or cuda:N")
    _require(
        bool(re.fullmatch(r"[\w.-]+", c.exp_key)),
        "exp_key",
        c.exp_key,
        "use letters, digits, dot, dash and underscore",
    )
    _require(c.seed >= 0, "seed", c.seed, "give a whole number of at least 0")
    _require(
        not c.dataset.path or Path(c.dataset.path).is_dir(),
        "dataset.path",
        c.dataset.path,
        "it is no folder; give one in the hub's layout, for example with train-*.parquet and test-*.parquet",
    )
    known = c.dataset.path or c.dataset.name in ("digits", *HUB_NAMES, *MEDMNIST) or "/" in c.dataset.name
    _require(
        bool(known),
        "dataset.name",
        c.dataset.name,
        f"known are digits, {', '.join((*HUB_NAMES, *MEDMNIST))}; give any other as 'owner/name' of the hub or by "
        "dataset.path",
    )
    _check_faults(c)


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, key, value, f"give one of {', '.join(allowed)}")


def _label_map(value: Any) -> dict[int, int]:
    try:
        return {int(label): int(target) for label, target in (value or {}).items()}
    except (AttributeError, TypeError, ValueError):
        raise TraceFLError(f"label2flip={value} cannot be: give labels as numbers, for example {{8:7,0:7}}.") from None


def _check_faults(c: Config) -> None:
    for client in c.faulty_clients_ids:
        _require(
            0 <= client < c.data_dist.num_clients,
            "faulty_clients_ids",
            c.faulty_clients_ids,
            f"clients are numbered 0 to {c.data_dist.num_clients - 1}",
        )
    _require(
        bool(c.faulty_clients_ids) == bool(c.label2flip),
        "faulty_clients_ids",
        c.faulty_clients_ids,
        f"it goes together with label2flip, which is {c.label2flip}; set both or neither",
    )
    is_rate = isinstance(c.noise_rate, (int, float)) and 0 <= c.noise_rate <= 1
    is_map = isinstance(c.noise_rate, dict) and (
        c.noise_rate == c.label2flip
        or all(
            label in c.label2flip and isinstance(rate, (int, float)) and 0 <= rate <= 1
            for label, rate in c.noise_rate.items()
        )
    )
    _require(
        is_rate or is_map,
        "noise_rate",
        c.noise_rate,
        "give a share from 0 to 1, or such a share for labels of label2flip",
    )
