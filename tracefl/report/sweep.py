"""One row per recorded run: its settings and the means over its rounds.

Figures over several runs are drawn from it.
"""

import glob
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tracefl.errors import as_sentence, require
from tracefl.results import AGAIN, CONFIG, ROUNDS, read_result, read_rounds

# Settings that tell the runs of a sweep apart: name on a figure's axis -> key in config.yaml.
SETTINGS = {
    "dirichlet_alpha": "dirichlet_alpha", "dist_type": "data_dist.dist_type", "num_clients": "num_clients",
    "clients_per_round": "clients_per_round", "num_rounds": "num_rounds", "noise_multiplier": "noise_multiplier",
    "clipping_norm": "clipping_norm", "strategy": "strategy.name", "fault": "fault.kind",
    "faulty_clients": "faulty_clients_ids", "epochs": "client.epochs", "lr": "client.lr", "seed": "seed",
}  # fmt: skip


def find(key: str, pattern: str, holding: str) -> list[Path]:
    """Folders that match a glob and hold a certain file.

    Args:
        key: the argument's name, for the error.
        pattern: the glob, as 'logs/alpha-*'.
        holding: name of a file that every finished folder has.

    Returns:
        The folders in order of name.

    Raises:
        TraceFLError: there is none.
    """
    found = sorted(Path(name) for name in glob.glob(pattern) if (Path(name) / holding).exists())
    asked = f"{key} must match folders with a {holding}, got {key}={pattern}"
    require(found, f"{asked}: quote the pattern, and finish the runs")
    return found


def read_runs(folders: list[Path]) -> pd.DataFrame:
    """One row per recorded run.

    Args:
        folders: of finished runs, with config.yaml and rounds.csv.

    Returns:
        Columns run (the folder), dataset, model, one for each of `SETTINGS`, accuracy (the last
        round's), and the mean over rounds of every other column of rounds.csv.
    """
    rows = []
    for folder in folders:
        broken = (LookupError, ValueError, TypeError, AttributeError, YAMLError, OmegaConfBaseException)
        with as_sentence(f"{CONFIG} or {ROUNDS} of {folder} are not as they are written", AGAIN, *broken):
            rows.append(_row(folder))
    return pd.DataFrame(rows)


def varying(table: pd.DataFrame) -> list[str]:
    """Numeric settings that differ between the runs."""
    return [name for name in SETTINGS if pd.api.types.is_numeric_dtype(table[name]) and table[name].nunique() > 1]


def _row(folder: Path) -> dict[str, Any]:
    config, rounds = OmegaConf.create(read_result(folder, CONFIG).decode()), read_rounds(folder)
    if not isinstance(config, DictConfig):
        raise TypeError("a list")
    settings = {name: OmegaConf.select(config, key) for name, key in SETTINGS.items()}
    settings["faulty_clients"] = len(settings["faulty_clients"])
    if settings["noise_multiplier"] == -1:  # no differential privacy
        settings |= {"noise_multiplier": 0.0, "clipping_norm": float("nan")}
    return {
        "run": str(folder),
        "dataset": config.dataset.name.rsplit("/", 1)[-1],
        "model": config.model.name.rsplit("/", 1)[-1],
        **settings,
        "accuracy": rounds["accuracy"].iloc[-1],
        **rounds.drop(columns=["round", "loss", "accuracy"]).mean(),
    }
