"""Labels as the data write them, and the class numbers 0, 1, ... that they become.

Classes are a ClassLabel's names, otherwise the sorted values of the training split; whole numbers,
also those written as texts, are sorted as numbers. A test label stands for the class of its name.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import count, islice

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tracefl.config import Dataset as DatasetConfig
from tracefl.data.splits import HOLD_OUT, Split
from tracefl.errors import TraceFLError, require
from tracefl.rules import whole_number

NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?")
INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\ufeff\u00ad"))
NO_LABEL = -1  # the hub's sign for a hidden label
SHOWN = 10
KINDS = (
    (pa.types.is_temporal, "dates or times"),
    (lambda kind: pa.types.is_nested(kind), "lists or structures"),
    (lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind), "bytes"),
)


@dataclass(frozen=True)
class Written:
    """Labels of a split: `codes` int64 [N] are indices of `names`, -1 where there is no label."""

    codes: np.ndarray
    names: list[str]


def read_labels(split: Split, column: str) -> Written:
    """The labels of a split, by the names that the data give them.

    Raises:
        TraceFLError: They are no classes; the message names the first row.
    """
    if column not in split.table.column_names:
        return Written(np.full(len(split), NO_LABEL), [])
    key, values, feature = f"dataset.label_column={column}", split.column(column), split.table.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return _of_class_label(split, key, values, feature)
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    kind = values.type
    if pa.types.is_dictionary(kind):
        values = values.dictionary_decode()
        kind = values.type
    if pa.types.is_null(kind):
        return Written(np.full(len(values), -1), [])
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        mixed = type(feature).__name__ == "Json"
        require(not mixed, f"{key} holds values of several kinds in split {split.name}: make them one kind.")
        return _of_texts(split, key, values.cast(pa.large_string()))
    if pa.types.is_boolean(kind):
        return Written(pc.fill_null(values.cast(pa.int64()), -1).to_numpy(zero_copy_only=False), ["False", "True"])
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        values = _whole(split, key, values)
    if pa.types.is_integer(values.type):
        found = pa.array(np.unique(pc.drop_null(values).to_numpy(zero_copy_only=False)))
        return Written(_index(values, found), [str(value) for value in found.to_pylist()])
    what = next((words for fits, words in KINDS if fits(kind)), f"values of type {kind}")
    raise TraceFLError(f"{key} holds {what} in split {split.name}, not one class per row: name another column.")


def class_names(train: Written, split: Split, config: DatasetConfig, column: str) -> list[str]:
    """The names of the classes 0, 1, ..., filled up to `dataset.num_classes`.

    Raises:
        TraceFLError: A training row has no label, or the labels are no classes.
    """
    key, names, wanted = f"dataset.label_column={column}", train.names, config.num_classes
    missing = np.flatnonzero(train.codes < 0)
    require(
        not len(missing),
        f"{key}: {split.place(int(missing[0])) if len(missing) else ''} has no label, as {len(missing)} of"
        f" {len(split)}: drop such rows.",
    )
    if not isinstance(split.table.features[column], datasets.ClassLabel):
        names = _sorted([names[code] for code in np.unique(train.codes)], key)
        most = max(SHOWN, len(split) // 5)
        some = f"{key} holds {len(names)} different values in {len(split)} rows ({', '.join(names[:3])}, ...)"
        require(len(names) <= most, f"{some}, too many for classes: name the column of the classes.")
    blank = [name for name in names if not name.strip()]
    require(not blank, f"{key} has a class without a name: name it.")
    used = np.unique(train.codes)
    one = f"{key} holds only the label {names[0 if len(names) == 1 else int(used[0])]} in split {split.name}"
    require(len(used) > 1 or (wanted and len(names) == 1), f"{one}, and a classifier needs two: name another column.")
    if not wanted or wanted == len(names):
        return names
    require(
        wanted > len(names),
        f"dataset.num_classes={wanted} is too small: {config.name} has {len(names)} classes; leave it out.",
    )
    numbers = [number for number in map(whole_number, names) if number is not None]
    if isinstance(split.table.features[column], datasets.ClassLabel) or len(numbers) < len(names):
        return [*names, *islice(_unused(names, len(names)), wanted - len(names))]
    if set(numbers) <= set(range(wanted)):
        written = dict(zip(numbers, names, strict=True))
        return [written.get(number, str(number)) for number in range(wanted)]
    return [*names, *islice(_unused(names, max(numbers) + 1), wanted - len(names))]


def class_numbers(
    written: Written, names: list[str], split: Split, column: str, splits: dict[str, datasets.Dataset], train: str
) -> np.ndarray:
    """The classes of a test split's rows, int64 [N].

    Args:
        written: Its labels.
        names: Of the classes.
        split: The test split.
        column: Of the labels.
        splits: All splits, to name another one where this has no labels.
        train: Name of the training split.

    Raises:
        TraceFLError: A row has no label, or one that the training split lacks.
    """
    key, index = f"dataset.label_column={column}", {name: number for number, name in enumerate(names)}
    missing = written.codes < 0
    hidden = {written.names[code] for code in np.unique(written.codes[~missing])} <= {str(NO_LABEL)} - index.keys()
    if hidden:
        labelled = [name for name, table in splits.items() if name not in (train, split.name) and _has(table, column)]
        other = [f"set dataset.test_split={name}" for name in labelled] or [HOLD_OUT.format(train=train)]
        raise TraceFLError(f"{key}: split {split.name} has no labels: {' or '.join(other)}.")
    rows = np.flatnonzero(missing)
    some = split.place(int(rows[0])) if len(rows) else ""
    require(not len(rows), f"{key}: {some} has no label, as {len(rows)} of {len(split)}: drop such rows.")
    of_code = np.array([index.get(name, -1) for name in written.names], dtype=np.int64)
    classes = of_code[written.codes]
    rows = np.flatnonzero(classes < 0)
    if len(rows):
        label = written.names[written.codes[rows[0]]]
        known = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        lacks = f"{key}: {split.place(int(rows[0]))} has the label {label}, which split {train} lacks (it has {known})"
        numbers, number = [whole_number(name) for name in names], whole_number(label)
        all_whole = None not in numbers and min(n for n in numbers if n is not None) >= 0
        raises = all_whole and number is not None and number >= 0
        most = max([*(n for n in numbers if n is not None), number or 0]) + 1
        raise TraceFLError(f"{lacks}: drop such rows{f' or set dataset.num_classes={most}' if raises else ''}.")
    return classes


def _has(table: datasets.Dataset, column: str) -> bool:
    """Whether some row of a split has a label."""
    if column not in table.column_names:
        return False
    values = table.select_columns([column]).with_format("arrow")[:][column]
    return any(value not in (None, NO_LABEL) for value in pc.unique(values).to_pylist())


def _of_class_label(split: Split, key: str, values: pa.Array, feature: datasets.ClassLabel) -> Written:
    codes = pc.fill_null(values.cast(pa.int64()), NO_LABEL).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero((codes < NO_LABEL) | (codes >= len(feature.names)))
    if len(wrong):
        holds = f"{key}: {split.place(int(wrong[0]))} holds {codes[wrong[0]]}"
        raise TraceFLError(f"{holds}, but its classes are 0 to {len(feature.names) - 1}: drop such rows.")
    return Written(codes, list(feature.names))


def _of_texts(split: Split, key: str, values: pa.Array) -> Written:
    found = pc.unique(pc.drop_null(values))
    names: list[str] = found.to_pylist()
    codes = _index(values, found)
    blank = [code for code, name in enumerate(names) if not name.strip()]
    if blank:
        row = int(np.flatnonzero(np.isin(codes, blank))[0])
        raise TraceFLError(f"{key}: {split.place(row)} has a blank label: drop such rows or name their class.")
    return Written(codes, names)


def _whole(split: Split, key: str, values: pa.Array) -> pa.Array:
    """Numbers as int64; NaN, which pandas writes where nothing is, as null."""
    floats = values.cast(pa.float64())
    numbers = floats.to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(~np.isnan(numbers) & (~np.isfinite(numbers) | (numbers != np.rint(numbers))))
    if len(wrong):
        holds = f"{key}: {split.place(int(wrong[0]))} holds {values[int(wrong[0])].as_py()}"
        raise TraceFLError(f"{holds}, which is no class: name the column of the classes, or turn it into classes.")
    large = np.flatnonzero(np.abs(numbers) >= 2**53)
    if len(large):
        holds = f"{key}: {split.place(int(large[0]))} holds {numbers[large[0]]:g}"
        raise TraceFLError(f"{holds}, too large for an exact number: write it as a whole number.")
    return pa.array(np.where(np.isnan(numbers), 0, numbers).astype(np.int64), mask=np.isnan(numbers))


def _index(values: pa.Array, found: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.index_in(values, found), -1).to_numpy(zero_copy_only=False).astype(np.int64)


def _sorted(names: list[str], key: str) -> list[str]:
    numbers = {name: Decimal(name) for name in names if NUMBER.fullmatch(name)}
    if len(numbers) < len(names):
        _distinct({name: unicodedata.normalize("NFC", name).translate(INVISIBLE).strip() for name in names}, key)
        return sorted(names)
    _distinct(numbers, key)
    return sorted(names, key=numbers.__getitem__)


def _distinct(meant: Mapping[str, object], key: str) -> None:
    """Refuse two spellings of one label, such as 1 and 01."""
    first: dict[object, str] = {}
    for name, what in meant.items():
        other = first.setdefault(what, name)
        require(other == name, f"{key} writes one label as {other!r} and as {name!r}: write it in one way.")


def _unused(names: list[str], start: int) -> Iterable[str]:
    return (str(number) for number in count(start) if str(number) not in names)
