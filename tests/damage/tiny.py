"""A whole experiment in a second: four clients of a model of 170 numbers, in this process."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from tests.conftest import composed
from tests.federation import local
from tracefl import Run
from tracefl.checks import load
from tracefl.commands.auditing import audit
from tracefl.commands.listing import entry
from tracefl.config import Config
from tracefl.data.sources import Source, load_source
from tracefl.errors import TraceFLError, require
from tracefl.pipeline import run_experiment
from tracefl.report.page import write_page
from tracefl.report.sweep import read_runs
from tracefl.results import AUDIT, PROVENANCE, read_rounds, read_table

WORDS = (
    "exp_key=tiny", "num_clients=4", "clients_per_round=4", "num_rounds=2", "client.epochs=1", "dirichlet_alpha=1",
    "data_dist.max_per_client_data_size=12", "data_dist.max_server_data_size=10",
    "provenance.max_mispredictions=2", "strategy.name=fedadam",
    "report=false",
)  # fmt: skip
TIMED = ("timings.csv", "results.json")  # they hold seconds
ALWAYS_NEW = (".lock", "TraceFL_clients_contributions.log")


def tiny_model(name: str, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 3), nn.ReLU(), nn.Linear(3, num_classes))


@cache
def digits() -> Source:
    """Loaded once: half of the time of a tiny command."""
    return load_source(load(composed(WORDS)))


def use_tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Image models are tiny, and clients train in this process."""
    digits()
    monkeypatch.setattr("tracefl.data.sources.load_source", lambda _: digits())
    monkeypatch.setattr("tracefl.models.build_image_model", tiny_model)
    monkeypatch.setattr("tracefl.models.pretrained_image_model", tiny_model)
    monkeypatch.setattr("tracefl.federation.simulation.simulate", local.simulate)
    monkeypatch.setattr("tracefl.federation.grid.PULL_INTERVAL_S", 0)
    monkeypatch.setattr("tracefl.pipeline.tracking.log_run", lambda *_: None)  # its files are never read back


def command(storage: Path, *words: str) -> Callable[[], Config]:
    """`python -m tracefl.main ...` in this process; gives back its configuration."""
    config = load(composed((*WORDS, *words)))
    config.storage.dir = str(storage)

    def run() -> Config:
        run_experiment(config, OmegaConf.to_yaml(OmegaConf.structured(config)))
        return config

    return run


def the_run(storage: Path) -> Path:
    (folder,) = storage.glob("tiny-*")
    return folder


def contents(storage: Path) -> dict[str, str]:
    """SHA-256 of every file that two runs of one command have in common, by path."""
    files = [file for file in storage.rglob("*") if file.is_file()]
    return {
        str(file.relative_to(storage)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.name not in (*TIMED, *ALWAYS_NEW)
    }


def numbers(folder: Path) -> dict[str, object]:
    """All that a user reads of a run, by what was read; a sentence where it is refused."""
    found = dict[str, object]()

    def look(name: str, read: Callable[[], object]) -> None:
        try:
            found[name] = read()
        except TraceFLError as error:
            found[name] = error

    look("run", lambda: Run.open(folder))
    if isinstance(run := found.pop("run"), Run):
        look("header", lambda: repr((run.rounds, run.clients, run["class_names"], run["data_sha256"], run.metrics(0))))
        for record in run.rounds:
            look(f"strategy {record.number}", lambda t=record.number: _sums(run.strategy_state(t)))
            look(f"predictions {record.number}", lambda t=record.number: run.predictions(t).tolist())
            for client in record.clients:
                who = client.id
                look(f"{who} in {record.number}", lambda r=record, who=who: _sums(r.client_state(who)))
        for number in range(len(run.rounds) + 1):
            look(f"global {number}", lambda t=number: _sums(run.global_state(t)))
        look("trace", lambda: run.trace(0).contributions.tolist())
    else:
        found["header"] = run
    look("rounds.csv", lambda: read_rounds(folder).to_csv())
    look("sweep", lambda: read_runs([folder]).to_csv())
    look("page", lambda: bool(write_page(folder, folder.parent.parent / "page.html")))
    look("listed", lambda: listed(folder))
    look("audit", lambda: repr(audit(folder)))
    for name in (PROVENANCE, AUDIT):
        look(name, lambda name=name: read_table(folder, name).to_csv())
    return found


def listed(folder: Path) -> str:
    """What `tracefl list` says of a run."""
    found = entry(folder) | {"bytes": 0}  # its log grows
    told = [found["error"]] if "error" in found else found["lost"]
    require(not told, "; ".join(told))
    return repr(found)


def _sums(state) -> dict[str, str]:
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in state.items()}


def finished(storage: Path) -> Path:
    """A storage with one finished run."""
    torch.manual_seed(0)
    command(storage)()
    return storage
