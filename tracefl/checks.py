"""From a composed configuration to a checked one.

The schema says the type of each setting and its rule (config.py); the checks of this file look at
several. `numbered_labels` and `check_examples` need the data too; machine.py looks at the machine.
"""

import copy
import difflib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from tracefl.config import ALIASES, HUB_NAMES, IMAGE_MODELS, MEDMNIST, STRATEGIES, TRACED_METHODS, Config, Fault, leaves
from tracefl.errors import TraceFLError, first_line, require
from tracefl.kinds import KINDS, check_kinds, shown
from tracefl.rules import SHARE, above_0, integer, whole_number
from tracefl.settings import installed, visible_files

# Kinds of files that the datasets library reads examples from, the usual ones.
TABLES = (".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt", ".xml", ".h5", ".hdf5")
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".lz4", ".7z")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
PROJECT = ("pyproject.toml", "setup.py", "package.json")  # at the top of one
LOOKED_AT = 100_000  # files of a dataset's folder
AT_A_TIME = 1000  # clients that train, each in a process of its own
LONGEST_NAME = 200  # bytes of a dataset's name, which names a folder
HUB_NAME = re.compile(r"[A-Za-z0-9][\w-]*(\.[\w-]+)*/[\w-]+(\.[\w-]+)*")  # owner/name
OTHER_FILES = 1000  # may lie beside the data, or as many as hold data


def load(composed: DictConfig) -> Config:
    """Check a composed configuration, and fill in the values that follow from others.

    Args:
        composed: Of conf/base.yaml and the command line by Hydra, or a run's config.yaml.

    Raises:
        TraceFLError: A key is unknown or a value impossible; the message says what to do.
    """
    try:
        plain: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise TraceFLError(f"{error.full_key} cannot be read ({first_line(error)}): correct it.") from error
    for alias, key in ALIASES.items():  # in a group, or a run's config.yaml of an earlier version
        group, name = alias.split(".")
        if isinstance(plain.get(group), dict) and name in plain[group]:
            plain[key] = plain[group].pop(name)
    groups = {key.partition(".")[0] for key in (*dict(leaves()), *ALIASES) if "." in key}
    plain = {key: value for key, value in plain.items() if value != {} or key not in groups}
    check_kinds(plain)
    try:
        config: Config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))  # type: ignore[assignment]
    except ConfigKeyError as error:
        raise TraceFLError(unknown(str(error.full_key))) from error
    except ValidationError as error:
        key = str(error.full_key).split("[")[0]  # of an entry of a list, the list
        kind = next(words for name, words in KINDS.items() if name in str(dict(leaves())[key].type))
        raise TraceFLError(f"{key} must be {kind}, got {shown(OmegaConf.select(composed, key))}.") from error
    model, strategy = config.model, config.strategy
    model.config = {} if model.config is None else model.config
    strategy.options = {} if strategy.options is None else strategy.options
    config.label2flip = {} if config.label2flip is None else config.label2flip
    if config.noise_rate == config.label2flip:  # this is how the artifact's command lines say "all of them"
        config.noise_rate = 1.0
    if config.dataset.path and config.dataset.name == "digits":  # a folder is not the bundled set
        config.dataset.name = Path(config.dataset.path).resolve().name
    if config.client.lr is None:
        config.client.lr = _usual_lr(config)

    for key, field in leaves():
        if rule := field.metadata["rule"]:
            rule.check(key, attrgetter(key)(config))
    config.label2flip = {int(label): int(target) for label, target in config.label2flip.items()}
    config.exclude_clients = sorted(set(config.exclude_clients))
    for check in (_check_federation, _check_strategy, _check_storage, _check_data, _check_model, _check_faults):
        check(config)
    _forget_excluded_faults(config)
    config.provenance.methods = [method for method in TRACED_METHODS if method in config.provenance.methods]
    return config


