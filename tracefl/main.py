"""The command line: python -m tracefl.main key=value ...

Composes and checks the configuration, runs the experiment, and turns every error that a user can mend into one
sentence and exit status 1. Heavy imports wait until the configuration is known to be good.
"""

import difflib
import os
import re
import sys

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's own errors come to us instead of being printed in several lines
# Torch's threads sleep while they wait. Spinning, they cost ten times the CPU as soon as another process is busy too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tracefl.checks import load
from tracefl.config import run_folder
from tracefl.errors import TraceFLError


@hydra.main(version_base="1.3", config_path="conf", config_name="base")
def job(composed: DictConfig) -> None:
    """One configuration from start to end. In a sweep, a failed job lets the others run."""
    try:
        config = load(composed)
        composed.dataset.name = config.dataset.name  # a folder gives its own
        resolved = OmegaConf.to_yaml(composed, resolve=True)
        if config.dry_run:
            print(f"dry run, nothing is trained; the run would be {run_folder(config)}:\n\n{resolved}")
            return
        from tracefl.pipeline import run_experiment

        run_experiment(config, resolved)
    except TraceFLError as error:
        print(f"error: {error}", file=sys.stderr)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        sys.exit(1)


OPEN_GROUPS = ("model.config.", "strategy.options.")  # their entries are not ours to list: Hydra wants ++ for such


def main() -> None:
    """Run the job; exit status 1 after an error, 130 after an interrupt."""
    sys.argv[1:] = [f"++{word}" if word.startswith(OPEN_GROUPS) else word for word in sys.argv[1:]]
    try:
        job()
    except TraceFLError:
        sys.exit(1)  # its sentence is out
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {_one_sentence(error)}")
    except KeyboardInterrupt:
        print("interrupted: complete rounds are kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)


def _one_sentence(error: Exception) -> str:
    """What Hydra or OmegaConf complain about, in one sentence that says what to do."""
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read: {str(error).splitlines()[0]}; write key=value, quoted."
    text = " ".join(f"{error} {error.__cause__ or ''}".split())
    if unknown := re.search(r"override '([^']+)'.* not in (?:struct|')", text):
        near = difflib.get_close_matches(unknown[1], _known_keys(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{unknown[1]} is no setting of TraceFL: {hint}All settings stand in tracefl/conf/base.yaml."
    if wrong := re.search(
        r"override (\S+=.*?) (?:Value|Cannot|Invalid|Incompatible|Unsupported).*?((?:to|type) \w+)", text
    ):
        return f"{wrong[1]} cannot be: it has no conversion {wrong[2]}; tracefl/conf/base.yaml shows what it takes."
    return text


def _known_keys() -> list[str]:
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_module("tracefl.conf", version_base="1.3"):
        plain = OmegaConf.to_container(compose("base"), resolve=False)
    return list(_flatten(plain))


def _flatten(node: object, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return [prefix]
    return [key for name, value in node.items() for key in _flatten(value, f"{prefix}.{name}".lstrip("."))]


if __name__ == "__main__":
    main()
