"""Shared by all tests: configurations as the command line composes them, and the real data where they are."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as tracefl.main does

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from tracefl.checks import load
from tracefl.commandline import hydra_words
from tracefl.config import Config

torch.set_num_threads(2)
REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _log_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in this process sends its log to the console; later tests look at what is printed."""
    keep_log(monkeypatch)


def keep_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the package's log as it is, in the end."""
    log = logging.getLogger("tracefl")
    for name, value in {"handlers": [*log.handlers], "propagate": log.propagate, "level": log.level}.items():
        monkeypatch.setattr(log, name, value)


@cache
def composed(typed: tuple[str, ...]) -> DictConfig:
    """What Hydra makes of a command line; it takes a twentieth of a second, and many tests use the same."""
    words, _ = hydra_words(typed)
    with initialize_config_module("tracefl.conf", version_base="1.3"):
        return compose("base", overrides=words)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    """`config("num_clients=3", ...)`: the checked configuration of a command line, with its files in a fresh folder."""

    def build(*typed: str) -> Config:
        config = load(composed(typed))
        if not any(word.startswith("storage.dir=") for word in typed):
            config.storage.dir = f"{tmp_path}/logs"
        return config

    return build


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real datasets; its tests are skipped where it is absent."""
    folder = Path(os.environ.get("TRACEFL_DATA", REAL_DATA))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture
def in_process(monkeypatch):
    """Clients train in this process instead of on Ray."""
    from tests.federation import local

    monkeypatch.setattr("tracefl.federation.simulation.simulate", local.simulate)
    monkeypatch.setattr("tracefl.federation.grid.PULL_INTERVAL_S", 0)
