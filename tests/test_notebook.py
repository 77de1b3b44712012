"""The notebook runs from top to bottom, offline, on the default."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(ROOT / "artifact.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.slow
def test_it_runs_and_ends_with_the_closing_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACEFL_NOTEBOOK_RUNS", str(tmp_path))
    notebook = nbformat.read(ROOT / "artifact.ipynb", as_version=4)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [cell.get("outputs", []) for cell in notebook.cells]
    pictures = [o for cell in outputs for o in cell if "image/png" in o.get("data", {})]
    assert len(pictures) == 3
    asked = outputs[-4][0]["text"].splitlines()
    assert [line.split(",")[0] for line in asked if "(method" in line] == [
        "Provenance(method='influence'", "Provenance(method='shapley'",
    ]  # fmt: skip
    assert asked[-1].startswith("cannot be told from the first: ['")
    closing = outputs[-2][0]["text"].splitlines()
    assert closing[0] == "INFO - Total Rounds: 5"
    assert closing[1].startswith("INFO - TraceFL Average Localization Accuracy: ")
