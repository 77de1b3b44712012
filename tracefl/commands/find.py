"""Where a recorded run is: by the path of its folder, or by its name inside ./logs."""

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from tracefl.errors import TraceFLError, require

LOGS = Path("logs")
DEPTH = 3  # folders below the one that is searched
HASH = re.compile(r"-[0-9a-f]{8}$")  # of exp_key-hash
SHOWN = 3


def find_run(name: str) -> Path:
    """The folder of a run.

    Args:
        name: its path; or inside ./logs its name, or its exp_key where no other run has it.

    Raises:
        TraceFLError: there is none, or several have the name; the message names those that may have
            been meant.
    """
    path = Path(name)
    if os.path.exists(path / "run.json") or os.path.isdir(path / "rounds"):  # a damaged one has its own sentence
        return path
    there = {str(found.relative_to(LOGS)): found for found in run_folders(LOGS)}
    if name in there:
        return there[name]
    if same := [full for full in there if HASH.sub("", full) == name]:
        require(len(same) == 1, f"{len(same)} runs in {LOGS} are called {name}, {_several(same)}: name one")
        return there[same[0]]
    if os.path.isdir(path):
        inside = [str(found) for found in run_folders(path)]
        hint = f"it holds {_several(inside)}: name one" if inside else "give a run's folder"
        require(os.access(path, os.R_OK | os.X_OK), f"{path} cannot be read: give this user the right to")
        raise TraceFLError(f"{path} holds no recorded run itself (no run.json): {hint}")
    require(not os.path.exists(path), f"{path} is a file: give a run's folder")
    near = difflib.get_close_matches(name, [*there, *(HASH.sub("", full) for full in there)], SHOWN, 0.5)
    meant = f"did you mean {_several(list(dict.fromkeys(near)), 'or')}?" if near else "tracefl list shows those there"
    hint = meant if there else "give a run's folder"
    raise TraceFLError(f"{name:.100} is no folder, and {LOGS} has no run called so: {hint}")


def run_folders(folder: Path) -> Iterator[Path]:
    """The runs in a folder, by name: the folder itself, or those up to three levels below."""
    level = len(folder.parts)
    for place, below, files in os.walk(folder):
        if "run.json" in files or "rounds" in below:
            below.clear()
            yield Path(place)
        deepest = len(Path(place).parts) - level >= DEPTH
        below[:] = [] if deepest else sorted(name for name in below if name[0] != "." and name != "data")


def _several(names: list[str], word: str = "and") -> str:
    """Names in words, at most three."""
    shown = names[:SHOWN] + ([f"{len(names) - SHOWN} more"] if len(names) > SHOWN else [])
    return f"{', '.join(shown[:-1])} {word} {shown[-1]}" if len(shown) > 1 else shown[0]
