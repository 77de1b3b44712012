"""Own inputs for a recorded run: a picture or a text, through the run's preparation."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tracefl.data.examples import normalize
from tracefl.data.images import Form, pixels
from tracefl.data.plain import PlainEncoder
from tracefl.data.prepared import info_of, tokenizer_of
from tracefl.data.splits import Split
from tracefl.errors import as_sentence, require
from tracefl.runs import Run

REMEDY = "put the prepared data back, or prepare them again by the run's command"


@dataclass(frozen=True)
class _OwnFile(Split):
    """A picture that is no row of a dataset: messages name its file."""

    def where(self, column: str, row: int | None = None) -> str:
        return self.name


def image_inputs(run: Run, file: str | Path) -> Tensor:
    """A picture as the run's model takes it, float [1, 3, 32, 32].

    It is decoded, resized and scaled as the run's training images were.

    Args:
        run: of images, with the data that were prepared for it.
        file: of any format and mode that Pillow reads.

    Raises:
        TraceFLError: the run is of texts, its prepared data are gone, the file cannot be read, or
            it is of a kind that no training image is.
    """
    require("model_type" not in run["model"], f"{run.path} is a run of texts: give a text instead of {file}")
    info = info_of(_folder(run), run["data_sha256"])
    with as_sentence(f"{_folder(run) / 'data.json'} does not say how images became bytes", REMEDY, TypeError):
        form = Form(**info["images"])
    with as_sentence(f"{file} cannot be read", "give the file of an image", OSError, ValueError):
        content = Path(file).read_bytes()
    table = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": None}]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # an error says it
        read = pixels(form, "image", _OwnFile(str(file), table), np.arange(1))
    return normalize(read["pixels"])


def text_inputs(run: Run, text: str) -> tuple[dict[str, Tensor], int]:
    """A text as the run's model takes it, and how many of its tokens are left out at the end.

    Args:
        run: of texts, with the data that were prepared for it.
        text: what the training texts are; of several columns, joined with a space.

    Returns:
        inputs: input_ids and attention_mask, int64 [1, T].
        left_out: the tokens above the run's dataset.max_tokens.

    Raises:
        TraceFLError: the run is of images, its prepared data are gone, or the text is empty.
    """
    require("model_type" in run["model"], f"{run.path} is a run of images: give the file of one instead of a text")
    require(text.strip(), "the text is empty: give one that says something")
    tokenizer = tokenizer_of(_folder(run), run["data_sha256"])
    (tokens,) = PlainEncoder(tokenizer)([text])
    tokenizer.no_truncation()
    (whole,) = PlainEncoder(tokenizer)([text])
    ids = torch.tensor([tokens or [run["model"]["pad_token_id"]]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, len(whole) - len(tokens)


def _folder(run: Run) -> Path:
    own = f"{run.path} was recorded by an own Flower app, which alone knows how its inputs are prepared"
    require("data_folder" in run, f"{own}: ask in Python, by Run.trace(inputs=..., model=...)")
    return run.path / run["data_folder"]
