"""The server as Flower's own commands run it: `flwr run`, here or on a SuperLink.

The folder app/ is the Flower app; its run configuration holds TraceFL's settings as one text:

    flwr run app --stream -c "settings='num_clients=3 storage.dir=/data/runs'"
"""

import logging
import os
import shlex
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported, as in tracefl.main

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from tracefl.checks import load
from tracefl.commandline import hydra_words
from tracefl.config import Config
from tracefl.errors import TraceFLError, as_sentence, first_line, require
from tracefl.federation.grid import GridView
from tracefl.machine import check_device
from tracefl.pipeline import run_experiment

app = ServerApp()
log = logging.getLogger("tracefl")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Do what `python -m tracefl.main` does with these settings, on the nodes of this grid."""
    try:
        config = settings(str(context.run_config.get("settings", "")))
        resolved = OmegaConf.to_yaml(OmegaConf.structured(config))
        check_device(config)
        run_experiment(config, resolved, lambda config, serve: serve(cast(Any, GridView(grid))))
    except TraceFLError as error:
        log.error("error: %s", error)
        raise


def settings(text: str) -> Config:
    """The checked configuration of what would be typed after `python -m tracefl.main`.

    Args:
        text: words as in a shell; a value with spaces or quotes is quoted.

    Raises:
        TraceFLError: it cannot be read, a value is impossible, or a path is relative: the app does
            not run in the folder that the user is in.

    Example:
        >>> settings("num_clients=3 clients_per_round=2 storage.dir=/data/runs").clients_per_round
        2
    """
    with as_sentence(f"settings={text!r} cannot be read", "close its quotes", ValueError):
        words, notes = hydra_words(shlex.split(text))
    for flag in (word for word in words if word.startswith("-")):
        raise TraceFLError(f"settings must be key=value words, got {flag}: leave it out")
    for note in notes:
        log.info("note: %s", note)
    try:
        with initialize_config_module("tracefl.conf", version_base="1.3"):
            composed = compose("base", overrides=words)
    except Exception as error:  # Hydra's, of many types
        raise TraceFLError(f"settings={text!r} cannot be composed ({first_line(error)}): correct it.") from error
    config = load(composed)
    for key, path in [
        ("storage.dir", config.storage.dir),
        ("dataset.path", config.dataset.path),
        ("model.path", config.model.path),
    ]:
        must = f"{key} must be an absolute path under flwr run, whose working folder is another, got {path}"
        require(not path or Path(path).is_absolute(), f"{must}: write {key}=/FOLDER in settings")
    remedy = "leave it out: the nodes of this grid are used"
    require(not config.ray.address, f"ray.address={config.ray.address} has no effect under flwr run: {remedy}")
    require(not config.dry_run, "dry_run=true has no effect under flwr run: use python -m tracefl.main")
    return config
