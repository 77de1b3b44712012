"""Which columns of a dataset are the input and the label, where the configuration does not say.

The input is the one column that can be meant: the only image, or the only one that holds running
text. A column that tells the label (the label in words) is never taken by itself.
"""

import io
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from PIL import Image

from tracefl.checks import IMAGES
from tracefl.config import TEXT_COLUMNS, Config
from tracefl.config import Dataset as DatasetConfig
from tracefl.data.splits import Split
from tracefl.errors import require

LOOKED_AT = 100  # entries, to see what a column holds
SAMPLE = 20_000  # rows that are looked at, spread evenly
LETTER_OF_NO_WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
ZONE = re.compile(r"\b[A-Z]{2,4}\b")  # of a time
LETTER = re.compile(r"[^\W\d_]")
PLACE = re.compile(
    r"([a-z]+://|www\.|/|\.{1,2}[/\\]|[A-Za-z]:\\)\S*(\s+\S+){0,2}|[^.!?]*[/\\][^/\\]*\.\w{2,4}", re.DOTALL
)
TEXT_KINDS = ("string", "large_string", "string_view")


def label_column(train: Split, config: DatasetConfig) -> str:
    """The column that the configuration names, otherwise the one of classes or called label.

    Raises:
        TraceFLError: There is none, or several.
    """
    kinds, place = train.table.features, config.path or config.name
    if config.label_column:
        return _existing(kinds, "dataset.label_column", config.label_column)
    classes = [name for name in kinds if isinstance(kinds[name], datasets.ClassLabel)]
    found = classes + [name for name in kinds if name.lower() in ("label", "labels") and name not in classes]
    which = f"{place} has " + (f"several label columns, {', '.join(found)}," if found else "no label column")
    require(len(found) == 1, f"{which} among {list(kinds)}: name it with dataset.label_column=NAME.")
    return found[0]


def input_columns(train: Split, label: str, codes: np.ndarray, config: Config) -> tuple[list[str], list[str]]:
    """The columns of the input: one image, or texts that are joined.

    Args:
        train: The training split.
        label: Its label column.
        codes: Its labels, int64 [N].
        config: What dataset.input_columns names is taken; model.name says what kind is wanted.

    Returns:
        The columns, and notes for the user.

    Raises:
        TraceFLError: No column fits or several do, with the candidates.
    """
    kinds, place = train.table.features, config.dataset.path or config.dataset.name
    images = [name for name in kinds if name != label and is_image(train, name)]
    texts = [name for name in kinds if is_text(train, name)]
    others = [name for name in texts if name != label]
    named = [_existing(kinds, "dataset.input_columns", name) for name in config.dataset.input_columns]
    wanted = "name one image column or text columns with dataset.input_columns=[NAME]"
    require(named or images or others, f"{place} has neither an image nor a text among {list(kinds)}: {wanted}.")
    for name in named:
        fits = name in texts or (name in images and len(named) == 1)
        require(fits, f"dataset.input_columns={name} is neither an image nor a text to join: {wanted}.")
        require(name != label, f"dataset.input_columns={name} is the label column: {wanted}.")
        require(named.count(name) == 1, f"dataset.input_columns={name} is named twice: leave it out once.")
    known = TEXT_COLUMNS.get(config.dataset.name.rpartition("/")[2], [])
    known = known if set(known) <= set(others) else []
    for_texts = config.arch == "transformer"
    for name in [] if for_texts or images else named or others:
        values = [Path(value or "").suffix.lower() in IMAGES for value in train.column(name, LOOKED_AT).to_pylist()]
        paths = f"column {name} of {place} holds paths of images, not images"
        layout = "one folder for each class, or metadata.csv with these paths as column file_name"
        require(not any(values), f"{paths}: lay the files out as the datasets library reads them, {layout}.")
    candidates = named or (others if for_texts else images) or images or others
    _fits_model(config, candidates[0], candidates[0] not in images)
    if named:
        return named, _told(train, named, codes) if for_texts else []
    if not for_texts:
        several = f"{place} has several image columns, {', '.join(images)}"
        require(len(images) == 1, f"{several}: name the input with dataset.input_columns=[{images[0]}].")
        return images, []
    if known:
        return known, []
    return _the_text(train, others, codes, place)


def is_text(split: Split, name: str) -> bool:
    """Whether a column holds strings."""
    return getattr(split.table.features[name], "dtype", None) in TEXT_KINDS


def is_image(split: Split, name: str) -> bool:
    """Whether a column holds images, be it as bytes or as {bytes, path}."""
    kind: Any = split.table.features[name]
    if isinstance(kind, datasets.Image):
        return True
    of_bytes = kind.get("bytes") if isinstance(kind, dict) else kind
    if getattr(of_bytes, "dtype", None) not in ("binary", "large_binary", "null"):
        return False
    values = [value for value in split.column(name, LOOKED_AT).to_pylist() if value]
    files = [value if isinstance(value, bytes) else value["bytes"] for value in values]
    paths = [Path(value.get("path") or "").suffix.lower() in IMAGES for value in values if isinstance(value, dict)]
    return any(paths) or any(_opens(file) for file in files if file)


def _opens(content: bytes) -> bool:
    try:
        Image.open(io.BytesIO(content))
    except Exception:  # Pillow's readers raise what they like
        return False
    return True


def _existing(kinds: Any, key: str, name: str) -> str:
    require(name in kinds, f"{key}={name} is no column of the dataset: it has {', '.join(kinds)}.")
    return name


