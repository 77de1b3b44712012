"""The settings of TraceFL, one line each: default, help, check, whether it changes the training.

    num_clients: int = setting(10, "clients of the federation", at_least(1))

A setting marked `trains=False` leaves the trained weights as they are; all others are part of the
run's hash (settings.py). checks.py applies the checks, and those that look at several settings.
conf/base.yaml and docs/settings.md are written from this file: python docs/write_settings.py
"""

# ruff: noqa: RUF009 (`setting` returns a dataclass field)
from collections.abc import Iterator
from copy import copy
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

from tracefl.rules import (
    DEVICE,
    ENTRIES,
    FILE_NAME,
    FOLDER,
    HOST_PORT,
    KEEP,
    LABELS,
    MODEL_FOLDER,
    NAMED,
    NUMBERS,
    PART,
    PLACE,
    Rule,
    above_0,
    at_least,
    between,
    integer,
    one_of,
    some_of,
)

IMAGE_MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "densenet121")
FAULTS = ("label_flip", "random_labels", "backdoor", "free_rider", "sign_flip")
TRACED_METHODS = ("neuron", "influence")  # in this order, the paper's first
SCOPES = ("round", "run")
DIST_TYPES = (
    "non_iid_dirichlet",
    *(f"{kind}-{n}" for kind in ("PathologicalPartitioner", "sharded-non-iid") for n in (1, 2, 3)),
)
# Hub name of each dataset that the paper or its artifact calls by a short name.
HUB_NAMES = {
    "mnist": "ylecun/mnist",
    "cifar10": "uoft-cs/cifar10",
    "dbpedia_14": "fancyzhx/dbpedia_14",
    "yahoo_answers_topics": "community-datasets/yahoo_answers_topics",
}
# Their columns that are joined to one text.
TEXT_COLUMNS = {
    "dbpedia_14": ["title", "content"],
    "yahoo_answers_topics": ["question_title", "question_content", "best_answer"],
}
# The 2-D sets of MedMNIST with one class per image.
MEDMNIST = (
    *("pathmnist", "dermamnist", "octmnist", "pneumoniamnist", "breastmnist", "bloodmnist", "tissuemnist"),
    *("organamnist", "organcmnist", "organsmnist"),
)
# Flower's strategies, and the arguments of each that strategy.options may set.
_ADAPTIVE = dict.fromkeys(("eta", "eta_l"), at_least(0, 10**6)) | {"tau": above_0(10**6)}  # it divides
_ADAM = _ADAPTIVE | dict.fromkeys(("beta_1", "beta_2"), between(0, 1))
_MALICIOUS = {"num_malicious_nodes": integer(0)}
STRATEGIES: dict[str, dict[str, Rule]] = {
    "fedavg": {},
    "fedprox": {"proximal_mu": at_least(0, 10**6)},
    "fedadam": _ADAM,
    "fedyogi": _ADAM,
    "fedadagrad": _ADAPTIVE,
    "fedavgm": dict.fromkeys(("server_learning_rate", "server_momentum"), at_least(0, 10**6)),
    "fedmedian": {},
    "fedtrimmedavg": {"beta": between(0, 0.5)},
    "krum": _MALICIOUS,
    "multikrum": _MALICIOUS | {"num_nodes_to_select": integer(1)},
    "bulyan": _MALICIOUS,
}
TRACKERS = ("tensorboard", "mlflow", "wandb")
TRACKING = Rule(
    f"name some of {', '.join(TRACKERS)}", lambda v: isinstance(v, list) and all(entry in TRACKERS for entry in v)
)
TYPES = ("float32", "float16", "bfloat16")
# The original has these settings twice. Either spelling is accepted, the second is stored.
ALIASES = {
    **{f"strategy.{key}": key for key in ("num_rounds", "clients_per_round", "noise_multiplier", "clipping_norm")},
    **{f"data_dist.{key}": key for key in ("num_clients", "batch_size", "dirichlet_alpha")},
    **{"client_resources.cpus": "client_cpus", "client_resources.gpus": "client_gpu"},
}
# Keys of the original that nothing reads: accepted, and the user is told so.
WITHOUT_EFFECT = ("data_dist.dname", "data_dist.mname", "data_dist.storage_dir")


def setting(default: Any, help: str, rule: Rule | None = None, *, trains: bool = True) -> Any:
    """A field of the schema.

    Args:
        default: Its value unless the user gives one. Null stands for what `help` says.
        help: What it does, in one line.
        rule: What a value must be, beyond the field's type; null is admitted if it is the default.
        trains: Whether it can change a trained weight; then it is part of the run's hash.
    """
    rule = rule.or_null() if rule and default is None else rule
    return field(default_factory=partial(copy, default), metadata={"help": help, "rule": rule, "trains": trains})


