"""A finished run where nothing can be written is shown from another folder."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tracefl.files import locked
from tracefl.runs import Run

log = logging.getLogger("tracefl")


@contextmanager
def held(folder: Path, num_rounds: int) -> Iterator[Path]:
    """Hold a run's folder for writing; one that is finished may be closed to writers.

    Args:
        folder: The run's.
        num_rounds: How many rounds the run is to have.

    Yields:
        The folder to work in: `folder`, locked, or one with its tables and links to its rounds.
        What is computed there is shown, and not kept.

    Raises:
        TraceFLError: Another process holds the folder; it cannot be written, and lacks rounds.
    """
    if not _finished_and_closed(folder, num_rounds):
        with locked(folder):
            yield folder
        return
    log.info("%s cannot be written to: what is computed is shown here and not kept", folder)
    place = Path(tempfile.mkdtemp(prefix="tracefl-"))
    try:
        run = place / folder.name
        run.mkdir()
        (run / "rounds").symlink_to(folder.resolve() / "rounds")
        for file in folder.resolve().iterdir():
            if file.is_file() and file.suffix != ".log" and file.name[0] != ".":
                shutil.copyfile(file, run / file.name)
        for beside in folder.resolve().parent.iterdir():  # the prepared data lie there
            if beside.name != folder.name:
                (place / beside.name).symlink_to(beside)
        yield run
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _finished_and_closed(folder: Path, num_rounds: int) -> bool:
    there = (folder / "run.json").exists() and not os.access(folder, os.W_OK)
    return there and len(Run.open(folder).rounds) >= num_rounds
