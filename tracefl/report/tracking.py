"""The metrics of a run in experiment trackers, as `tracking` asks: a function of a few lines each.

The same results are logged once: `Tracked.id` is that of the run and its metrics.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

import pandas as pd

from tracefl.config import Config, leaves
from tracefl.errors import as_sentence, require
from tracefl.results import read_rounds
from tracefl.settings import fingerprint

LONGEST = 500  # characters of a setting's value, of an MLflow parameter


@dataclass(frozen=True)
class Tracked:
    """What a tracker gets of a run.

    Attributes:
        folder: of the run.
        experiment: exp_key, which groups runs.
        settings: every setting by its key.
        rounds: the table of rounds.csv.

    Example:
        >>> rounds = pd.DataFrame({"round": [1, 2], "accuracy": [0.5, float("nan")]})
        >>> tracked = Tracked(Path("logs/tracefl-a91c9d33"), "tracefl", {}, rounds)
        >>> list(tracked.steps()), tracked.id
        ([(1, {'accuracy': 0.5}), (2, {})], 'tracefl-a91c9d33-9b241e55')
    """

    folder: Path
    experiment: str
    settings: dict[str, Any]
    rounds: pd.DataFrame

    @property
    def id(self) -> str:
        """The folder's name, and a hash of the metrics: others are another run in a tracker."""
        return f"{self.folder.name[-100:]}-{fingerprint(self.rounds.to_csv(index=False))}"

    def steps(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Each round with its metrics; those that it lacks are left out."""
        for number, metrics in self.rounds.set_index("round").iterrows():
            yield int(str(number)), {str(name): float(value) for name, value in metrics.dropna().items()}


def to_tensorboard(tracked: Tracked) -> None:
    """Scalars in the run's folder tensorboard/, in place of what it held."""
    from torch.utils.tensorboard import SummaryWriter

    place = tracked.folder / "tensorboard"
    if place.is_symlink():  # what it leads to is another's
        place.unlink()
    shutil.rmtree(place, ignore_errors=True)
    with SummaryWriter(place) as writer:
        for number, metrics in tracked.steps():
            for name, value in metrics.items():
                writer.add_scalar(name, value, number)


def to_mlflow(tracked: Tracked) -> None:
    """A run where MLFLOW_TRACKING_URI says, in the experiment exp_key."""
    import mlflow

    mlflow.set_experiment(tracked.experiment)
    if mlflow.search_runs(filter_string=f"tags.tracefl = '{tracked.id}'", output_format="list"):
        return
    with mlflow.start_run(run_name=tracked.folder.name):
        mlflow.log_params({key: str(value)[:LONGEST] for key, value in tracked.settings.items()})
        for number, metrics in tracked.steps():
            mlflow.log_metrics(metrics, step=number)
        mlflow.set_tag("tracefl", tracked.id)


def to_wandb(tracked: Tracked) -> None:
    """A run of the project exp_key; WANDB_MODE=offline keeps it in the run's folder wandb/."""
    import wandb

    names = {"project": tracked.experiment, "name": tracked.folder.name, "id": tracked.id}
    with wandb.init(**names, dir=tracked.folder, config=tracked.settings, resume="allow") as logged:
        for number, metrics in tracked.steps():
            logged.log(metrics, step=number)


TRACKERS: dict[str, Callable[[Tracked], None]] = {
    "tensorboard": to_tensorboard,
    "mlflow": to_mlflow,
    "wandb": to_wandb,
}


def wanted(config: Config) -> list[str]:
    """The trackers that a run logs to; all are installed.

    Raises:
        TraceFLError: one that is asked for is not installed.
    """
    if config.tracking is None:
        return ["tensorboard"] if _installed("tensorboard") else []
    for name in config.tracking:
        remedy = f"pip install {name}, or leave it out"
        require(_installed(name), f"tracking={name} needs the package {name}, which is not installed: {remedy}.")
    return list(dict.fromkeys(config.tracking))


def log_run(config: Config, folder: Path) -> None:
    """Give the metrics of a run to the trackers that its configuration asks for.

    Raises:
        TraceFLError: a tracker is not installed or fails; the run stays as it is recorded.
    """
    settings = {key: attrgetter(key)(config) for key, _ in leaves()}
    tracked = Tracked(folder, config.exp_key, settings, read_rounds(folder))
    for name in wanted(config):
        problem = f"tracking={name}: the metrics of {folder}, which is complete, could not be logged"
        with as_sentence(problem, "correct it and give the same command again, or leave it out", Exception):
            TRACKERS[name](tracked)


def _installed(name: str) -> bool:
    """Whether a package is there; a folder of that name, as trackers leave it, is none."""
    found = find_spec(name)
    return found is not None and found.origin is not None
