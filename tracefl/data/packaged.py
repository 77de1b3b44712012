"""Datasets that Python packages bring: scikit-learn's digits, and MedMNIST's 2-D sets."""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from tracefl.config import Dataset as DatasetConfig
from tracefl.errors import as_sentence, require
from tracefl.hub import reachable

DIGITS_TEST_SHARE = 0.2


def load_digits() -> datasets.DatasetDict:
    """1,797 handwritten digits of 8x8 pixels and 17 grey levels, always split the same way."""
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    whole = _dataset(pixels, digits.target, [str(name) for name in digits.target_names])
    return whole.train_test_split(DIGITS_TEST_SHARE, seed=0, stratify_by_column="label")


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
    problem = f"dataset.name={flag}: {file}"
    remedy = f"get it from {info['url']} and name its folder with dataset.path=FOLDER"
    available = there or (not config.path and reachable(info["url"]))
    require(available, f"{problem} does not exist and cannot be downloaded: {remedy}.")
    names = [info["label"][key] for key in sorted(info["label"], key=int)]
    splits = datasets.DatasetDict()
    wanted = split_names(config.train_split) | split_names(config.test_split)
    for split in {"train", "val", "test"} & wanted:
        with as_sentence(f"{problem} cannot be read", remedy, Exception):
            read = getattr(medmnist, info["python_class"])(split=split, root=str(folder), download=not there)
            labels = np.asarray(read.labels).reshape(len(read.imgs))  # as [N, 1] in the file
            splits[split] = _dataset(read.imgs, labels, names)
    return splits


def split_names(spec: str) -> set[str]:
    """The splits that a choice of rows reads from.

    Example:
        >>> sorted(split_names("train[:80%] + val"))
        ['train', 'val']
    """
    return {part.partition("[")[0].strip() for part in spec.split("+")}


def _dataset(pixels: np.ndarray, labels: np.ndarray, names: list[str]) -> datasets.Dataset:
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": labels}
    return datasets.Dataset.from_dict(columns, features=features)
