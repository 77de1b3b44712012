"""Every script of the paper: its command lines compose at the paper's scale, and it runs on a tiny setting."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OTHER = {"deploy_local"}  # no script of the paper; tests/federation/test_deploy_local.py
SCRIPTS = sorted(file for file in (ROOT / "scripts").glob("*.sh") if file.stem not in OTHER)
TINY = [
    "client.epochs=1", "data_dist.max_per_client_data_size=30", "data_dist.max_server_data_size=60", "num_rounds=1",
    "provenance.inputs_per_label=1",
]  # fmt: skip
# What each leaves beside the runs; figures in PNG and PDF.
LEFT = {
    "figure1_label_distribution": ["labels.csv", "labels_digits_non_iid_dirichlet_alpha_0.3.png"],
    "figure2_accuracy": ["runs.csv", "rounds.pdf"],
    "figure3_alpha": ["runs.csv", "by_dirichlet_alpha.png"],
    "figure4_privacy": ["runs.csv", "rounds.png"],
    "figure5_many_rounds": ["runs.csv", "rounds.png"],
    "figure6_time": ["runs.csv", "feddebug.png"],
    "table1_faults": ["runs.csv", "by_dirichlet_alpha.png"],
    "table2_privacy": ["runs.csv", "by_noise_multiplier.png"],
    "table3_clients": ["runs.csv", "by_num_clients.png"],
}
# One value of what a script varies: a run takes most of a minute.
TINY_ENVIRONMENT = {
    "ALPHAS": "0.3", "COUNTS": "3", "PER_ROUND": "2", "CLIENTS": "3", "ROUNDS": "1", "PRIVACY": "0.003:15",
    "PAIRS": "digits/resnet18",
}  # fmt: skip


def run(script: Path, *words: str, **environment: str) -> str:
    done = subprocess.run(
        ["bash", script, *words], env={**os.environ, **environment}, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_figure_and_table_of_the_paper_has_its_script():
    assert [script.stem for script in SCRIPTS] == sorted(LEFT)


@pytest.mark.parametrize("scale", ["small", "paper"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
@pytest.mark.slow
def test_its_command_lines_compose(config, script, scale, tmp_path):
    printed = run(script, SCALE=scale, PYTHON="echo", OUT=str(tmp_path), DATA=str(tmp_path) if scale == "paper" else "")
    commands = [shlex.split(line) for line in printed.splitlines()]
    jobs = [command for command in commands if command[1] == "tracefl.main"]
    assert jobs
    for command in jobs:
        assert command[2] == "--multirun"
        # of a swept setting the first value; the folder of a dataset is not there, its name says what it is
        words = [w for w in command[3:] if not w.startswith("dataset.path")]
        first = [w if "{" in w or "[" in w else w.split(",")[0] for w in words]
        composed = config(*[w for w in first if not w.startswith("storage.dir")])
        assert composed.device == ("cuda" if scale == "paper" else "cpu")
    assert commands[-1][:2] == ["-m", "tracefl.report"]


# Table II runs figure 4's script.
@pytest.mark.slow
@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.stem != "figure4_privacy"], ids=lambda script: script.stem)
def test_it_runs_on_a_tiny_setting(script, tmp_path):
    few = {"figure5": ["clients_per_round=2"], "table3": []}.get(script.stem.split("_")[0])
    few = ["num_clients=3", "clients_per_round=3"] if few is None else few
    run(script, *TINY, *few, PYTHON=sys.executable, OUT=str(tmp_path), **TINY_ENVIRONMENT)
    for name in LEFT[script.stem]:
        assert (tmp_path / name).stat().st_size > 100
