"""The notebook runs from top to bottom, offline: the page inline, the verdict, one prediction and a what-if."""

from html import unescape
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
def test_it_runs_and_shows_the_page_and_the_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACEFL_NOTEBOOK_RUNS", str(tmp_path))
    notebook = nbformat.read(ROOT / "artifact.ipynb", as_version=4)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = {cell["id"]: cell["outputs"] for cell in notebook.cells if cell["cell_type"] == "code"}
    (page,) = [output["data"]["text/html"] for output in outputs["page"]]
    (folder,) = tmp_path.glob("artifact-*")
    assert unescape(page.split('srcdoc="')[1].split('"')[0]) == (folder / "report.html").read_text(encoding="utf-8")
    said = {name: "".join(output.get("text", "") for output in some) for name, some in outputs.items()}
    assert "TraceFL Average Localization Accuracy: " in said["run"]
    assert said["verdict"].startswith("Verdict: 1 of 10 clients is faulty: c3")
    assert "by shapley" in said["trace"]
    assert "by standard errors" in said["trace"].splitlines()[-1]
    assert said["whatif"].startswith("Without c3 in rounds 1 to 2: accuracy ")
