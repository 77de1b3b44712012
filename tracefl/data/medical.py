"""MedMNIST's 2-D sets with one class per image, read or downloaded by its own package."""

from pathlib import Path
from zipfile import BadZipFile

import datasets
import numpy as np
from PIL import Image

from tracefl.config import Dataset as DatasetConfig
from tracefl.errors import TraceFLError, first_line
from tracefl.hub import reachable


def load_medmnist(config: DatasetConfig) -> datasets.DatasetDict:
    """The splits that the configuration names (of train, val and test), with class names.

    Raises:
        TraceFLError: The file is missing and cannot be downloaded, or is not one of MedMNIST's.
    """
    import medmnist  # takes seconds, so only for its sets

    flag, info = config.name, medmnist.INFO[config.name]
    folder = Path(config.path or medmnist.info.DEFAULT_ROOT or ".")
    file = folder / f"{flag}.npz"
    there = file.exists()
    remedy = f"get it from {info['url']} and name its folder with dataset.path=FOLDER."
    if not there and (config.path or not reachable(info["url"])):
        raise TraceFLError(f"dataset.name={flag}: {file} does not exist and cannot be downloaded; {remedy}")
    names = [info["label"][key] for key in sorted(info["label"], key=int)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    splits = datasets.DatasetDict()
    for split in {"train", "val", "test"} & {config.train_split, config.test_split}:
        try:
            read = getattr(medmnist, info["python_class"])(split=split, root=str(folder), download=not there)
            images = [Image.fromarray(pixels) for pixels in read.imgs]
            labels = np.asarray(read.labels).reshape(len(images))  # as [N, 1] in the file
            splits[split] = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        except (RuntimeError, OSError, KeyError, ValueError, TypeError, BadZipFile) as error:
            raise TraceFLError(f"dataset.name={flag}: {file} cannot be read ({first_line(error)}); {remedy}") from error
    return splits
