"""The command line: python -m tracefl.main key=value ...

Composes and checks the configuration, runs the experiment, and turns every error that a user can
correct into one sentence and exit status 1. Heavy imports wait until the configuration is checked.
"""

import os
import sys
from collections.abc import Sequence

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's own errors come to us instead of being printed in several lines
# Torch's threads sleep while they wait: spinning costs ten times the CPU beside a busy process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tracefl.checks import check_device, load
from tracefl.commandline import hydra_words
from tracefl.errors import TraceFLError
from tracefl.settings import run_folder


@hydra.main(version_base="1.3", config_path="conf", config_name="base")
def job(composed: DictConfig) -> None:
    """One configuration from start to end. In a sweep, a failed job lets the others run."""
    try:
        config = load(composed)
        resolved = OmegaConf.to_yaml(OmegaConf.structured(config))
        if config.dry_run:
            print(f"dry run, nothing is trained; the run would be {run_folder(config)}:\n\n{resolved}")
            return
        check_device(config)
        from tracefl.pipeline import run_experiment

        run_experiment(config, resolved)
    except TraceFLError as error:
        print(f"error: {error}", file=sys.stderr)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        sys.exit(1)


def main(typed: Sequence[str] | None = None) -> None:
    """Run what a command line asks for.

    Args:
        typed: Its words after the program's name; default: those of this process.

    Raises:
        SystemExit: With status 1 after an error, 130 after an interrupt.
    """
    try:
        words, notes = hydra_words(sys.argv[1:] if typed is None else typed)
    except TraceFLError as error:
        sys.exit(f"error: {error}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    sys.argv[1:] = words
    try:
        job()
    except TraceFLError:
        sys.exit(1)  # of a sweep; its sentence is printed
    except OverrideParseException as error:
        reason = str(error).splitlines()[0]
        sys.exit(f"error: {error.override} cannot be read: {reason}; write key=value, and quote it.")
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(" ".join(f"error: {error} {error.__cause__ or ''}".split()))
    except KeyboardInterrupt:
        print("interrupted: complete rounds are kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
