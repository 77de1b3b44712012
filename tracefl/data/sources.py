"""A classification dataset as it was found: two splits, their columns, labels and classes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tracefl.config import Config
from tracefl.data.columns import input_columns, is_image, is_text, label_column
from tracefl.data.labels import class_names, class_numbers, read_labels
from tracefl.data.splits import Split, draw_test_rows, load_splits
from tracefl.errors import require

SHOWN = 12


@dataclass(frozen=True)
class Source:
    """The two splits of a classification dataset, with the names of its columns and classes.

    Attributes:
        train: The training split.
        test: The test split.
        input_columns: One of images, or those of the texts that are joined.
        label_column: Of the labels.
        class_names: Of the classes 0, 1, ...
        train_labels: Classes of the training split, int64 [N].
        test_labels: Classes of the test split, int64 [N].
        remarks: For the user, on the columns.
    """

    train: Split
    test: Split
    input_columns: list[str]
    label_column: str
    class_names: list[str]
    train_labels: np.ndarray
    test_labels: np.ndarray
    remarks: list[str]

    @property
    def is_text(self) -> bool:
        """Whether the inputs are texts; otherwise they are images."""
        return not is_image(self.train, self.input_columns[0])

    def labels(self, split: Split) -> np.ndarray:
        """The classes of one of the splits, int64 [N]."""
        return self.train_labels if split is self.train else self.test_labels

    def texts(self, split: Split, rows: np.ndarray) -> list[str]:
        """One text for each of these rows (int64) of a split: its columns, joined with a space."""
        table = split.table.select(rows)
        columns = (table[name] for name in self.input_columns)
        return [" ".join(part for part in parts if part) for parts in zip(*columns, strict=True)]

    def notes(self) -> Iterator[str]:
        """What the user is told of the columns and classes."""
        names, joined = self.class_names, " + ".join(self.input_columns)
        shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        first = f"data: input {joined}, label {self.label_column}, {len(names)} classes ({shown})"
        for note in (first, *self.remarks):
            yield " ".join(note.splitlines())  # a name may hold line breaks


def _doubts(names: list[str], train: np.ndarray, test: np.ndarray) -> Iterator[str]:
    """What the user should know of the labels."""
    absent = sorted({*test.tolist()} - {*train.tolist()})
    if absent:
        shown = ", ".join(names[k] for k in absent[:SHOWN])
        yield f"data: {np.isin(test, absent).sum()} test examples have labels that no training example has: {shown}"
    if "-1" in names and len(names) > 2:
        yield "data: the label -1 is a class here; drop such rows if it means that there is no label"


def _label_in_text(source: Source) -> Iterator[str]:
    """A remark if nearly every text names its own class, and hardly any another."""
    rows = np.unique(np.linspace(0, len(source.train) - 1, 500).astype(np.int64))
    texts, labels = source.texts(source.train, rows), source.train_labels[rows]
    names = [re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE) for name in source.class_names]
    own = np.mean([bool(names[k].search(text)) for k, text in zip(labels, texts, strict=True)])
    others = [names[(k + 1) % len(names)].search(text) for k, text in zip(labels, texts, strict=True)]
    if own > 0.9 and np.mean([found is not None for found in others]) < 0.2:
        yield "data: nearly every text names its own class, which a model will read off"


def load_source(config: Config) -> Source:
    """Load both splits, and find the columns and classes that the configuration does not name.

    Raises:
        TraceFLError: The data cannot be loaded, or have no such split, input, label or class.
    """
    of_data = config.dataset
    train, test, splits = load_splits(of_data)
    label = label_column(train, of_data)
    written = read_labels(train, label)
    names = class_names(written, train, of_data, label)
    others = {str(name): table for name, table in splits.items()}
    labels = class_numbers(written, names, train, label, others, train.name)
    inputs, remarks = input_columns(train, label, labels, config)
    if test is None:
        rows = draw_test_rows(labels, of_data.test_share or 0, config.seed)
        share = f"dataset.test_share={of_data.test_share} of {len(train)} examples in {len(names)} classes"
        require(len(rows), f"{share} is no example: raise it.")
        require(len(rows) < len(train), f"{share} is all of them: lower it.")
        rest = np.setdiff1d(np.arange(len(train)), rows)
        train, test, labels, test_labels = train.only(rest), train.only(rows), labels[rest], labels[rows]
    else:
        for name in inputs:
            lacks = f"split {test.name} has no column {name}, which split {train.name} has"
            has = ", ".join(test.table.column_names)
            require(name in test.table.column_names, f"{lacks}: it has {has}; give both the same.")
            other = f"column {name} of split {test.name} holds something else than that of split {train.name}"
            same = is_image(test, name) if is_image(train, name) else is_text(test, name)
            require(same, f"{other}: give both the same.")
        test_labels = class_numbers(read_labels(test, label), names, test, label, others, train.name)
    remarks = [*remarks, *_doubts(names, labels, test_labels)]
    source = Source(train, test, inputs, label, names, labels, test_labels, remarks)
    for split in (train, test) if source.is_text else ():
        texts = [split.column(name).cast(pa.large_string()) for name in inputs]
        some = any(pc.any(pc.match_substring_regex(column, r"\S")).as_py() for column in texts)
        empty = f"column {', '.join(inputs)} of split {split.name} is empty in every row"
        require(some, f"{empty}: name another with dataset.input_columns=[NAME].")
    if source.is_text:
        source.remarks.extend(_label_in_text(source))
    return source