def _fits_model(config: Config, column: str, textual: bool) -> None:
    held, wanted = ("texts", "images") if textual else ("images", "texts")
    another = "distilbert/distilbert-base-uncased" if textual else "resnet18"
    holds = f"dataset.name={config.dataset.name} holds {held} (column {column})"
    named = f"model.path={config.model.path}" if config.model.path else f"model.name={config.model.name}"
    mismatch = f"{named} is a model for {wanted}, but {holds}"
    require(textual == (config.arch == "transformer"), f"{mismatch}: choose a model such as {another}.")


def _the_text(train: Split, texts: Sequence[str], codes: np.ndarray, place: str) -> tuple[list[str], list[str]]:
    rows = np.unique(np.linspace(0, len(train) - 1, SAMPLE).astype(np.int64))
    table = train.table.select_columns(list(texts)).select(rows).with_format(None)
    reasons = {name: _why_no_text(list(table[name]), codes[rows]) for name in texts}
    prose = [name for name in texts if reasons[name] and _is_prose(list(table[name]), codes[rows])]
    running = [name for name in texts if not reasons[name]]
    running = [name for name in texts if name in running or name in prose] if running else running
    others = ", ".join(f"{name} ({reasons[name]})" for name in texts if reasons[name])
    nested = [name for name, kind in train.table.features.items() if _holds_texts(kind)]
    others = ", ".join(filter(None, [others, *(f"{name} (lists of texts)" for name in nested)]))
    if len(running) == 1:
        return running, [f"data: not taken as input: {others}"] if others else []
    found = f"several columns that may be the text, {', '.join(running)}" if running else "no evident text"
    left = f"; not taken: {others}" if others else ""
    example = ",".join((running or list(texts))[:2])
    require(
        False, f"{place} has {found}{left}: name it, or several to be joined, with dataset.input_columns=[{example}]."
    )
    return [], []


def _is_prose(values: Sequence[str | None], codes: np.ndarray) -> bool:
    """Whether a column that seems no text has many different values of several words."""
    distinct = {value for value in values if value and value.strip()}
    words = np.mean([len(value.split()) for value in distinct]) if distinct else 0
    return len(distinct) > 5 * len(np.unique(codes)) and bool(words >= 4) and not _are_dates(sorted(distinct)[:50])


def _holds_texts(kind: Any) -> bool:
    """Whether a column holds lists or structures with texts in them."""
    inner = kind.values() if isinstance(kind, dict) else [kind.feature] if hasattr(kind, "feature") else []
    return any(getattr(part, "dtype", None) in TEXT_KINDS or _holds_texts(part) for part in inner)


def _told(train: Split, named: Sequence[str], codes: np.ndarray) -> list[str]:
    """A note for each named column that tells the label."""
    rows = np.unique(np.linspace(0, len(train) - 1, SAMPLE).astype(np.int64))
    table = train.table.select_columns(list(named)).select(rows).with_format(None)
    found = {name: _tells_label(list(table[name]), codes[rows]) for name in named}
    return [f"data: the input {name} {how}" for name, how in found.items() if how]


def _why_no_text(values: Sequence[str | None], codes: np.ndarray) -> str:
    """Why a column is not the text to classify, in words; "" if it may be."""
    texts = [value.strip() for value in values if value and value.strip()]
    if not texts:
        return "empty"
    if len(set(texts)) == 1 < len(texts):
        return "always the same"
    if told := _tells_label(values, codes):
        return told
    some = texts[:: max(1, len(texts) // 1000)]
    words = np.array([len(text.split()) + len(LETTER_OF_NO_WORD.findall(text)) / 2 for text in some])
    letters = sum(len(LETTER.findall(text)) for text in some) / sum(len("".join(text.split())) for text in some)
    if np.mean([bool(PLACE.fullmatch(text)) for text in some]) > 0.8:
        return "paths or addresses"
    if letters < 0.3:
        return "no words"
    if _are_dates(some[:50]):
        return "dates"
    if words.mean() < 2:
        return "single words"
    if words.mean() <= 5 and len(texts) / len(set(texts)) >= 10:
        return "few values, repeated"
    return ""


def _are_dates(texts: Sequence[str]) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bool(
            pd.to_datetime(pd.Series([ZONE.sub("", text) for text in texts]), errors="coerce", format="mixed", utc=True)
            .notna()
            .mean()
            > 0.8
        )


def _tells_label(values: Sequence[str | None], codes: np.ndarray) -> str:
    """How a column and the label determine each other, in words; "" if they do not.

    A column that hardly repeats a value says nothing: each text has its one label.
    """
    known = [(value, int(code)) for value, code in zip(values, codes, strict=True) if value is not None]
    texts, labels = [value for value, _ in known], [code for _, code in known]
    distinct = len(set(texts))
    if distinct < 2 or len(texts) < 3 * distinct:
        return ""
    if _determines(texts, labels):
        return "determines the label"
    return "follows from the label" if _determines(labels, texts) else ""


def _determines(keys: Sequence[Any], values: Sequence[Any]) -> bool:
    """Whether knowing the key leaves at most a tenth of the errors in guessing the value."""
    groups: dict[Any, Counter[Any]] = defaultdict(Counter)
    for key, value in zip(keys, values, strict=True):
        groups[key][value] += 1
    wrong = len(values) - sum(max(group.values()) for group in groups.values())
    blind = len(values) - max(Counter(values).values())
    return blind > 0 and wrong <= blind / 10
