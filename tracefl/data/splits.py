"""The splits of a dataset: from a Python package, a folder, or the hub; whole, sliced, or drawn."""

import atexit
import errno
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from huggingface_hub import constants

from tracefl.config import HUB_NAMES, MEDMNIST
from tracefl.config import Dataset as DatasetConfig
from tracefl.data.guard import check_dataset, check_paths
from tracefl.data.packaged import load_digits, load_medmnist, split_names
from tracefl.errors import TraceFLError, first_line, os_sentence, require
from tracefl.hub import use_cache_if_offline
from tracefl.settings import visible_files

HOLD_OUT = "set dataset.test_share=0.2 and dataset.test_split={train} to draw the test examples from it"
SLICES = "'dataset.train_split=train[:80%]' 'dataset.test_split=train[80%:]'"


@dataclass(frozen=True)
class Split:
    """Some rows of a dataset.

    Attributes:
        name: As the configuration writes it, such as train or train[:80%].
        table: The rows.
        rows: int64 [N], the number of each row among all of this name; None: 0 to N - 1.
    """

    name: str
    table: datasets.Dataset
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.table)

    def place(self, row: int) -> str:
        """Words that tell the user which row of the data this is."""
        return f"split {self.name}, row {row if self.rows is None else self.rows[row]}"

    def where(self, column: str, row: int | None = None) -> str:
        """The same for a row of a column, or for the whole column."""
        return f"{f'split {self.name}' if row is None else self.place(row)}, column {column}"

    def only(self, rows: np.ndarray) -> "Split":
        """These rows (int64) of the split."""
        return Split(self.name, self.table.select(rows), rows if self.rows is None else self.rows[rows])

    def column(self, name: str, first: int | None = None) -> pa.Array:
        """A column, or its first entries, as they are stored, nothing decoded."""
        found = self.table.select_columns([name]).with_format("arrow")[:first][name]
        return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def load_splits(config: DatasetConfig) -> tuple[Split, Split | None, datasets.DatasetDict]:
    """The training and the test rows, and all splits that there are.

    Returns:
        train: What `dataset.train_split` names.
        test: What `dataset.test_split` names; None where `dataset.test_share` is yet to be drawn.
        splits: By name.

    Raises:
        TraceFLError: The data cannot be loaded, or have no such rows.
    """
    splits, place, share = _load(config), config.path or config.name, config.test_share
    train, of_train = _rows(splits, place, "dataset.train_split", config.train_split)
    if share is not None:
        there = split_names(config.test_split) & splits.keys() and config.test_split != config.train_split
        both = f"dataset.test_share={share} draws test examples from {config.train_split}, but there is also a split"
        require(not there, f"{both} {config.test_split}: leave one out, with dataset.test_split={config.train_split}.")
        return train, None, splits
    hold_out = HOLD_OUT.format(train=config.train_split)
    no_test = f", {hold_out}, or slice it, as {SLICES}"
    test, of_test = _rows(splits, place, "dataset.test_split", config.test_split, no_test)
    shared = {name: len(np.intersect1d(of_train[name], of_test[name])) for name in of_train.keys() & of_test.keys()}
    count, both = sum(shared.values()), f"dataset.train_split={train.name} and dataset.test_split={test.name}"
    slices = f"name slices that do not overlap, such as {SLICES}"
    require(not count, f"{both} share {count} rows of {', '.join(shared)}: {slices}, or {hold_out}.")
    return train, test, splits


