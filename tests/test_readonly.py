"""A finished run is read, traced and reported from where nothing can be written; others need to be written."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from tracefl.readonly import held
from tracefl.runs import ClientInfo, Run
from tracefl.training import Evaluation

from .test_main import process

TINY = [
    "num_clients=3", "clients_per_round=3", "num_rounds=1", "client.epochs=1", "total_cpus=1",
    "data_dist.max_per_client_data_size=30", "data_dist.max_server_data_size=60", "provenance.inputs_per_label=1",
]  # fmt: skip


@pytest.fixture
def one_round(tmp_path) -> Path:
    folder = tmp_path / "logs" / "run"
    run = Run.create(folder, initial={"w": torch.zeros(2)}, clients=[ClientInfo("0", {7: 3})], seed=0)
    part = run.record_client(1, "0", {"w": torch.ones(2)}, num_examples=3, weight=1.0)
    run.record_round(1, [part], {"w": torch.ones(2)}, Evaluation(0.5, 1.0, torch.tensor([7])), failures={})
    (tmp_path / "logs" / "data").mkdir()
    return folder


def test_what_can_be_written_is_locked(one_round):
    with held(one_round, 1) as place:
        assert place == one_round
        assert (place / ".lock").exists()


def test_a_finished_run_is_worked_on_elsewhere(one_round, monkeypatch):
    before = {file: file.read_bytes() for file in one_round.rglob("*") if file.is_file()}
    monkeypatch.setattr(os, "access", lambda *_: False)
    with held(one_round, 1) as place:
        assert place != one_round
        assert Run.open(place).round(1).client_state("0")["w"].tolist() == [1, 1]
        assert (place.parent / "data").is_dir()
        (place / "rounds.csv").write_text("round\n1\n")
    assert not place.exists()
    assert {file: file.read_bytes() for file in one_round.rglob("*") if file.is_file()} == before


def test_an_unfinished_run_has_to_be_written(one_round, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with held(one_round, 2) as place:
        assert place == one_round


def mounted(folder: Path, *words: str) -> None:
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", *words, str(folder)], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")


@pytest.mark.slow
def test_a_run_on_a_read_only_disk_is_shown_and_a_full_disk_is_one_sentence(tmp_path):
    done = process(*TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    mounted(tmp_path / "closed", "--bind", "-o", "ro", str(tmp_path / "logs"))
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(tmp_path / "closed")], check=False)
        again = process(*TINY, "storage.dir=closed", "check_prov_cache=false", cwd=tmp_path)
        other = process(*TINY, "storage.dir=closed", "seed=3", cwd=tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path / "closed")], check=True)
    assert again.returncode == 0, again.stderr
    assert "cannot be written to: what is computed is shown here and not kept" in again.stdout
    assert other.returncode == 1
    assert other.stderr.startswith("error: storage.dir=closed: nothing can be written to closed")
    mounted(tmp_path / "full", "-t", "tmpfs", "-o", "size=60m", "tmpfs")
    try:
        full = process(*TINY, "storage.dir=full", cwd=tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path / "full")], check=True)
    assert full.returncode == 1
    assert full.stderr.count("\n") == 1, full.stderr
    assert "No space left on device): make room" in full.stderr
