"""The command line as a user meets it: whole processes."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

SWEEP = "--multirun device=cpu client_resources.gpus=1 exp_key=artifact_exp model.name=resnet18 dataset.name=mnist"
COMMANDS = [  # METHOD's command lines, as the shell hands them on
    ["dirichlet_alpha=0.1"],
    [*SWEEP.split(), "num_clients=10", "num_rounds=2", "clients_per_round=4", "dirichlet_alpha=0.3"],
    [
        "--multirun", "device=cpu", "num_clients=10", "num_rounds=3", "clients_per_round=10", "dirichlet_alpha=0.7",
        "faulty_clients_ids=[0]",
        "label2flip={1:0,2:0,3:0,4:0,5:0,6:0,7:0,8:0,9:0,10:0,11:0,12:0,13:0}",
    ],
    [
        "data_dist.dist_type=PathologicalPartitioner-3", "label2flip={8:7,0:7,1:7}", "noise_rate={8:7,0:7,1:7}",
        "faulty_clients_ids=[8]",
    ],
    ["dirichlet_alpha=0.3", "noise_multiplier=0.001", "clipping_norm=15"],
    ["dataset.name=dbpedia_14", "model.name=distilbert/distilbert-base-uncased", "device=cuda"],
    ["data_dist.dist_type=sharded-non-iid-2", "dirichlet_alpha=-1", "data_dist.max_per_client_data_size=-1"],
]  # fmt: skip


def tracefl(*arguments: str, cwd: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tracefl.main", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_line_resolves(command, tmp_path):
    done = tracefl(*command, "dry_run=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "dry run, nothing is trained; the run would be logs/" in done.stdout
    assert {path.name for path in tmp_path.rglob("*")} <= {"logs", "multirun.yaml"}


TINY = [
    "client.epochs=1", "data_dist.max_per_client_data_size=30", "data_dist.max_server_data_size=80", "num_clients=4",
    "clients_per_round=3", "num_rounds=2",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", [COMMANDS[0], COMMANDS[1], COMMANDS[2], COMMANDS[4]])
def test_the_main_ones_run_on_small_data(command, tmp_path, request):
    data = []
    if "dataset.name=mnist" in command:
        data = [f"dataset.path={request.getfixturevalue('real_data') / 'mnist'}"]
    kept = [word for word in command if word.split("=")[0] not in {"num_clients", "clients_per_round", "num_rounds"}]
    done = tracefl(*kept, *TINY, *data, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "INFO - Total Rounds: 2" in done.stdout
    assert "INFO - TraceFL Average Localization Accuracy: " in done.stdout


def test_a_sweep_resolves_every_job(tmp_path):
    done = tracefl("--multirun", "dirichlet_alpha=0.1,0.2,0.3,0.4,1", "dry_run=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dry run") == 5


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("num_clients=0", "num_clients=0"),
        ("numclients=3", "did you mean num_clients?"),
        ("num_clients=many", "num_clients=many"),
        ("label2flip={8", "label2flip={8"),
        ("dataset.name=owner/never-there", "dataset.path=FOLDER"),
        ("dataset.path=.", "dataset.path=."),
        ("device=cuda", "device=cpu"),
    ],
)
def test_bad_input_is_one_sentence_within_seconds(argument, words, tmp_path):
    if argument == "device=cuda":
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    started = time.monotonic()
    done = tracefl(argument, cwd=tmp_path)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert time.monotonic() - started < 30  # a guard against retries and hangs, not a benchmark
    assert not list(tmp_path.rglob("*.*")), "something was left behind"
