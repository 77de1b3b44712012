"""What the machine lacks for a run is said before anything is imported that takes seconds."""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tracefl.config import Config
from tracefl.errors import TraceFLError, os_sentence, require
from tracefl.settings import run_folder


def check_device(config: Config) -> None:
    """Raise a TraceFLError if the run wants a GPU and torch sees none, or fewer than it names."""
    if not config.device.startswith("cuda"):
        return
    remedy = f"device must be cpu where torch sees no GPU, got {config.device}: set device=cpu."
    require(not _for_cpus_only(), remedy)
    import torch  # takes seconds, so only where a GPU is asked for

    require(torch.cuda.is_available(), remedy)
    if config.ray.address:
        return
    count, number = torch.cuda.device_count(), int(config.device.partition(":")[2] or 0)
    there = f"of the {count} GPUs that torch sees here"
    require(number < count, f"device must name one {there}, got {config.device}: set device=cuda:{count - 1}.")
    for key, value in (("total_gpus", config.total_gpus or 0), ("client_gpu", config.client_gpu)):
        require(value <= count, f"{key} must be at most {count}, {there}, got {value}: lower it.")


def _for_cpus_only() -> bool:
    """Whether the installed torch was built without support of GPUs, as its version says."""
    try:
        return version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def check_storage(config: Config) -> None:
    """Raise a TraceFLError if a run cannot be kept where the settings say.

    A recorded run is also read from where nothing can be written.
    """
    folder, key = run_folder(config), f"storage.dir={config.storage.dir}"
    for place in (Path(config.storage.dir) / "data", folder):
        try:
            place.stat()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise TraceFLError(f"{key}: {os_sentence(error, str(place))}") from error
        nearest = next(part for part in (place, *place.absolute().parents) if os.path.lexists(part))
        what = "a link to nothing" if nearest.is_symlink() and not nearest.exists() else "no folder"
        require(nearest.is_dir(), f"{key}: {nearest} is {what}: remove it, or name another folder.")
        writable = os.access(nearest, os.W_OK | os.X_OK) or (folder / "run.json").exists()
        require(writable, f"{key}: nothing can be written to {nearest}: change its rights, or name another folder.")
