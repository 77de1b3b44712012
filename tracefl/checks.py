"""From a composed configuration to a checked one: what is impossible is refused by key, value and remedy."""

import math
import os
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError

from tracefl.config import DIST_TYPES, FAULTS, HUB_NAMES, IMAGE_MODELS, MEDMNIST, METHODS, STRATEGIES, Config
from tracefl.errors import TraceFLError


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
    config.model.config = _mapping("model.config", config.model.config)
    config.strategy.options = _mapping("strategy.options", config.strategy.options)
    if config.dataset.path and config.dataset.name == "digits":  # the bundled set comes from no folder
        config.dataset.name = Path(config.dataset.path).resolve().name
    _check_federation(config)
    _check_resources(config)
    _check_data_and_model(config)
    _check_faults(config)
    _check_provenance(config)
    config.provenance.methods = [method for method in METHODS if method in config.provenance.methods]
    return config


def _require(holds: bool, key: str, value: Any, remedy: str) -> None:
    if not holds:
        raise TraceFLError(f"{key}={value} cannot be: {remedy}.")


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, key, value, f"give one of {', '.join(allowed)}")


def _at_least_one(**counts: int) -> None:
    for key, count in counts.items():
        _require(count >= 1, key.replace("__", "."), count, "give a whole number of at least 1")


def _positive(**numbers: float) -> None:
    for key, number in numbers.items():
        _require(number > 0 and math.isfinite(number), key.replace("__", "."), number, "give a number above 0")


def _check_federation(c: Config) -> None:
    dist, strategy = c.data_dist, c.strategy
    _at_least_one(
        num_clients=dist.num_clients,
        clients_per_round=strategy.clients_per_round,
        num_rounds=strategy.num_rounds,
        batch_size=dist.batch_size,
        client__epochs=c.client.epochs,
    )
    _positive(client__lr=c.client.lr, round_timeout=c.round_timeout)
    _require(
        strategy.clients_per_round <= dist.num_clients,
        "clients_per_round",
        strategy.clients_per_round,
        f"there are num_clients={dist.num_clients} clients; lower clients_per_round or raise num_clients",
    )
    _one_of("data_dist.dist_type", dist.dist_type, DIST_TYPES)
    if dist.dist_type == "non_iid_dirichlet":
        _positive(dirichlet_alpha=dist.dirichlet_alpha)
    for key, size in {
        "data_dist.max_per_client_data_size": dist.max_per_client_data_size,
        "data_dist.max_server_data_size": dist.max_server_data_size,
    }.items():
        _require(size == -1 or size >= 1, key, size, "give a whole number of at least 1, or -1 for no limit")
    _one_of("strategy.name", strategy.name, tuple(STRATEGIES))
    _check_options(c)
    private = (strategy.noise_multiplier, strategy.clipping_norm)
    _require(
        private == (-1, -1) or (private[0] >= 0 and private[1] > 0),
        "noise_multiplier and clipping_norm",
        private,
        "give a noise of at least 0 and a norm above 0, or -1 for both",
    )
    _require(
        private == (-1, -1) or strategy.name == "fedavg",
        "strategy.name",
        strategy.name,
        "differential privacy needs the plain mean; set strategy.name=fedavg, or noise_multiplier=clipping_norm=-1",
    )
    _require(0 <= c.seed < 2**63, "seed", c.seed, "give a whole number of at least 0, below 2^63")
    named = bool(re.fullmatch(r"[\w.-]+", c.exp_key))
    _require(named, "exp_key", c.exp_key, "use letters, digits, dot, dash and underscore")


def _check_options(c: Config) -> None:
    name, options, K = c.strategy.name, c.strategy.options, c.strategy.clients_per_round
    for key, value in options.items():
        known = STRATEGIES[name]
        _require(key in known, f"strategy.options.{key}", value, f"{name} takes {', '.join(known) or 'no options'}")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
        _require(is_number, f"strategy.options.{key}", value, "give a number of at least 0")
    for key in ("num_malicious_nodes", "num_nodes_to_select"):
        chosen = options.get(key, 1)
        least = 1 if key == "num_nodes_to_select" else 0
        _require(
            isinstance(chosen, int) and least <= chosen <= K,
            f"strategy.options.{key}",
            chosen,
            "give a whole number of clients",
        )
    for key in ("beta_1", "beta_2"):
        _require(options.get(key, 0) < 1, f"strategy.options.{key}", options.get(key), "give a number below 1")
    more_than_fedavg = {"fedprox": ("proximal_mu",), "fedavgm": ("server_momentum", "server_learning_rate")}.get(name)
    _require(
        more_than_fedavg is None or any(options.get(key) for key in more_than_fedavg),
        "strategy.name",
        name,
        f"without strategy.options.{' or '.join(more_than_fedavg or ())} it is fedavg; set it above 0",
    )
    faulty = options.get("num_malicious_nodes", 0)
    least = {"krum": 2 * faulty + 3, "multikrum": 2 * faulty + 3, "bulyan": 4 * faulty + 3}.get(name, 1)
    _require(least <= K, "clients_per_round", K, f"{name} needs {least} updates for num_malicious_nodes={faulty}")
    beta = options.get("beta", 0.2)
    _require(name != "fedtrimmedavg" or beta < 0.5, "strategy.options.beta", beta, "give a share below 0.5")