def draw_test_rows(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Row numbers of the test examples: of every class its share, drawn by seed.

    Args:
        labels: int64 [N].
        share: Of the examples of each class, rounded.
        seed: Of the drawing.

    Returns:
        int64, ascending.

    Example:
        >>> labels = np.array([0, 1] * 10)
        >>> labels[draw_test_rows(labels, 0.2, seed=0)].tolist().count(1)
        2
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = [order[labels[order] == label] for label in np.unique(labels)]
    return np.sort(np.concatenate([rows[: round(share * len(rows))] for rows in by_class]))


def _rows(
    splits: datasets.DatasetDict, place: str, key: str, spec: str, otherwise: str = ""
) -> tuple[Split, dict[str, np.ndarray]]:
    """The rows that a split's name or slices stand for, and their numbers by split."""
    sizes = {str(name): len(table) for name, table in splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(spec).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        known = f"{place}: it has {', '.join(sizes)}"
        wanted = "name one of them"
        raise TraceFLError(
            f"{key}={spec} is no split of {known}: {wanted}{otherwise or f', or slices as {SLICES}'}."
        ) from error
    numbers: dict[str, np.ndarray] = {}
    for part in parts:
        rows = np.arange(sizes[part.splitname])[part.from_ : part.to]
        numbers[part.splitname] = np.concatenate([numbers.get(part.splitname, rows[:0]), rows])
    twice = [name for name, rows in numbers.items() if len(np.unique(rows)) < len(rows)]
    require(not twice, f"{key}={spec} names rows of {', '.join(twice)} twice: name slices that do not overlap.")
    tables = [splits[name].select(rows) if len(rows) < sizes[name] else splits[name] for name, rows in numbers.items()]
    require(any(map(len, tables)), f"{key}={spec} has no rows: name another split of {', '.join(sizes)}.")
    problem = f"{key}={spec} joins splits of different columns"
    table = tables[0] if len(tables) == 1 else _reading(problem, "name one", datasets.concatenate_datasets, tables)
    return Split(spec, table), numbers


def _load(config: DatasetConfig) -> datasets.DatasetDict:
    named = f"dataset.config={config.config} names a configuration, but {config.name} has only one"
    if config.name == "digits" and not config.path:
        require(not config.config, f"{named}: leave it out.")
        return load_digits()
    if config.name in MEDMNIST and not (config.path and list(Path(config.path).rglob("*.parquet"))):
        require(not config.config, f"{named}: leave it out.")
        return load_medmnist(config)
    if config.path:
        folder = _plainly_named(Path(config.path).resolve())
        _check_names(folder, config.path)
        check_dataset(folder, config.path)
        saved = _load_saved(folder, config.path)
        if saved is not None:
            require(not config.config, f"{named}: leave it out.")
            check_paths(saved, folder, config.path)
            return saved
        place = str(folder)
        problem = f"dataset.path={config.path} cannot be read as a dataset"
        remedy = "give a folder in the hub's layout, such as train-*.parquet and test-*.parquet, each with rows"
    else:
        place = HUB_NAMES.get(config.name, config.name)
        problem = f"dataset.name={config.name} cannot be loaded from the hub as '{place}'"
        remedy = "check the name and the connection, or give a local copy with dataset.path=FOLDER"
        use_cache_if_offline()
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE
    found = _reading(problem, remedy, datasets.load_dataset, place, config.config)
    check_paths(found, Path(place) if config.path else None, config.path or config.name)
    return found


def _check_names(folder: Path, named: str) -> None:
    """Refuse what the datasets library would leave out or mix up without a word."""
    for entry in sorted(folder.iterdir()):
        word = entry.name.split("-")[0].split(".")[0]
        mixed = word != word.lower() and word.lower() in ("train", "test", "validation", "valid", "val", "dev")
        require(not mixed, f"dataset.path={named}: {entry.name} is no name of a split: write {word.lower()}.")
        inside = [entry, *sorted(entry.iterdir())] if entry.is_dir() and entry.name[0] != "." else [entry]
        for part in inside:
            linked = part.is_symlink() and part.is_dir()
            is_link = f"dataset.path={named}: {part.relative_to(folder)} is a link to a folder, which is not read"
            require(not linked, f"{is_link}: put the folder itself there.")


def _plainly_named(folder: Path) -> Path:
    """The folder, or links to its files if the datasets library reads its name as a pattern."""
    if not any(sign in str(folder) for sign in ("[", "::", "*", "?")):
        return folder
    links = Path(tempfile.mkdtemp(prefix="tracefl-"))
    atexit.register(shutil.rmtree, links, ignore_errors=True)
    for file in visible_files(folder):
        link = links / Path(file.path).relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.path)
    return links


def _load_saved(folder: Path, named: str) -> datasets.DatasetDict | None:
    """What `save_to_disk` wrote, in a folder that the user named so; None if it is none of its."""
    single = (folder / "state.json").exists() and (folder / "dataset_info.json").exists()
    if not (single or (folder / "dataset_dict.json").exists()):
        return None
    problem = f"dataset.path={named} cannot be read, although save_to_disk wrote it"
    found = _reading(problem, "save it again, with rows in every split", datasets.load_from_disk, str(folder))
    return datasets.DatasetDict({str(found.split or "train"): found}) if single else found


def _reading(problem: str, remedy: str, read, *args):  # type: ignore[no-untyped-def]
    """What `read` returns; anything that it raises becomes a sentence.

    Readers of files that somebody else wrote raise what they like: ValueError, ArrowInvalid,
    StopIteration, and others of their own around these.
    """
    logger = logging.getLogger("datasets")
    before, logger.level = logger.level, logging.CRITICAL  # it would log what the sentence says
    try:
        with _bars_on_a_terminal_only():
            return read(*args)
    except Exception as error:
        cause: BaseException = error
        while not (cause.__cause__ is None or isinstance(cause.__cause__, TraceFLError)):  # which is handled
            cause = cause.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TraceFLError(f"{problem}: {os_sentence(cause, str(datasets.config.HF_CACHE_HOME))}") from error
        several = str(error).startswith("Config name is missing")
        if several:
            listed = str(error).splitlines()[1].partition(": ")[2]
            raise TraceFLError(
                f"{problem}: it has several configurations, {listed}: set dataset.config=NAME."
            ) from error
        said = first_line(cause) if str(cause) else f"{type(cause).__name__}: a file holds nothing"
        raise TraceFLError(f"{problem} ({said}): {remedy}.") from error
    finally:
        logger.setLevel(before)


@contextmanager
def _bars_on_a_terminal_only() -> Iterator[None]:
    """Elsewhere the library's progress bars are lines between ours, once for every dataset."""
    shown = sys.stderr is not None and sys.stderr.isatty()
    if shown or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
