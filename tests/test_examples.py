"""The examples run as they are and answer what they should."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_three_state_dicts():
    answer = "\n".join(run("three_state_dicts.py").splitlines()[:3])
    assert answer in (EXAMPLES.parent / "docs" / "quickstart.md").read_text()


@pytest.mark.slow
def test_a_flower_app_of_ones_own_names_the_client_of_each_corner(tmp_path):
    lines = run("own_flower_app.py", str(tmp_path / "run")).splitlines()
    assert lines[-2].startswith("  input 0, class 0: 0 +")
    assert lines[-1].startswith("  input 1, class 3: 3 +")
