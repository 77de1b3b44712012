"""Flower refuses to build messages outside of a run; and a test does not wait between two looks at the grid."""

import pytest
from flwr.supercore.task_identity import TaskIdentity

from tracefl.federation import grid


@pytest.fixture(autouse=True)
def _inside_a_flower_run(monkeypatch):
    for name in ("task_id", "run_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1, raising=False)
    monkeypatch.setattr(grid, "PULL_INTERVAL_S", 0)