@dataclass
class Client:
    """How a client trains"""

    epochs: int = setting(2, "passes over a client's data in each round", at_least(1))
    lr: float | None = setting(None, "null: 0.001; on digits 0.0003; for pretrained text models 0.00005", above_0(1000))


@dataclass
class Model:
    """The model"""

    name: str = setting("resnet18", f"{', '.join(IMAGE_MODELS)}, or a text classifier of the hub as owner/name")
    arch: str | None = setting(None, "null: follows from the name", one_of(("cnn", "transformer")), trains=False)
    pretrained: bool = setting(False, "start from published weights: ImageNet's, or the text model's")
    path: str | None = setting(None, "folder of a Hugging Face text model, instead of the hub", MODEL_FOLDER)
    config: Any = setting(None, "of a text model's config, as model.config.num_hidden_layers=2", ENTRIES)
    tokenizer: str | None = setting(None, "null: own if weights are given, else trained", one_of(("own", "trained")))

    @property
    def has_weights(self) -> bool:
        """Whether training starts from published weights or those in a folder."""
        return self.pretrained or bool(self.path)

    @property
    def own_tokenizer(self) -> bool:
        """Whether the tokenizer comes with the model."""
        return self.tokenizer == "own" or (self.tokenizer is None and self.has_weights)


@dataclass
class Dataset:
    """The dataset"""

    name: str = setting("digits", f"digits, {', '.join((*HUB_NAMES, *MEDMNIST))}, or one of the hub as owner/name")
    path: str | None = setting(None, "folder in the hub's layout, instead of the hub", FOLDER)
    config: str | None = setting(None, "which of its configurations, where it has several")
    num_classes: int | None = setting(None, "null: as many as the data have", at_least(2, 100_000))
    channels: int | None = setting(None, "of an image; null: as the data have", one_of((1, 3)))
    input_columns: list[str] = setting([], "[]: the one image or text; the texts of several are joined")
    label_column: str | None = setting(None, "null: found from the data")
    train_split: str = setting("train", "split that is spread over the clients; or a slice, as train[:80%]", NAMED)
    test_split: str = setting("test", "split that the server evaluates and traces; or a slice, as train[80%:]", NAMED)
    test_share: float | None = setting(
        None, "of train_split, drawn by seed: the test examples of a set without any", PART
    )
    max_tokens: int = setting(128, "of a text; the rest is cut", at_least(1))


@dataclass
class Strategy:
    """How updates are aggregated"""

    name: str = setting("fedavg", "Flower's strategy", one_of(STRATEGIES))
    options: Any = setting(None, "its arguments, as strategy.options.proximal_mu=0.1", ENTRIES)


@dataclass
class DataDist:
    """How training examples are spread over the clients"""

    dist_type: str = setting("non_iid_dirichlet", "the distribution", one_of(DIST_TYPES))
    min_examples_per_class: int = setting(10, "a client drops classes of which it has fewer", at_least(1))
    max_per_client_data_size: int = setting(2048, "examples of a client", at_least(1).or_value(-1, "no limit"))
    max_server_data_size: int = setting(2048, "examples of the server", at_least(1).or_value(-1, "no limit"))


@dataclass
class Fault:
    """What the faulty clients do"""

    kind: str = setting("label_flip", "the fault: free_rider returns the model that it received", one_of(FAULTS))
    target: int = setting(0, "label that a backdoor's trigger leads to")


@dataclass
class ProvenanceConfig:
    """What is traced"""

    scope: str = setting(
        "round", "run: trace the last round's inputs over all rounds too", one_of(SCOPES), trains=False
    )
    proxies: int | None = setting(
        None, "clients of a round that scope=run trains for, for each client; null: all", at_least(1), trains=False
    )
    methods: list[str] = setting([*TRACED_METHODS], "the paper's and ours", some_of(TRACED_METHODS), trains=False)
    inputs_per_label: int = setting(2, "correct predictions per label, at least 10 in all", at_least(1), trains=False)
    max_mispredictions: int = setting(10, "of a round, where clients are faulty", at_least(1), trains=False)


@dataclass
class EvaluationConfig:
    """What the answers are held against"""

    coalitions: bool = setting(False, "true: Shapley values, from 2 K + 2 fusions of a round's K clients", trains=False)
    coalition_inputs: int = setting(20, "inputs of a round with Shapley values, at most", at_least(1), trains=False)


@dataclass
class Storage:
    """Where runs and prepared data are stored, and what is kept of the clients' states"""

    dir: str = setting("logs", "folder of all runs", PLACE, trains=False)
    keep: str = setting(
        "all", "clients' states: all, those of the last N rounds, or as differences", KEEP, trains=False
    )
    dtype: str = setting("float32", "what they are rounded to; float32: not at all", one_of(TYPES), trains=False)


@dataclass
class Ray:
    """An existing Ray cluster"""

    address: str | None = setting(None, "HOST:PORT of its head; null: start Ray here", HOST_PORT, trains=False)


