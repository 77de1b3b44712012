"""Where data come from: scikit-learn, MedMNIST, a folder in the hub's layout, or the hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from tracefl.config import HUB_NAMES, MEDMNIST
from tracefl.config import Dataset as DatasetConfig
from tracefl.data.medical import load_medmnist
from tracefl.errors import TraceFLError, first_line
from tracefl.hub import use_cache_if_offline

DIGITS_TEST_SHARE = 0.2


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


def load_source(config: DatasetConfig) -> Source:
    """Load both splits, and find the columns that the configuration does not name.

    Raises:
        TraceFLError: The data cannot be loaded, or have no such split, input or label column.
    """
    splits = _digits() if config.name == "digits" and not config.path else _load(config)
    train, test = (_split(splits, config, key) for key in ("train_split", "test_split"))
    label = _label_column(train, config)
    inputs = list(config.input_columns) or _columns(train, datasets.Image)[:1] or _text_columns(train, label)
    if missing := [name for name in inputs if name not in train.column_names]:
        raise TraceFLError(_no_column("dataset.input_columns", missing[0], train))
    if not inputs:
        raise TraceFLError(
            f"dataset.name={config.name} has neither an image nor a text column among {train.column_names}: "
            "name it with dataset.input_columns=[NAME]."
        )
    readable = _text_columns(train) + (_columns(train, datasets.Image) if len(inputs) == 1 else [])
    if wrong := [name for name in inputs if name not in readable]:
        raise TraceFLError(
            f"dataset.input_columns={wrong[0]} is neither an image nor a text to join, but {train.features[wrong[0]]}: "
            "name one image column or text columns."
        )
    if not isinstance(train.features[label], datasets.ClassLabel) and train.features[label].dtype == "string":
        train = train.class_encode_column(label)
        try:
            test = test.cast_column(label, train.features[label])
        except (ValueError, KeyError) as error:
            raise TraceFLError(
                f"dataset.label_column={label}: the test split has labels that the training split lacks ({error})."
            ) from error
    source = Source(train, test, inputs, label, _class_names(train, label, config))
    for name, split in ((config.train_split, train), (config.test_split, test)):
        found = source.labels(split)
        if len(found) == 0 or found.min() < 0 or found.max() >= len(source.class_names):
            raise TraceFLError(
                f"dataset.label_column={label}: split {name} holds labels {found.min(initial=0)} to "
                f"{found.max(initial=-1)}, expected 0 to {len(source.class_names) - 1}; drop such rows or raise "
                "dataset.num_classes."
            )
    return source


def _load(config: DatasetConfig) -> datasets.DatasetDict:
    if config.name in MEDMNIST and not (config.path and list(Path(config.path).rglob("*.parquet"))):
        return load_medmnist(config)
    if config.path:
        try:
            return datasets.load_dataset(str(Path(config.path).resolve()))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise TraceFLError(
                f"dataset.path={config.path} cannot be read as a dataset ({first_line(error)}): give a folder in "
                "the hub's layout, for example with train-*.parquet and test-*.parquet."
            ) from error
    name = HUB_NAMES.get(config.name, config.name)
    use_cache_if_offline()
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE
    try:
        return datasets.load_dataset(name)
    except (
        OSError,
        ValueError,
        OfflineModeIsEnabled,
        HfHubHTTPError,
        datasets.exceptions.DatasetsError,
    ) as error:
        raise TraceFLError(
            f"dataset.name={config.name} cannot be loaded from the hub as '{name}' ({first_line(error)}): check the "
            "name and the connection, or give a local copy with dataset.path=FOLDER."
        ) from error


def _digits() -> datasets.DatasetDict:
    """1,797 handwritten digits of 8x8 pixels and 17 grey levels, always split the same way."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(name) for name in digits.target_names])
    )
    images = [Image.fromarray(pixels) for pixels in (digits.images * (255 / 16)).round().astype(np.uint8)]
    whole = datasets.Dataset.from_dict({"image": images, "label": digits.target}, features=features)
    return whole.train_test_split(DIGITS_TEST_SHARE, seed=0, stratify_by_column="label")


def _split(splits: datasets.DatasetDict, config: DatasetConfig, key: str) -> datasets.Dataset:
    name = getattr(config, key)
    if name not in splits:
        raise TraceFLError(
            f"dataset.{key}={name} is no split of {config.path or config.name}: it has {', '.join(splits)}."
        )
    return splits[name]


def _columns(split: datasets.Dataset, feature: type) -> list[str]:
    return [name for name, kind in split.features.items() if isinstance(kind, feature)]


def _text_columns(split: datasets.Dataset, label: str | None = None) -> list[str]:
    kinds = {name: getattr(kind, "dtype", None) for name, kind in split.features.items() if name != label}
    return [name for name, kind in kinds.items() if kind in ("string", "large_string")]


def _label_column(split: datasets.Dataset, config: DatasetConfig) -> str:
    if config.label_column:
        if config.label_column not in split.column_names:
            raise TraceFLError(_no_column("dataset.label_column", config.label_column, split))
        return config.label_column
    found = _columns(split, datasets.ClassLabel) or [name for name in ("label", "labels") if name in split.features]
    if len(found) == 1:
        return found[0]
    raise TraceFLError(
        f"{config.path or config.name} has {'several label columns' if found else 'no label column'} among "
        f"{split.column_names}: name it with dataset.label_column=NAME."
    )


def _no_column(key: str, name: str, split: datasets.Dataset) -> str:
    return f"{key}={name} is no column of the dataset: it has {', '.join(split.column_names)}."


def _class_names(train: datasets.Dataset, label: str, config: DatasetConfig) -> list[str]:
    feature: Any = train.features[label]
    found = (
        list(feature.names)
        if isinstance(feature, datasets.ClassLabel)
        else [str(index) for index in range(max(train[label]) + 1)]
    )
    wanted = config.num_classes or len(found)
    if wanted < len(found):
        raise TraceFLError(
            f"dataset.num_classes={wanted} is too small: {config.name} has {len(found)} classes; leave it out."
        )
    return found + [str(index) for index in range(len(found), wanted)]
