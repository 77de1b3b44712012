"""The command line: python -m tracefl.main key=value ...

Composes and checks the configuration, runs the experiment, and turns every error that a user can
correct into one sentence and exit status 1. Heavy imports wait until the configuration is checked.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's own errors come to us instead of being printed in several lines
# Torch's threads sleep while they wait: spinning costs ten times the CPU beside a busy process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Whoever asks torch to load a file, gets tensors of it and never code.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tracefl.checks import load
from tracefl.commandline import hydra_words
from tracefl.errors import TraceFLError, as_sentence, os_sentence
from tracefl.machine import check_device, check_storage
from tracefl.settings import run_folder
from tracefl.stopping import KEPT, Stoppable


@hydra.main(version_base="1.3", config_path="conf", config_name="base")
def job(composed: DictConfig) -> None:
    """One configuration from start to end. In a sweep, a failed job lets the others run."""
    try:
        _run(composed)
    except TraceFLError as error:
        print(f"error: {error}", file=sys.stderr)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        sys.exit(1)


def _run(composed: DictConfig) -> None:
    config = load(composed)
    resolved = OmegaConf.to_yaml(OmegaConf.structured(config))
    if config.dry_run:
        print(f"dry run, nothing is trained; the run would be {run_folder(config)}:\n\n{resolved}")
        return
    check_storage(config)
    check_device(config)
    try:
        from tracefl.pipeline import run_experiment

        with as_sentence("there is not enough memory", "lower batch_size, client or model sizes", MemoryError):
            run_experiment(config, resolved)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise TraceFLError(os_sentence(error, f"storage.dir={config.storage.dir}")) from error


def main(typed: Sequence[str] | None = None) -> None:
    """Run what a command line asks for.

    Args:
        typed: Its words after the program's name; default: those of this process.

    Raises:
        SystemExit: With status 1 after an error, 130 after Ctrl-C, 143 after SIGTERM.
    """
    with Stoppable() as stopping:
        _main(sys.argv[1:] if typed is None else typed, stopping)


def _main(typed: Sequence[str], stopping: Stoppable) -> None:
    try:
        words, notes = hydra_words(typed)
    except TraceFLError as error:
        sys.exit(f"error: {error}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    sys.argv[1:] = words
    try:
        job()
        sys.stdout.flush()
    except TraceFLError:
        sys.exit(1)  # of a sweep; its sentence is printed
    except OverrideParseException as error:
        reason = str(error).splitlines()[0]
        sys.exit(f"error: {error.override} cannot be read: {reason}; write key=value, and quote it.")
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(" ".join(f"error: {error} {error.__cause__ or ''}".split()))
    except BrokenPipeError:  # of | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # of Hydra, which writes into the folder of a sweep
        sys.exit(f"error: {os_sentence(error, str(Path.cwd()))}")
    except KeyboardInterrupt:
        if not stopping.received:
            print(KEPT, file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
