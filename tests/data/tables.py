"""Small datasets on disk, for tests of how data are read."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tracefl.data.sources import Source, load_source
from tracefl.errors import TraceFLError

BERT = "model.name=google-bert/bert-base-cased"
WORDS = ("one fine day in spring", "the rain stayed away", "nobody knew the answer", "she went home early")


def write(folder: Path, train: dict[str, Any], **others: dict[str, Any]) -> Path:
    """A folder in the hub's layout: columns of each split, as lists or Arrow arrays."""
    folder.mkdir(exist_ok=True)
    for name, columns in {"train": train, **others}.items():
        pq.write_table(pa.table(columns), folder / f"{name}-0.parquet")
    return folder


def texts(count: int, start: int = 0) -> list[str]:
    """Different texts of several words."""
    return [f"{WORDS[k % len(WORDS)]} number {k}" for k in range(start, start + count)]


def picture(shade: int = 0) -> bytes:
    """A PNG of one grey."""
    return encoded(Image.new("L", (8, 8), shade))


def encoded(image: Image.Image, kind: str = "png") -> bytes:
    """An image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


class Reader:
    """Reads a folder as the command line would, or says why it does not."""

    def __init__(self, config: Callable[..., Any]) -> None:
        self.config = config

    def __call__(self, folder: Path, *words: str) -> Source:
        return load_source(self.config(f"dataset.path={folder}", *words))

    def refusal(self, folder: Path, *words: str) -> str:
        """The one sentence with which the data are refused."""
        with pytest.raises(TraceFLError) as error:
            self(folder, *words)
        said = str(error.value)
        assert "\n" not in said
        assert said.endswith(".")
        return said
