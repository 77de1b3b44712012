"""What a traced input looks like: a picture as PNG, or the text as the model reads it."""

import base64
import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders
from torch import Tensor

from tracefl.data.examples import MEAN, STD
from tracefl.data.prepared import tokenizer_of
from tracefl.errors import TraceFLError
from tracefl.evaluation.selection import with_trigger
from tracefl.runs import Run

MOST_LETTERS = 1200  # of a text that is shown


class Inputs:
    """The inputs of a run that can be shown; none where the server's data are not known.

    Args:
        run: the recorded run.
        trigger: whether a backdoor's trigger was put on them before they were traced.

    Attributes:
        missing: why there are none, in a sentence; "" if there are.
    """

    def __init__(self, run: Run, trigger: bool) -> None:
        self.missing, self._run, self._trigger = "", run, trigger
        try:
            self._examples = run.server_examples()
        except TraceFLError as error:
            self.missing = str(error) if "data_folder" in run else "the server's data are not in the run."

    def show(self, rows: Sequence[int], colours: int = 256, letters: int = MOST_LETTERS) -> dict[int, dict[str, str]]:
        """Row -> {"picture": a PNG in base64} or {"text": ...}.

        Args:
            rows: of the server's examples.
            colours: of a picture, 256 or 16; fewer take less room.
            letters: of a text; what is longer is cut.
        """
        if self.missing or not rows:
            return {}
        chosen = self._examples[torch.tensor(list(rows))]
        inputs: Any = (with_trigger(chosen) if self._trigger else chosen).inputs
        if isinstance(inputs, Tensor):
            return {row: {"picture": png(pixels, colours)} for row, pixels in zip(rows, inputs, strict=True)}
        tokenizer = _tokenizer(self._run.path / self._run["data_folder"])
        texts = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        read = [tokenizer.decode(ids[mask.bool()].tolist(), skip_special_tokens=True) for ids, mask in texts]
        cut = [text if len(text) <= letters else f"{text[:letters]}…" for text in read]
        return {row: {"text": text} for row, text in zip(rows, cut, strict=True)}


def png(pixels: Tensor, colours: int = 256) -> str:
    """A normalized image [3, H, W] as PNG in base64; a grey one as grey.

    Example:
        >>> from tracefl.data.examples import normalize
        >>> grey = normalize(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))[0]
        >>> image = Image.open(io.BytesIO(base64.b64decode(png(grey))))
        >>> image.mode, image.size
        ('L', (32, 32))
    """
    values = ((pixels.float().cpu() * STD + MEAN) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    grey = bool((values == values[..., :1]).all())
    image = Image.fromarray(np.ascontiguousarray(values[..., 0] if grey else values))
    options: dict[str, Any] = {"optimize": True}
    if colours < 256:
        options["bits"] = 4
        image = _sixteen_greys(values[..., 0]) if grey else image.quantize(colours, dither=Image.Dither.NONE)
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return base64.b64encode(file.getvalue()).decode()


def _sixteen_greys(values: np.ndarray) -> Image.Image:
    image = Image.fromarray((values.astype(float) / 17).round().astype(np.uint8))
    image.putpalette([level for grey in range(0, 256, 17) for level in (grey, grey, grey)])
    return image


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Tokenizer:
    tokenizer = tokenizer_of(folder, None)  # `server_examples` has compared the digest
    if tokenizer.decoder is None:
        words = type(tokenizer.model).__name__ == "WordPiece"
        tokenizer.decoder = decoders.WordPiece(cleanup=False) if words else decoders.ByteLevel()
    return tokenizer
