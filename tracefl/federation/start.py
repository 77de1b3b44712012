"""The run of a configuration: a new one, or the recorded one to go on with."""

import logging
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

import torch

from tracefl.config import Config
from tracefl.data.faults import flipped_label_counts
from tracefl.data.prepared import PreparedData
from tracefl.errors import require
from tracefl.models import exchanged_state, initial_model, model_spec
from tracefl.record import ClientInfo
from tracefl.results import ROUNDS
from tracefl.runs import Run
from tracefl.settings import training_settings
from tracefl.states import State
from tracefl.storage import Storing

log = logging.getLogger("tracefl")


def initial_state(config: Config, data: PreparedData, folder: Path) -> State | None:
    """The model that a new run starts from; None if the folder holds a run to go on with.

    Raises:
        TraceFLError: the folder holds no run and do_training=false, or rounds without their
            run.json; or pretrained weights cannot be had.
    """
    if (folder / "run.json").exists() and (config.check_train_cache or not config.do_training):
        return None
    missing = f"do_training=false needs a recorded run, but {folder} holds none: set do_training=true once"
    require(config.do_training, missing)
    lost = f"{folder} holds rounds but no run.json: restore it, or set check_train_cache=false to train again"
    require(not config.check_train_cache or not (folder / "rounds" / "0001" / "global.safetensors").exists(), lost)
    torch.manual_seed(config.seed)
    return exchanged_state(initial_model(config, data))


def open_or_create(config: Config, data: PreparedData, folder: Path, initial: State | None) -> Run:
    """The run that `folder` holds or, from `initial`, a new one in its place.

    Raises:
        TraceFLError: the recorded run was trained on other data, or is to go on with other storage
            settings.
    """
    storing = Storing(config.storage.keep, config.storage.dtype)
    if initial is None:
        run = Run.open(folder)
        other = f"{folder} was trained on other data than dataset.name={config.dataset.name} gives now"
        remedy = "choose another exp_key, or set check_train_cache=false to train it again"
        require(run["data_sha256"] == data.digest, f"{other}: {remedy}")
        if config.do_training and len(run.rounds) < config.num_rounds:
            run.check_storing(storing)
        elif run.storing != storing:
            log.warning("all rounds are recorded with %s: other storage settings change nothing", run.storing)
        return run
    for stale in ("run.json", ROUNDS):
        (folder / stale).unlink(missing_ok=True)
    shutil.rmtree(folder / "rounds", ignore_errors=True)
    faults = dict.fromkeys(config.faulty_clients_ids, config.fault.kind)
    clients = [
        ClientInfo(client, counts, flipped_label_counts(config, data, client), faults.get(int(client)))
        for client, counts in data.label_counts.items()
    ]
    return Run.create(
        folder,
        initial=initial,
        clients=clients,
        storing=storing,
        seed=config.seed,
        data_sha256=data.digest,
        class_names=data.class_names,
        model=model_spec(config, data),
        data_folder=Path(os.path.relpath(data.folder, folder)).as_posix(),
        settings=training_settings(config),
        versions={"python": platform.python_version()}
        | {package: version(package) for package in ("tracefl", "torch", "flwr", "flwr-datasets")},
    )
