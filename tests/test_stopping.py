"""Ctrl-C and SIGTERM: a word at once, an end within 5 s whatever the main thread does, the second time at once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tracefl.runs import Run
from tracefl.stopping import ENDS_WITHIN_S, WORD, Stoppable

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM to another process")
BOTH = pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
HEAD = "import signal, sys, time\nfrom tracefl.stopping import Stoppable\n"
WORKS = HEAD + "with Stoppable():\n    print('ready', flush=True)\n    time.sleep(60)\n"
STUCK = HEAD + (  # in a call that handles no signal, as libraries' own loops do
    "import hashlib\n"
    "with Stoppable():\n"
    "    print('ready', flush=True)\n"
    "    hashlib.pbkdf2_hmac('sha256', b'word', b'salt', 10**9)\n"
)


def started(*command: str, cwd: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, *command], cwd=cwd, env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def ended(process: subprocess.Popen[str], *signals: signal.Signals) -> tuple[int, float, float, str]:
    """Exit status, seconds until the word came and until the end, and what was said after the word."""
    since = time.monotonic()
    process.send_signal(signals[0])
    assert process.stderr is not None
    first = process.stderr.readline()
    word = time.monotonic() - since
    for another in signals[1:]:
        process.send_signal(another)
    status = process.wait(timeout=60)
    took = time.monotonic() - since
    rest = process.stderr.read()
    assert first == f"{WORD}\n", first + rest
    return status, word, took, rest


@BOTH
def test_the_first_signal_interrupts(tmp_path, how):
    process = started("-c", WORKS, cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    status, _, took, rest = ended(process, how)
    assert (status, rest) == (128 + how, "")
    assert took < ENDS_WITHIN_S


@pytest.mark.slow
def test_what_hears_no_signal_is_ended_in_time(tmp_path):
    process = started("-c", STUCK, cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    status, word, took, _ = ended(process, signal.SIGTERM)
    assert status == 143
    assert word < 1
    assert took < 5


def test_the_second_signal_ends_at_once(tmp_path):
    process = started("-c", STUCK, cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    status, _, took, _ = ended(process, signal.SIGINT, signal.SIGTERM)
    assert status == 130
    assert took < 2


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Stoppable():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Stoppable():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


# Whole runs, each sent a signal in another stage.
SMALL = [
    "num_clients=4", "clients_per_round=4", "num_rounds=50", "total_cpus=2", "data_dist.max_per_client_data_size=60",
]  # fmt: skip
SLOW = [*SMALL, "client.epochs=200"]  # a round takes longer than a signal may
TRACED = [*SMALL[:2], "num_rounds=1", *SMALL[3:], "client.epochs=1", "provenance.inputs_per_label=100"]


def log_holds(words: str) -> Callable[[Path], bool]:
    return lambda folder: any(words in file.read_text() for file in folder.glob("logs/*/*.log"))


def is_training(folder: Path) -> bool:
    return log_holds("training rounds")(folder) and any(
        "ray::ClientAppActor" in " ".join(process.info["cmdline"] or []) or "ClientAppActor" in process.info["name"]
        for process in psutil.process_iter(["cmdline", "name"])
    )


def rounds_kept(folder: Path) -> int:
    headers = list(folder.glob("logs/tracefl-*/run.json"))
    return len(json.loads(headers[0].read_text())["rounds"]) if headers else 0


STAGES = {
    "preparing": (SMALL, lambda folder: (folder / "logs" / "data").exists()),
    "training": (SLOW, is_training),
    "between rounds": ([*SMALL, "client.epochs=1"], lambda folder: rounds_kept(folder) >= 2),
    "tracing": (TRACED, lambda folder: rounds_kept(folder) == 1 and log_holds("audited")(folder)),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_ends_a_run_in_time_and_keeps_complete_rounds(tmp_path, stage):
    settings, reached = STAGES[stage]
    process = started("-m", "tracefl.main", *settings, cwd=tmp_path)
    children = psutil.Process(process.pid)
    deadline = time.monotonic() + 200
    while not reached(tmp_path):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    if stage == "training":
        time.sleep(2)
    known, kept = children.children(recursive=True), rounds_kept(tmp_path)
    status, word, took, rest = ended(process, signal.SIGTERM)
    assert status == 143, rest
    assert word < 1
    assert took < 5
    assert "Traceback" not in rest
    _, alive = psutil.wait_procs(known, timeout=10)
    assert not alive, "processes were left behind"
    if kept:
        folder = next(tmp_path.glob("logs/tracefl-*"))
        assert len(Run.open(folder).rounds) >= kept