def numbered_labels(config: Config, class_names: Sequence[str]) -> tuple[Config, list[str]]:
    """A copy whose label2flip, noise_rate and fault.target are class numbers, and notes to log.

    They name labels as the data write them where those are whole numbers, such as 1 to 5, otherwise
    they are class numbers already.

    Raises:
        TraceFLError: A fault leads to a label that the prepared data do not have, or flips none of
            those that they have.
    """
    names = [whole_number(name) for name in class_names]
    if None in names:
        number: dict[Any, int] = {index: index for index in range(len(names))}
    else:
        number = {name: index for index, name in enumerate(names)}
    known = ", ".join(map(str, number))
    if sorted(number) == list(range(min(number), max(number) + 1)):
        known = f"{min(number)} to {max(number)}"
    config, flips, notes = copy.deepcopy(config), config.label2flip, []
    key, targets = "label2flip", flips.values()
    if config.fault.kind == "backdoor":
        key, targets = "fault.target", [config.fault.target]
    must = f"{key} must lead to a label of {config.dataset.name}, {known}"
    for target in targets:
        require(target in number, f"{must}, got {target}: choose one of those.")
    absent = ", ".join(str(label) for label in flips if label not in number)
    must = f"label2flip must flip a label of {config.dataset.name}, {known}"
    require(not flips or number.keys() & flips.keys(), f"{must}, got {absent}: choose one of those.")
    if absent:
        notes.append(f"label2flip: {config.dataset.name} has no label {absent}, so nothing is flipped there")
    changed = {
        label: index for label, index in number.items() if label != index and (label in flips or label in targets)
    }
    if None in names and flips:
        said = ", ".join(f"{class_names[a]} to {class_names[b]}" for a, b in flips.items() if a in number)
        notes.append(f"label2flip: {said}")
    if changed:
        said = ", ".join(f"{label} is class {index}" for label, index in sorted(changed.items()))
        notes.append(f"{key}: labels as the data write them: {said}")
    config.label2flip = {number[label]: number[target] for label, target in flips.items() if label in number}
    if isinstance(config.noise_rate, dict):
        config.noise_rate = {number[label]: rate for label, rate in config.noise_rate.items() if label in number}
    config.fault.target = number.get(config.fault.target, config.fault.target)
    return config, notes


def check_examples(config: Config, label_counts: Mapping[str, Mapping[int, int]]) -> None:
    """Raise a TraceFLError if a client holds too few examples for its model to train on."""
    for client, counts in label_counts.items():
        too_few = config.arch == "cnn" and sum(counts.values()) == 1 and int(client) not in config.exclude_clients
        holds = f"client {client} holds 1 example, on which BatchNorm in {config.model.name} cannot train"
        remedy = "raise data_dist.min_examples_per_class or lower num_clients"
        require(not too_few, f"{holds}: {remedy}, or leave it out with exclude_clients=[{client}].")


def unknown(key: str) -> str:
    """The message for a key that is no setting, with the one that was probably meant."""
    known = [*(name for name, _ in leaves()), *ALIASES]
    near = ALIASES.get(key) or next(iter(difflib.get_close_matches(key, known, n=1)), "")
    return f"{key} is no setting of TraceFL: {near and f'did you mean {near}? '}All stand in tracefl/conf/base.yaml."


def _usual_lr(c: Config) -> float:
    if c.model.pretrained and c.model.name not in IMAGE_MODELS:
        return 0.00005
    return 0.0003 if c.dataset.name == "digits" and not c.dataset.path else 0.001


def _require(c: Config, keys: str, holds: object, must: str, remedy: str) -> None:
    """Raise "KEYS must MUST, got VALUES: REMEDY." unless it holds; "and" joins two keys."""
    got = " and ".join(str(attrgetter(key)(c)) for key in keys.split(" and "))
    require(holds, f"{keys} must {must}, got {got}: {remedy}.")


