"""The typed schema of the configuration, and what follows from it.

Values and their comments stand in conf/base.yaml; this file says what type each has, checks.py what is impossible.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

IMAGE_MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "densenet121")
# Flower's strategies and the arguments of each that strategy.options may set.
SERVER_OPTIMIZER = ("eta", "eta_l", "beta_1", "beta_2", "tau")
STRATEGIES: dict[str, tuple[str, ...]] = {
    "fedavg": (),
    "fedprox": ("proximal_mu",),
    "fedadam": SERVER_OPTIMIZER,
    "fedyogi": SERVER_OPTIMIZER,
    "fedadagrad": ("eta", "eta_l", "tau"),
    "fedavgm": ("server_learning_rate", "server_momentum"),
    "fedmedian": (),
    "fedtrimmedavg": ("beta",),
    "krum": ("num_malicious_nodes",),
    "multikrum": ("num_malicious_nodes", "num_nodes_to_select"),
    "bulyan": ("num_malicious_nodes",),
}
FAULTS = ("label_flip", "random_labels", "backdoor", "free_rider", "sign_flip")
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
# The 2-D sets of MedMNIST with one class per image.
MEDMNIST = (
    *("pathmnist", "dermamnist", "octmnist", "pneumoniamnist", "breastmnist", "bloodmnist", "tissuemnist"),
    *("organamnist", "organcmnist", "organsmnist"),
)
# Settings that leave the trained weights as they are; every other one is part of the run's hash.
NOT_TRAINING = frozenset(
    {
        *("exp_key", "storage", "total_cpus", "total_gpus", "round_timeout"),
        *("dry_run", "do_training", "do_provenance", "plotting", "convert_cache_to_csv"),
        *("check_dataset_cache", "check_train_cache", "check_prov_cache"),
        *("enable_beta", "client_weights_normalization", "parallel_processes", "provenance", "accept_failures"),
        *("do_feddebug", "neuron_activation_threshold", "faster_input_generation"),
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
    path: str | None
    config: Any  # dict[str, Any] or null
    tokenizer: str | None

    @property
    def has_weights(self) -> bool:
        """Training starts from published weights or those in a folder, not from random ones."""
        return self.pretrained or bool(self.path)

    @property
    def own_tokenizer(self) -> bool:
        return self.tokenizer == "own" or (self.tokenizer is None and self.has_weights)


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
    max_tokens: int


@dataclass
class Strategy:
    name: str
    num_rounds: int
    clients_per_round: int
    noise_multiplier: float
    clipping_norm: float
    options: Any  # dict[str, Any] or null


@dataclass
class Fault:
    kind: str
    target: int


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
    fault: Fault
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
    do_feddebug: bool
    neuron_activation_threshold: float
    faster_input_generation: bool
    storage: Storage

    @property
    def arch(self) -> str:
        """What the model is: "cnn" (torchvision, for images) or "transformer" (Hugging Face, for text)."""
        return "cnn" if self.model.name in IMAGE_MODELS and not self.model.path else "transformer"


ConfigStore.instance().store(name="schema", node=Config)


def _default_lr(dataset: str, path: str | None, model: str, has_weights: bool) -> float:
    """0.001; less for the few bundled digits, and where a text model's published weights are fine-tuned."""
    if has_weights and model not in IMAGE_MODELS:
        return 0.00005
    return 0.0003 if dataset == "digits" and not path else 0.001


OmegaConf.register_new_resolver("default_lr", _default_lr, replace=True)


def fingerprint(value: Any) -> str:
    """First 8 hex digits of the SHA-256 of `value` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def data_settings(config: Config) -> dict[str, Any]:
    """The settings on which the prepared data depend (paths resolved): for texts also the model, which tokenizes."""
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
    if config.arch == "transformer":
        settings["model"] = vars(config.model) | {"files": file_stamps(config.model.path)}
    else:
        del settings["dataset"]["max_tokens"]
    return settings


def file_stamps(path: str | None) -> list[tuple[str, int, int]]:
    """Name, size and time of every file of a local folder: another content is another dataset or model."""
    if not path:
        return []
    root = Path(path)
    stats = [(str(file.relative_to(root)), file.stat()) for file in sorted(root.rglob("*")) if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def training_settings(config: Config) -> dict[str, Any]:
    """Every setting that can change a trained weight: what the run's hash covers."""
    plain: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[assignment]
    own = plain.keys() - NOT_TRAINING - MIRRORED - {"dataset", "data_dist", "client_resources"}
    return {key: plain[key] for key in own} | {
        "data": data_settings(config),
        "batch_size": config.data_dist.batch_size,
        "threads": client_threads(config),
        "label2flip": sorted(config.label2flip.items()),
        "noise_rate": config.noise_rate if config.fault.kind != "label_flip" else sorted(flip_rates(config).items()),
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


def fault_settings(config: Config, num_classes: int) -> dict[str, Any]:
    """All that a faulty client must know of its fault, as plain JSON; flips are (label, target, share)."""
    rates = flip_rates(config)
    return {
        "kind": config.fault.kind,
        "target": config.fault.target,
        "share": config.noise_rate,
        "num_classes": num_classes,
        "flips": [(label, target, rates[label]) for label, target in sorted(config.label2flip.items())],
    }
