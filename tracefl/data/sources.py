"""Where data come from: a Python package, a folder in the hub's layout, or the hub."""

from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from huggingface_hub import constants
from PIL import Image
from torch import Tensor

from tracefl.config import HUB_NAMES, MEDMNIST
from tracefl.config import Dataset as DatasetConfig
from tracefl.data.examples import IMAGE_SIZE
from tracefl.data.packaged import load_digits, load_medmnist
from tracefl.errors import as_sentence, require
from tracefl.hub import use_cache_if_offline

GREY_MODES = ("1", "L", "I", "I;16", "F")  # Pillow's


@dataclass(frozen=True)
class Source:
    """The two splits of a classification dataset, with the names of its columns and classes."""

    train: datasets.Dataset
    test: datasets.Dataset
    input_columns: list[str]
    label_column: str
    class_names: list[str]

    @property
    def is_text(self) -> bool:
        """Whether the inputs are texts; otherwise they are images."""
        return not isinstance(self.train.features[self.input_columns[0]], datasets.Image)

    def labels(self, split: datasets.Dataset) -> np.ndarray:
        """The labels of one of the splits, int64 [N]."""
        return np.asarray(split[self.label_column], dtype=np.int64)

    def texts(self, split: datasets.Dataset, rows: np.ndarray) -> list[str]:
        """One text for each of these rows (int64) of a split: its columns, joined with a space."""
        table = split.select(rows)
        columns = (table[name] for name in self.input_columns)
        return [" ".join(part for part in parts if part) for parts in zip(*columns, strict=True)]

    def pixels(self, channels: int | None, split: datasets.Dataset, rows: np.ndarray) -> dict[str, Tensor]:
        """The images in these rows of a split, decoded and resized.

        Args:
            channels: 1 (grey) or 3 (RGB); None: as the first training image has them.
            split: The training or the test split.
            rows: Row numbers, int64 [N].

        Returns:
            `pixels`, uint8 [N, channels, 32, 32].
        """
        column, size = self.input_columns[0], (IMAGE_SIZE, IMAGE_SIZE)
        grey = channels == 1 or (channels is None and self.train[0][column].mode in GREY_MODES)
        images = (image.convert("L" if grey else "RGB") for image in split.select(rows)[column])
        resized = [np.asarray(image.resize(size, Image.Resampling.BILINEAR)) for image in images]
        pixels = torch.from_numpy(np.stack(resized)).view(len(rows), *size, -1)
        return {"pixels": pixels.permute(0, 3, 1, 2).contiguous()}


def load_source(config: DatasetConfig) -> Source:
    """Load both splits, and find the columns that the configuration does not name.

    Raises:
        TraceFLError: The data cannot be loaded, or have no such split, input or label column.
    """
    splits, place = _load(config), config.path or config.name
    for key, name in (("train_split", config.train_split), ("test_split", config.test_split)):
        require(name in splits, f"dataset.{key}={name} is no split of {place}: it has {', '.join(splits)}.")
    train, test = splits[config.train_split], splits[config.test_split]
    label = _label_column(train, config)
    inputs = _input_columns(train, label, config)
    if train.features[label].dtype == "string":
        train = train.class_encode_column(label)
        problem = f"dataset.label_column={label}: the test split has labels that the training split lacks"
        with as_sentence(problem, "drop such rows", ValueError, KeyError):
            test = test.cast_column(label, train.features[label])
    source = Source(train, test, inputs, label, _class_names(train, label, config))
    last = len(source.class_names) - 1
    for name, split in ((config.train_split, train), (config.test_split, test)):
        found = source.labels(split)
        low, high = found.min(initial=0), found.max(initial=-1)
        wrong = f"dataset.label_column={label}: split {name} holds labels {low} to {high}, expected 0 to {last}"
        require(low >= 0 and 0 <= high <= last, f"{wrong}; drop such rows or raise dataset.num_classes.")
    return source


def _load(config: DatasetConfig) -> datasets.DatasetDict:
    if config.name == "digits" and not config.path:
        return load_digits()
    if config.name in MEDMNIST and not (config.path and list(Path(config.path).rglob("*.parquet"))):
        return load_medmnist(config)
    if config.path:
        place = str(Path(config.path).resolve())
        problem = f"dataset.path={config.path} cannot be read as a dataset"
        remedy = "give a folder in the hub's layout, for example with train-*.parquet and test-*.parquet"
    else:
        place = HUB_NAMES.get(config.name, config.name)
        problem = f"dataset.name={config.name} cannot be loaded from the hub as '{place}'"
        remedy = "check the name and the connection, or give a local copy with dataset.path=FOLDER"
        use_cache_if_offline()
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE
    with as_sentence(problem, remedy, OSError, ValueError, datasets.exceptions.DatasetsError):
        return datasets.load_dataset(place)


def _label_column(train: datasets.Dataset, config: DatasetConfig) -> str:
    if config.label_column:
        return _existing(train, "dataset.label_column", config.label_column)
    kinds = train.features
    found = [name for name in kinds if isinstance(kinds[name], datasets.ClassLabel)]
    found = found or [name for name in ("label", "labels") if name in kinds]
    which = f"{config.path or config.name} has {'several label columns' if found else 'no label column'}"
    require(len(found) == 1, f"{which} among {list(kinds)}: name it with dataset.label_column=NAME.")
    return found[0]


def _input_columns(train: datasets.Dataset, label: str, config: DatasetConfig) -> list[str]:
    """The columns that the configuration names, otherwise the first image or all texts."""
    kinds = train.features
    images = [name for name in kinds if isinstance(kinds[name], datasets.Image)]
    texts = [name for name in kinds if getattr(kinds[name], "dtype", None) in ("string", "large_string")]
    named = [_existing(train, "dataset.input_columns", name) for name in config.input_columns]
    inputs = named or images[:1] or [name for name in texts if name != label]
    wanted = "name one image column or text columns with dataset.input_columns=[NAME]"
    require(inputs, f"{config.path or config.name} has neither an image nor a text among {list(kinds)}: {wanted}.")
    for name in inputs:
        fits = name in texts or (name in images and len(inputs) == 1)
        require(fits, f"dataset.input_columns={name} is neither an image nor a text to join: {wanted}.")
    return inputs


def _existing(train: datasets.Dataset, key: str, name: str) -> str:
    columns = train.column_names
    require(name in columns, f"{key}={name} is no column of the dataset: it has {', '.join(columns)}.")
    return name


def _class_names(train: datasets.Dataset, label: str, config: DatasetConfig) -> list[str]:
    found = getattr(train.features[label], "names", None) or [str(k) for k in range(max(train[label]) + 1)]
    wanted, count = config.num_classes or len(found), len(found)
    small = f"dataset.num_classes={wanted} is too small"
    require(wanted >= count, f"{small}: {config.name} has {count} classes; leave it out.")
    return found + [str(index) for index in range(count, wanted)]
