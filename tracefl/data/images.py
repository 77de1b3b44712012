"""Images to bytes of one size."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tracefl.data.examples import IMAGE_SIZE

if TYPE_CHECKING:
    from tracefl.data.sources import Source


def encode_images(source: "Source", channels: int, split: Any, rows: np.ndarray) -> dict[str, Tensor]:
    """Decode and resize the images in the given rows of a split.

    Args:
        source: Says which column holds them.
        channels: 1 (grey) or 3 (RGB).
        split: The training or the test split.
        rows: Row numbers, int64 [N].

    Returns:
        `pixels`, uint8 [N, channels, 32, 32].
    """
    images = split.select(rows)[source.input_columns[0]]
    return {"pixels": torch.from_numpy(np.ascontiguousarray([_pixels(image, channels) for image in images]))}


def channels_of(source: "Source") -> int:
    """1 if the first training image is grey, otherwise 3."""
    return 1 if source.train[0][source.input_columns[0]].mode in ("1", "L", "I", "I;16", "F") else 3


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    resized = image.convert("RGB" if channels == 3 else "L").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    return np.asarray(resized).reshape(IMAGE_SIZE, IMAGE_SIZE, channels).transpose(2, 0, 1)
