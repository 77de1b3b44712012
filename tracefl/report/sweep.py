"""One row per recorded run: its settings and the means over its rounds. What every figure over several runs draws."""

import glob
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from tracefl.errors import TraceFLError

# Settings that tell the runs of a sweep apart, by the name that a figure's axis gets.
SETTINGS = {
    "dirichlet_alpha": "dirichlet_alpha",
    "dist_type": "data_dist.dist_type",
    "num_clients": "num_clients",
    "clients_per_round": "clients_per_round",
    "num_rounds": "num_rounds",
    "noise_multiplier": "noise_multiplier",
    "clipping_norm": "clipping_norm",
    "strategy": "strategy.name",
    "fault": "fault.kind",
    "faulty_clients": "faulty_clients_ids",
    "epochs": "client.epochs",
    "lr": "client.lr",
    "seed": "seed",
}


def find(key: str, pattern: str, holding: str) -> list[Path]:
    """Folders that match a glob and hold a file `holding`, in order of name.

    Raises:
        TraceFLError: there is none.
    """
    found = sorted(Path(name) for name in glob.glob(pattern) if (Path(name) / holding).exists())
    if not found:
        raise TraceFLError(f"{key}={pattern} matches no folder with a {holding}: name finished ones, quoted.")
    return found


def read_rounds(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "rounds.csv")


def read_runs(folders: list[Path]) -> pd.DataFrame:
    """One row per run: name, dataset, model, settings, the last round's accuracy, means of the other metrics."""
    return pd.DataFrame([_row(folder) for folder in folders])


def varying(table: pd.DataFrame) -> list[str]:
    """Numeric settings that differ between the runs."""
    return [name for name in SETTINGS if pd.api.types.is_numeric_dtype(table[name]) and table[name].nunique() > 1]


def _row(folder: Path) -> dict[str, Any]:
    config, rounds = OmegaConf.load(folder / "config.yaml"), read_rounds(folder)
    assert isinstance(config, DictConfig)
    settings = {name: OmegaConf.select(config, key) for name, key in SETTINGS.items()}
    settings["faulty_clients"] = len(settings["faulty_clients"])
    if settings["noise_multiplier"] == -1:  # no differential privacy
        settings |= {"noise_multiplier": 0.0, "clipping_norm": float("nan")}
    means = rounds.drop(columns=["round", "loss", "accuracy"]).mean().to_dict()
    return {
        "run": str(folder),
        "dataset": config.dataset.name.rsplit("/", 1)[-1],
        "model": config.model.name.rsplit("/", 1)[-1],
        **settings,
        "accuracy": rounds["accuracy"].iloc[-1],
        **{str(name): mean for name, mean in means.items()},
    }
