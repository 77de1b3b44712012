"""`tracefl run --json`: the job, and then its runs as JSON."""

import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from tracefl.checks import load
from tracefl.commands.show import Answer
from tracefl.main import main
from tracefl.settings import run_folder

CALLBACK = "++hydra.callbacks.finished"


class Finished(Callback):
    """Hydra calls it after every job: it adds the job's folder to a file."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if job_return.status == JobStatus.COMPLETED and isinstance(job_return.cfg, DictConfig):
            with self.file.open("a", encoding="utf-8") as handle:
                handle.write(f"{run_folder(load(job_return.cfg))}\n")


def run(typed: Sequence[str]) -> tuple[Answer, int]:
    """Do what `tracefl.main` does, with all that it prints on standard error.

    Args:
        typed: settings, and flags of Hydra's.

    Returns:
        The runs that were finished, each as `tracefl list` has it, and the exit status.
    """
    from tracefl.commands.listing import entry

    with tempfile.TemporaryDirectory() as folder:
        file, status = Path(folder) / "finished", 0
        file.touch()
        told = [f"{CALLBACK}._target_={__name__}.{Finished.__name__}", f"{CALLBACK}.file={file}"]
        try:
            with redirect_stdout(sys.stderr):
                main([*typed, *told])
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        folders = file.read_text(encoding="utf-8").splitlines()
    return {"runs": [entry(Path(name)) for name in folders if (Path(name) / "run.json").exists()]}, status