def _check_federation(c: Config) -> None:
    at_most, cpus = f"be at most num_clients={c.num_clients}", c.total_cpus or os.cpu_count() or 1
    _require(c, "clients_per_round", c.clients_per_round <= c.num_clients, at_most, "lower it, or raise that")
    known = all(client in range(c.num_clients) for client in c.exclude_clients)
    _require(c, "exclude_clients", known, f"be 0 to {c.num_clients - 1}", "correct it or raise num_clients")
    left = c.num_clients - len(c.exclude_clients)
    _require(c, "exclude_clients", left > 0, f"leave one of num_clients={c.num_clients} clients", "name fewer")
    at_most = f"be at most {left}, what exclude_clients={c.exclude_clients} leaves of num_clients={c.num_clients}"
    _require(c, "clients_per_round", c.clients_per_round <= left, at_most, f"set clients_per_round={left} or less")
    if c.data_dist.dist_type == "non_iid_dirichlet":
        above_0(10**9).check("dirichlet_alpha", c.dirichlet_alpha)
    here = not c.ray.address
    _require(c, "ray.address", here or c.total_cpus is None, "be null where total_cpus is set", "leave one of them out")
    _require(c, "ray.address", here or c.total_gpus is None, "be null where total_gpus is set", "leave one of them out")
    enough = c.client_cpus <= cpus or not here or "RAY_ADDRESS" in os.environ
    _require(c, "client_cpus", enough, f"be at most total_cpus={cpus}", "lower it or raise total_cpus")
    least = cpus / AT_A_TIME
    must = f"be at least {least:g}, with which {AT_A_TIME} clients train at a time"
    _require(c, "client_cpus", not here or c.client_cpus >= least, must, "raise it, or lower total_cpus")


def _check_strategy(c: Config) -> None:
    name, options, K = c.strategy.name, c.strategy.options, c.clients_per_round
    known = ", ".join(STRATEGIES[name]) or "no options"
    for option, value in options.items():
        key = f"strategy.options.{option}"
        require(option in STRATEGIES[name], f"{key}={value} is unknown to {name}, which takes {known}: leave it out.")
        STRATEGIES[name][option].check(key, value)
        if option == "num_nodes_to_select":
            require(value <= K, f"{key} must be at most clients_per_round={K}, got {value}: lower it.")
    needed = {"fedprox": ("proximal_mu",), "fedavgm": ("server_momentum", "server_learning_rate")}.get(name, ())
    differs = not needed or any(options.get(option) for option in needed)
    missing = f"strategy.options.{' or '.join(needed)}"
    require(differs, f"strategy.name={name} is fedavg without {missing}: set it above 0.")
    faulty = options.get("num_malicious_nodes", 0)
    least = {"krum": 2 * faulty + 3, "multikrum": 2 * faulty + 3, "bulyan": 4 * faulty + 3}.get(name, 1)
    must = f"be at least {least} for {name} with num_malicious_nodes={faulty}"
    _require(c, "clients_per_round", least <= K, must, "raise it, or lower that")
    both = (c.noise_multiplier == -1) == (c.clipping_norm == -1)
    _require(c, "noise_multiplier and clipping_norm", both, "be set together", "set both or neither")
    fits = name == "fedavg" or c.noise_multiplier == -1
    _require(c, "strategy.name", fits, "be fedavg where noise_multiplier is set", "leave out one of them")


def _check_storage(c: Config) -> None:
    kept = int(c.storage.keep.partition(":")[2]) if c.storage.keep.startswith("last:") else c.num_rounds
    all_kept = kept >= c.num_rounds or not c.do_provenance or c.provenance.scope != "run"
    must = "keep every round where provenance.scope=run traces them all"
    _require(c, "storage.keep", all_kept, must, "set storage.keep=all or deltas")


def _check_data(c: Config) -> None:
    name, path, known = c.dataset.name, c.dataset.path, ("digits", *HUB_NAMES, *MEDMNIST)
    must = f"be one of {', '.join(known)}, or a name of the hub as owner/name"
    fits = path or name in known or bool(HUB_NAME.fullmatch(name))
    _require(c, "dataset.name", fits, must, "correct it, or name a folder with dataset.path=FOLDER")
    fits = len(name.rpartition("/")[2].encode()) <= LONGEST_NAME
    _require(c, "dataset.name", fits, f"be at most {LONGEST_NAME} bytes", "set dataset.name=SHORTER, also for a folder")
    what = _no_dataset(Path(path)) if path else ""
    _require(c, "dataset.path", not what, f"be the folder of a dataset, not {what}", "name the folder of the data")
    if path and name not in MEDMNIST:
        must = "hold data in the hub's layout, such as train-*.parquet and test-*.parquet, and little else"
        _require(c, "dataset.path", _holds_data(path), must, "name another folder")


