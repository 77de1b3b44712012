"""Flower refuses to build messages outside of a run; and a test does not wait between two looks at the grid."""

import logging

import pytest
from flwr.supercore.task_identity import TaskIdentity

from tests.federation.five import HONEST, run_with
from tests.federation.own import OwnGrid
from tracefl import Run
from tracefl.federation import grid


@pytest.fixture(autouse=True)
def _inside_a_flower_run(monkeypatch):
    for name in ("task_id", "run_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1, raising=False)
    monkeypatch.setattr(grid, "PULL_INTERVAL_S", 0)


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """The first round as it is without client b."""
    undo = pytest.MonkeyPatch()
    for name in ("task_id", "run_id", "node_id"):
        undo.setattr(TaskIdentity, f"_{name}", 1, raising=False)
    folder = tmp_path_factory.mktemp("without")
    run_with(folder, None, grid=OwnGrid(HONEST))
    undo.undo()
    return Run.open(folder).round(1)


@pytest.fixture(autouse=True)
def _heard(caplog):
    logger = logging.getLogger("tracefl")
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before
