"""The same command in two processes, whose sets have another order, leaves the same bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.damage.tiny import contents

CHILD = """
import os, sys
from pathlib import Path
import pytest
from tests.damage.tiny import command, use_tiny_models
use_tiny_models(pytest.MonkeyPatch())
os.chdir(sys.argv[1])
command(Path("a"), "strategy.name=fedavg", "noise_multiplier=0.1", "clipping_norm=1", "do_provenance=false")()
command(Path("b"), "faulty_clients_ids=[0,1]", "label2flip={1:2,3:4,5:6}", "exclude_clients=[2]", "clients_per_round=3",
        "do_feddebug=false")()
command(Path("c"), "strategy.name=fedprox", "strategy.options.proximal_mu=0.1", "storage.keep=deltas",
        "storage.dtype=float16", "do_provenance=false")()
"""
SECONDS = "rounds.csv"  # of a run with faulty clients: it says how long an answer took


@pytest.mark.slow
def test_two_processes_leave_the_same_bytes(tmp_path):
    found = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run([sys.executable, "-c", CHILD, folder], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append({name: content for name, content in contents(folder).items() if Path(name).name != SECONDS})
    assert found[0] == found[1]
    assert sum(name.endswith("run.json") for name in found[0]) == 3