def _holds_data(folder: str) -> bool:
    """Whether some of the first files can hold data; of thousands, most of them must."""
    kinds = TABLES + ARCHIVES + IMAGES
    data = Counter(file.name.lower().endswith(kinds) for file in islice(visible_files(folder), LOOKED_AT))
    return data[True] > 0 and data[False] <= max(data[True], OTHER_FILES)


def _no_dataset(folder: Path) -> str:
    """What a folder is that holds all kinds of files, in words; empty if it may be a dataset's."""
    folder, home = folder.resolve(), Path(os.path.expanduser("~")).resolve()
    if home.is_relative_to(folder):
        return "your home folder" if folder == home else f"one that contains your home folder {home}"
    mark = next((mark for mark in PROJECT if (folder / mark).exists()), None)
    if mark:
        return f"a project, which has {mark}"
    is_system = (folder / "bin").is_dir() and (folder / "lib").is_dir()
    return "one of installed programs" if is_system or installed(folder) else ""


def _check_model(c: Config) -> None:
    model, for_texts = c.model, c.arch == "transformer"
    must = f"be one of {', '.join(IMAGE_MODELS)}, or a text classifier of the hub as owner/name"
    fits = model.path or model.name in (*IMAGE_MODELS, "gpt2") or bool(HUB_NAME.fullmatch(model.name))
    _require(c, "model.name", fits, must, "correct it, or name a folder with model.path=FOLDER")
    _require(c, "model.arch", model.arch in (None, c.arch), f"be {c.arch} for model.name={model.name}", "leave it out")
    for key, value in (("model.config", model.config), ("model.tokenizer", model.tokenizer)):
        _require(c, key, for_texts or not value, f"be that of a text model, not of {model.name}", "leave it out")
    for key in ("batch_size", "data_dist.max_per_client_data_size"):
        must = f"be at least 2 for {model.name}: BatchNorm cannot train on one example"
        _require(c, key, for_texts or attrgetter(key)(c) != 1, must, "raise it")
    if "vocab_size" in model.config:
        integer(1).check("model.config.vocab_size", model.config["vocab_size"])
    fits = model.tokenizer != "trained" or not model.has_weights
    remedy = "set model.tokenizer=own, or model.pretrained=false and no model.path"
    _require(c, "model.tokenizer", fits, "be own for published weights, which know no other tokens", remedy)


def _check_faults(c: Config) -> None:
    clients, flips, kind, rate = c.faulty_clients_ids, c.label2flip, c.fault.kind, c.noise_rate
    known = all(client in range(c.num_clients) for client in clients)
    _require(c, "faulty_clients_ids", known, f"be 0 to {c.num_clients - 1}", "correct it or raise num_clients")
    if kind == "label_flip":
        both = bool(clients) == bool(flips)
        _require(c, "faulty_clients_ids and label2flip", both, "be set together", "set both or neither")
    else:
        _require(c, "faulty_clients_ids", clients, f"name clients for fault.kind={kind}", "set it or leave that out")
        _require(c, "label2flip", not flips, f"be left out with fault.kind={kind}", "it flips no labels")
    fits = kind != "backdoor" or c.arch == "cnn" or c.dataset.max_tokens >= 2
    _require(c, "dataset.max_tokens", fits, "be at least 2 for a backdoor: the trigger is the second token", "raise it")
    by_label = rate if isinstance(rate, dict) and kind == "label_flip" else {}
    unflipped = ", ".join(str(label) for label in by_label if label not in flips)
    _require(c, "noise_rate", not unflipped, "be set for labels of label2flip only", f"leave out {unflipped}")
    for share in by_label.values() if by_label else [rate]:
        SHARE.check("noise_rate", share)


def _forget_excluded_faults(c: Config) -> None:
    """Clients that never train are not faulty; if no faulty one is left, there is no fault."""
    left = [client for client in c.faulty_clients_ids if client not in c.exclude_clients]
    if c.faulty_clients_ids and not left:
        c.label2flip, c.noise_rate, c.fault = {}, 1.0, Fault()
    c.faulty_clients_ids = left
