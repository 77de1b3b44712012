"""Every figure is drawn to a file that shows something; the tables beside them hold what they show."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.report.recorded import record
from tracefl.errors import TraceFLError
from tracefl.report import plots
from tracefl.report.__main__ import main
from tracefl.report.figures import draw_data, draw_run, draw_runs
from tracefl.sealed import sealed


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(plots, "DPI", 40)
    monkeypatch.setattr(plots, "KINDS", ("png",))


def assert_drawn(folder: Path, *names: str) -> None:
    assert {file.stem for file in folder.glob("*.png")} == set(names)
    for name in names:
        pixels = np.asarray(Image.open(folder / f"{name}.png").convert("RGB")).reshape(-1, 3)
        assert len(np.unique(pixels, axis=0)) > 50, f"{name} is blank"


def test_a_figure_is_saved_as_png_and_pdf(tmp_path, monkeypatch):
    monkeypatch.undo()
    assert plots.KINDS == ("png", "pdf")
    monkeypatch.setattr(plots, "DPI", 20)
    plots.plot_labels({"0": {0: 3}}, ["cat"], tmp_path / "labels")
    assert (tmp_path / "labels.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "labels.png").exists()


def test_one_run(tmp_path):
    draw_run(record(tmp_path))
    assert_drawn(tmp_path / "plots", "rounds", "labels", "contributions")


def test_several_runs_by_the_setting_that_varies(tmp_path):
    folders = [record(tmp_path / str(alpha), alpha) for alpha in (1, 0.1)]
    table = draw_runs(folders, None, tmp_path / "out")
    assert_drawn(tmp_path / "out", "rounds", "by_dirichlet_alpha")
    assert table["name"].tolist() == ["dirichlet_alpha 0.1", "dirichlet_alpha 1"]
    assert pd.read_csv(tmp_path / "out" / "runs.csv")["localization_accuracy"].tolist() == [0.55, 1.0]


def test_faulty_runs_are_compared_with_feddebug(tmp_path):
    folders = [record(tmp_path / name, faulty=True, dataset=name) for name in ("digits", "mnist")]
    draw_runs(folders, None, tmp_path / "out")
    assert_drawn(tmp_path / "out", "rounds", "feddebug")


def test_label_distribution_of_prepared_data(tmp_path):
    info = {
        "settings": {"dataset.name": "owner/pets", "data_dist.dist_type": "non_iid_dirichlet", "dirichlet_alpha": 0.3},
        "class_names": ["cat", "dog"],
        "label_counts": {"0": {"0": 12}, "1": {"0": 3, "1": 40}},
        "sha256": dict.fromkeys(("server.safetensors", *(f"clients/{k}.safetensors" for k in (0, 1))), "ab" * 32),
        "left_out": {}, "text_model": None, "notes": [],
    }  # fmt: skip
    (tmp_path / "data.json").write_bytes(sealed(json.dumps(info, indent=1)))
    draw_data([tmp_path], tmp_path / "out")
    assert_drawn(tmp_path / "out", "labels_pets_non_iid_dirichlet_alpha_0.3")
    assert pd.read_csv(tmp_path / "out" / "labels.csv")["examples"].tolist() == [12, 3, 40]


def test_a_setting_that_no_run_has_is_refused(tmp_path):
    with pytest.raises(TraceFLError, match=r"x must be one of dirichlet_alpha, .*, got moon"):
        draw_runs([record(tmp_path / "a")], "moon", tmp_path / "out")


def test_the_command_lists_what_it_drew_and_refuses_what_it_cannot_read(tmp_path, monkeypatch, capsys):
    def run(*words: str) -> None:
        monkeypatch.setattr("sys.argv", ["tracefl.report", *words])
        main()

    record(tmp_path / "a")
    run(f"runs={tmp_path}/*", f"out={tmp_path}/out")
    assert capsys.readouterr().out.split() == [f"{tmp_path}/out/{n}" for n in ("rounds.png", "runs.csv")]
    for wrong in (["runs"], [], ["runs=a", "data=b"], ["runs=a", "y=1"], ["runs=nowhere"]):
        with pytest.raises(SystemExit, match=r"^error: [^\n]*$"):
            run(*wrong)