def _check_resources(c: Config) -> None:
    _positive(client_cpus=c.client_resources.cpus)
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
    threads = c.parallel_processes
    _require(threads == -1 or threads >= 1, "parallel_processes", threads, "give at least 1, or -1 for all cores")
    _require(bool(re.fullmatch(r"cpu|cuda(:\d+)?", c.device)), "device", c.device, "give cpu, cuda or cuda:N")


def _check_data_and_model(c: Config) -> None:
    dataset, model = c.dataset, c.model
    classes = dataset.num_classes
    _require(classes is None or classes >= 2, "dataset.num_classes", classes, "give at least 2, or null")
    _require(dataset.channels in (None, 1, 3), "dataset.channels", dataset.channels, "give 1, 3 or null")
    _at_least_one(dataset__max_tokens=dataset.max_tokens)
    layout = "it is no folder; give one in the hub's layout, for example with train-*.parquet and test-*.parquet"
    _require(not dataset.path or Path(dataset.path).is_dir(), "dataset.path", dataset.path, layout)
    _require(
        bool(dataset.path) or dataset.name in ("digits", *HUB_NAMES, *MEDMNIST) or "/" in dataset.name,
        "dataset.name",
        dataset.name,
        f"known are digits, {', '.join((*HUB_NAMES, *MEDMNIST))}; give any other as 'owner/name' of the hub or by "
        "dataset.path",
    )
    _require(
        model.name in (*IMAGE_MODELS, "gpt2") or "/" in model.name or bool(model.path),
        "model.name",
        model.name,
        f"give one of {', '.join(IMAGE_MODELS)}, or a text classifier of the hub as 'owner/name', or its folder by "
        "model.path",
    )
    _require(not model.path or Path(model.path).is_dir(), "model.path", model.path, "it is no folder")
    vocabulary = model.config.get("vocab_size", 1)
    counts = isinstance(vocabulary, int) and vocabulary >= 1
    _require(counts, "model.config.vocab_size", vocabulary, "give a whole number of at least 1")
    _require(model.arch in (None, c.arch), "model.arch", model.arch, f"model.name={model.name} is a {c.arch}")
    _require(
        model.tokenizer in (None, "own", "trained"), "model.tokenizer", model.tokenizer, "give own, trained or null"
    )
    _require(
        model.tokenizer != "trained" or not model.has_weights,
        "model.tokenizer",
        model.tokenizer,
        "pretrained weights know their own tokens only; set model.tokenizer=own, or model.pretrained=false and no path",
    )
    text_only = model.config or model.tokenizer
    _require(
        not text_only or c.arch == "transformer",
        "model.config" if model.config else "model.tokenizer",
        text_only,
        f"model.name={model.name} is an image model, which has none; leave it out",
    )


def _check_faults(c: Config) -> None:
    for client in c.faulty_clients_ids:
        last = c.data_dist.num_clients - 1
        known = 0 <= client <= last
        _require(known, "faulty_clients_ids", c.faulty_clients_ids, f"clients are numbered 0 to {last}")
    _one_of("fault.kind", c.fault.kind, FAULTS)
    if c.fault.kind == "label_flip":
        _require(
            bool(c.faulty_clients_ids) == bool(c.label2flip),
            "faulty_clients_ids",
            c.faulty_clients_ids,
            f"it goes together with label2flip, which is {c.label2flip}; set both or neither",
        )
    else:
        _require(bool(c.faulty_clients_ids), "fault.kind", c.fault.kind, "name the faulty clients: faulty_clients_ids")
        _require(
            not c.label2flip, "label2flip", c.label2flip, f"fault.kind={c.fault.kind} flips no labels; leave it out"
        )
        _require(_is_share(c.noise_rate), "noise_rate", c.noise_rate, "give a share from 0 to 1")
    _require(
        c.fault.kind != "backdoor" or c.arch == "cnn" or c.dataset.max_tokens >= 2,
        "dataset.max_tokens",
        c.dataset.max_tokens,
        "a backdoor's trigger is the second token; give at least 2",
    )
    _require(c.fault.target >= 0, "fault.target", c.fault.target, "give a class, counted from 0")
    rate = c.noise_rate
    shares = rate.items() if isinstance(rate, dict) and rate != c.label2flip else []
    _require(
        (isinstance(rate, dict) or _is_share(rate))
        and all(label in c.label2flip and _is_share(share) for label, share in shares),
        "noise_rate",
        rate,
        "give a share from 0 to 1, or such a share for labels of label2flip",
    )


def _check_provenance(c: Config) -> None:
    _require(bool(c.provenance.methods), "provenance.methods", [], f"name one of {', '.join(METHODS)}")
    for method in c.provenance.methods:
        _one_of("provenance.methods", method, METHODS)
    _at_least_one(
        provenance__inputs_per_label=c.provenance.inputs_per_label,
        provenance__max_mispredictions=c.provenance.max_mispredictions,
    )
    threshold = c.neuron_activation_threshold
    _require(0 <= threshold < 1, "neuron_activation_threshold", threshold, "give a number from 0 to below 1")


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _mapping(key: str, value: Any) -> dict[str, Any]:
    _require(value is None or isinstance(value, dict), key, value, f"set its entries, for example {key}.NAME=VALUE")
    return dict(value or {})


def _label_map(value: Any) -> dict[int, int]:
    try:
        return {int(label): int(target) for label, target in (value or {}).items()}
    except (AttributeError, TypeError, ValueError):
        raise TraceFLError(f"label2flip={value} cannot be: give labels as numbers, for example {{8:7,0:7}}.") from None