@dataclass
class Config:
    """All settings."""

    exp_key: str = setting("tracefl", "start of the name of the run's folder", FILE_NAME, trains=False)
    seed: int = setting(0, "of everything that is drawn", between(0, 2**63))
    num_clients: int = setting(10, "clients of the federation", at_least(1))
    clients_per_round: int = setting(10, "clients that train in each round", at_least(1))
    exclude_clients: list[int] = setting([], "clients that never train, as [0,3]; the data stay as they are", NUMBERS)
    num_rounds: int = setting(5, "rounds of training", at_least(1))
    dirichlet_alpha: float = setting(0.3, "of non_iid_dirichlet; smaller: each client sees fewer classes")
    batch_size: int = setting(32, "examples in a training step of a client", at_least(1))

    noise_multiplier: float = setting(-1, "in units of the norm", at_least(0, 10**6).or_value(-1, "no privacy"))
    clipping_norm: float = setting(-1, "largest norm of a client's update", above_0(10**9).or_value(-1, "no privacy"))

    total_cpus: int | None = setting(None, "of the simulation; null: the machine's", at_least(1, 10_000), trains=False)
    total_gpus: int | None = setting(None, "of the simulation; null: the machine's", at_least(1, 10_000), trains=False)
    client_cpus: float = setting(1, "of one client; it uses one torch thread per CPU", above_0(10_000))
    client_gpu: float = setting(1, "share of a GPU of one client, with device=cuda", at_least(0, 1000), trains=False)
    device: str = setting("cpu", "what training and tracing run on", DEVICE)
    ray: Ray = field(default_factory=Ray)

    client: Client = field(default_factory=Client)
    model: Model = field(default_factory=Model)
    dataset: Dataset = field(default_factory=Dataset)
    strategy: Strategy = field(default_factory=Strategy)
    data_dist: DataDist = field(default_factory=DataDist)

    faulty_clients_ids: list[int] = setting([], "numbers of the faulty clients, as [0,3]", NUMBERS)
    fault: Fault = field(default_factory=Fault)
    # dict[int, int]; float or dict[int, float]
    label2flip: Any = setting(None, "labels that a faulty client flips: {8:7} turns 8 into 7", LABELS)
    noise_rate: Any = setting(1.0, "share of a faulty client's examples that is changed; {8:0.5}: of one flipped label")

    dry_run: bool = setting(False, "true: print what would run, and stop", trains=False)
    do_training: bool = setting(True, "false: use the recorded run", trains=False)
    do_provenance: bool = setting(True, "false: trace nothing", trains=False)
    check_dataset_cache: bool = setting(True, "false: prepare the data again", trains=False)
    check_train_cache: bool = setting(True, "false: train again", trains=False)
    check_prov_cache: bool = setting(True, "false: trace again", trains=False)
    plotting: bool = setting(False, "true: draw the run's figures", trains=False)
    report: bool = setting(True, "false: write no report.html", trains=False)
    tracking: list[str] | None = setting(
        None, "where metrics go; null: tensorboard, if it is installed; []: nowhere", TRACKING, trains=False
    )
    convert_cache_to_csv: bool = setting(False, "true: write provenance.csv too", trains=False)
    accept_failures: bool = setting(False, "true: record a client that failed, and go on without it", trains=False)
    round_timeout: float = setting(3600, "seconds until a silent client has failed", above_0(10**9), trains=False)

    enable_beta: bool = setting(True, "layer decay 0.9 (eq. 6); false: every layer counts the same", trains=False)
    client_weights_normalization: bool = setting(False, "true: multiply by p_k (eq. 5)", trains=False)
    parallel_processes: int = setting(
        -1, "threads that trace", at_least(1, 1024).or_value(-1, "all cores"), trains=False
    )
    provenance: ProvenanceConfig = field(default_factory=ProvenanceConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    do_audit: bool = setting(True, "false: no verdict on the clients; it needs do_provenance", trains=False)
    do_feddebug: bool = setting(True, "false: skip it; it needs faulty clients and images", trains=False)
    neuron_activation_threshold: float = setting(0.003, "of an active neuron", between(0, 1), trains=False)
    faster_input_generation: bool = setting(False, "true: take any inputs, also where clients disagree", trains=False)
    storage: Storage = field(default_factory=Storage)

    @property
    def arch(self) -> str:
        """The kind of model: "cnn" (torchvision, images) or "transformer" (Hugging Face, texts)."""
        return "cnn" if self.model.name in IMAGE_MODELS and not self.model.path else "transformer"


def leaves(schema: Any = Config, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Every setting as (key, field), groups opened, in the order of the schema.

    Example:
        >>> [key for key, _ in leaves(Config) if key.startswith("client.")]
        ['client.epochs', 'client.lr']
    """
    for entry in fields(schema):
        if is_dataclass(entry.type):
            yield from leaves(entry.type, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, entry
