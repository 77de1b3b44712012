"""Where data come from: scikit-learn's bundled digits, a local folder in the hub's layout, or the hub itself."""

import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from tracefl.config import HUB_NAMES
from tracefl.config import Dataset as DatasetConfig
from tracefl.errors import TraceFLError

DIGITS_TEST_SHARE = 0.2
HUB_TIMEOUT_S = 5


@dataclass(frozen=True)
class Source:
    """The two splits of a classification dataset and what was found about its columns."""

    train: datasets.Dataset
    test: datasets.Dataset
    input_columns: list[str]
    label_column: str
    class_names: list[str]

    def labels(self, split: datasets.Dataset) -> np.ndarray:
        """Labels of a split as int64 [N]."""
        return np.asarray(split[self.label_column], dtype=np.int64)


def load_source(config: DatasetConfig) -> Source:
    """Load both splits and find the columns.

    Raises:
        TraceFLError: the data cannot be had, or lack a split, an input or a label column.
    """
    splits = _digits() if config.name == "digits" and not config.path else _load(config)
    train, test = (_split(splits, config, key) for key in ("train_split", "test_split"))
    label = _label_column(train, config)
    inputs = list(config.input_columns) or _columns(train, datasets.Image)[:1]
    if missing := [name for name in inputs if name not in train.column_names]:
        raise TraceFLError(_no_column("dataset.input_columns", missing[0], train))
    if not inputs:
        raise TraceFLError(
            f"dataset.name={config.name} has no image column among {train.column_names}: "
            "name it with dataset.input_columns=[NAME]."
        )
    if wrong := [name for name in inputs if not isinstance(train.features[name], datasets.Image)]:
        raise TraceFLError(f"dataset.input_columns={wrong[0]} holds no images but {train.features[wrong[0]]}.")
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
    if config.path:
        try:
            return datasets.load_dataset(str(Path(config.path).resolve()))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise TraceFLError(
                f"dataset.path={config.path} cannot be read as a dataset ({_first_line(error)}): give a folder in "
                "the hub's layout, for example with train-*.parquet and test-*.parquet."
            ) from error
    name = HUB_NAMES.get(config.name, config.name)
    if not _hub_answers():  # otherwise its client retries for half a minute; a cached copy still loads
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
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
            f"dataset.name={config.name} cannot be had from the hub as '{name}' ({_first_line(error)}): check the "
            "name and the connection, or give a local copy with dataset.path=FOLDER."
        ) from error


def _hub_answers() -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT_S)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _digits() -> datasets.DatasetDict:
    """1,797 handwritten digits of 8x8 pixels and 17 grey levels, split once and for all."""
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
        else [str(index) for index in range(_largest(train[label]) + 1)]
    )
    wanted = config.num_classes or len(found)
    if wanted < len(found):
        raise TraceFLError(
            f"dataset.num_classes={wanted} is too small: {config.name} has {len(found)} classes; leave it out."
        )
    return found + [str(index) for index in range(len(found), wanted)]


def _largest(labels: Iterable[int]) -> int:
    return int(max(labels))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
