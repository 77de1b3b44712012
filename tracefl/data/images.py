"""Images of every mode and depth that Pillow reads, as bytes of one form.

What a form needs is found once, from the training images: whether there is colour, the range of
greys that are deeper than a byte, and the ground that transparent images are laid on.
"""

import io
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from tracefl.data.examples import IMAGE_SIZE
from tracefl.data.splits import Split
from tracefl.errors import TraceFLError, first_line, require

LARGEST = 2**26  # pixels of an image: 8192 x 8192
PROGRAMS = ("EPS", "WMF", "EMF")  # formats for which Pillow starts another program
BATCH = 256  # rows that are read at a time
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # Pillow's
DEPTHS = {
    **dict.fromkeys(("I;16", "I;16B", "I;16L", "I;16N"), "16-bit"),
    **{"I": "whole-number", "F": "floating-point"},
}
GROUNDS = (255, 0, 128, 64, 192)  # the last two only where each of the others hides an image
NAMES = {255: "white", 0: "black", 128: "mid-grey"}
VISIBLE = 24  # mean difference from the ground, of 255, below which an image counts as hidden


@dataclass(frozen=True)
class Form:
    """How images become bytes.

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        ground: Grey level under transparent images; None: no training image is transparent.
        ranges: Smallest and largest value of the training images, by depth.
        bytes: Whether any training image has 8 bits.
    """

    channels: int
    ground: int | None
    ranges: dict[str, tuple[float, float]]
    bytes: bool = True

    def notes(self) -> Iterator[str]:
        """What was decided, for the user."""
        for depth, (low, high) in self.ranges.items():
            yield f"data: {depth} greys from {low:g} to {high:g}, those of the training images, become 0 to 255"
        if self.ground is not None:
            yield f"data: transparent images are laid on {NAMES.get(self.ground, f'grey {self.ground}')}"

    def as_dict(self) -> dict[str, Any]:
        """The attributes, as JSON."""
        return asdict(self)


def find_form(train: Split, column: str, channels: int | None) -> Form:
    """Look at every training image; those that are plain bytes are not decoded for it.

    Args:
        train: The training split.
        column: Of the images.
        channels: 1 or 3; None: 3 if any training image has colour.

    Raises:
        TraceFLError: An image cannot be read; the message names its row.
    """
    declared = {"L": 1, "RGB": 3}.get(getattr(train.table.features[column], "mode", None) or "")
    colour, transparent, in_bytes, contrasts = False, False, False, []
    ranges: dict[str, tuple[float, float]] = {}
    extremes: dict[str, set[float]] = defaultdict(set)  # depth -> the outermost values of each image
    for row, stored in _stored(train, column, np.arange(len(train))):
        image = _open(train, column, row, stored)
        depth = DEPTHS.get(image.mode)
        in_bytes = in_bytes or not depth
        if not (depth or image.has_transparency_data or image.mode in ("P", "PA")):
            colour = colour or image.mode not in GREY_MODES
            continue
        image = _decode(train, column, row, stored)
        if depth:
            values = _values(image, train, column, row)
            low, high = ranges.get(depth, (np.inf, -np.inf))
            ranges[depth] = (min(low, float(values.min())), max(high, float(values.max())))
            found = np.unique(values)
            extremes[depth] |= {*found[:2].tolist(), *found[-2:].tolist()}
            continue
        rgba = np.asarray(_rgba(image), dtype=np.float32)
        visible = rgba[rgba[..., 3] > 0]
        colour = colour or bool((visible[:, :3] != visible[:, :1]).any())
        transparent = transparent or bool(rgba[..., 3].min() < 255)
        if len(visible) and rgba[..., 3].min() < 255:
            contrasts.append(_contrast(visible))
    for depth, seen in extremes.items():
        _check_spread(train, column, depth, sorted(seen))
    channels = channels or declared or (3 if colour else 1)
    return Form(channels, _ground(contrasts, channels) if transparent else None, ranges, in_bytes)


def _check_spread(train: Split, column: str, depth: str, values: list[float]) -> None:
    """Refuse a value far from all others, such as -9999, beside which the rest is one grey."""
    rest = {"smallest": values[1:], "largest": values[:-1]}
    for which, others in rest.items():
        odd = values[0] if which == "smallest" else values[-1]
        inside = max(others, default=odd) - min(others, default=odd)
        gap = min((abs(odd - other) for other in others), default=0.0)
        said = f"column {column} of split {train.name}: the {which} value of the {depth} images is {odd:g}, all others"
        lie = f"lie from {min(others, default=odd):g} to {max(others, default=odd):g}"
        require(not 0 < 10 * inside < gap, f"{said} {lie}, and would become one grey: mend or drop such pixels.")


def pixels(form: Form, column: str, split: Split, rows: np.ndarray) -> dict[str, Tensor]:
    """The images in some rows of a split, decoded and resized.

    Args:
        form: What `find_form` found.
        column: Of the images.
        split: The training or the test split.
        rows: Row numbers, int64 [N].

    Returns:
        `pixels`, uint8 [N, channels, 32, 32].

    Raises:
        TraceFLError: An image cannot be read, or is of a kind that no training image is.
    """
    images = list[np.ndarray]()
    clipped = list[float]()  # share of each deep image's values that no training image reaches
    for row, stored in _stored(split, column, rows):
        image = _to_bytes(form, split, column, row, _decode(split, column, row, stored), clipped)
        image = image.convert("L" if form.channels == 1 else "RGB")
        images.append(np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)))
    most = f"more than half of the values of {split.where(column)} are outside of the training split's"
    require(not clipped or np.mean(clipped) <= 0.5, f"{most}: bring both to one scale.")
    found = torch.from_numpy(np.stack(images)).view(len(rows), IMAGE_SIZE, IMAGE_SIZE, -1)
    return {"pixels": found.permute(0, 3, 1, 2).contiguous()}


def _to_bytes(
    form: Form, split: Split, column: str, row: int, image: Image.Image, clipped: list[float] | None = None
) -> Image.Image:
    """The image in a mode of 8 bits without transparency."""
    depth = DEPTHS.get(image.mode)
    if depth:
        kind = f"{split.where(column, row)} is a {depth} image, but no training image is"
        require(depth in form.ranges, f"{kind}: convert it to the depth of those.")
        low, high = form.ranges[depth]
        share = (_values(image, split, column, row) - low) / max(high - low, np.finfo(float).tiny)
        if clipped is not None:
            clipped.append(float(((share < 0) | (share > 1)).mean()))
        return Image.fromarray(np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8))
    kind = f"{split.where(column, row)} is an 8-bit image, but all training images are deeper"
    require(form.bytes, f"{kind}: convert it to their depth.")
    if image.has_transparency_data:
        rgba = _rgba(image)
        ground = form.ground
        if ground is None:
            opaque = np.asarray(rgba)[..., 3].min() == 255
            kind = f"{split.where(column, row)} is transparent, but no training image is"
            require(opaque, f"{kind}: lay it on the ground that fits those.")
            ground = 255
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (ground, ground, ground, 255)), rgba)
    if image.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.applyTransform(image, ImageCms.buildTransform(lab, rgb, "LAB", "RGB"))  # type: ignore[return-value]
    return image if image.mode in ("1", "L", "P", "RGB") else image.convert("RGB")


def _rgba(image: Image.Image) -> Image.Image:
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _contrast(visible: np.ndarray) -> np.ndarray:
    """How much an image differs from each ground, as grey and in colour: float [2, 2, grounds].

    The mean difference, and the share of pixels that hardly differ.

    Args:
        visible: Its pixels that are not wholly transparent, RGBA, float [N, 4].
    """
    grounds = np.array(GROUNDS, dtype=np.float32)
    grey = visible[:, :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    by_grey = np.abs(grey[:, None] - grounds)
    by_colour = np.abs(visible[:, :3, None] - grounds).max(axis=1)
    both = np.stack([by_grey, by_colour])
    return np.stack([np.average(values, axis=1, weights=visible[:, 3]) for values in (both, both < VISIBLE)], axis=1)


def _ground(contrasts: list[np.ndarray], channels: int) -> int:
    """The ground that hides part of the fewest images; of equals, from which they differ most."""
    if not contrasts:  # nothing is visible on any ground
        return GROUNDS[0]
    of_images, hidden = np.moveaxis(np.stack(contrasts)[:, 0 if channels == 1 else 1], 1, 0)
    in_part = (hidden > 0.01).mean(axis=0).round(1)
    usual = of_images.min(axis=0)[:3]
    count = 3 if usual.max() >= VISIBLE else len(GROUNDS)
    differs = [(-in_part[k], of_images[:, k].min().round(), of_images[:, k].mean().round()) for k in range(count)]
    best = max(range(count), key=differs.__getitem__)
    return GROUNDS[best]


def _values(image: Image.Image, split: Split, column: str, row: int) -> np.ndarray:
    values = np.asarray(image).astype(np.float64)
    finite = np.isfinite(values).all()
    require(finite, f"{split.where(column, row)} has pixels that are NaN or infinite: drop or mend it.")
    return values


def _stored(split: Split, column: str, rows: np.ndarray) -> Iterator[tuple[int, Any]]:
    """(row, what is stored there) of a column of images."""
    table = split.table.select_columns([column]).with_format("arrow")
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        yield from zip(part.tolist(), table[part][column].to_pylist(), strict=True)


def _open(split: Split, column: str, row: int, stored: Any) -> Image.Image:
    """An image whose mode is known, perhaps not decoded."""
    content = stored if isinstance(stored, bytes) else (stored or {}).get("bytes")
    if content:
        try:
            image = Image.open(io.BytesIO(content))
        except Exception as error:  # Pillow's readers raise what they like
            raise _unreadable(split, column, row, stored, error) from error
        _check_header(image, split, column, row)
        return image
    return _decode(split, column, row, stored)


def _decode(split: Split, column: str, row: int, stored: Any) -> Image.Image:
    place = split.where(column, row)
    value = {"bytes": stored} if isinstance(stored, bytes) else stored
    there = value is not None and (value.get("bytes") is not None or value.get("path"))
    require(there, f"{place} has no image: drop such rows.")
    require(value.get("bytes") != b"", f"{place} has an image of zero bytes: drop such rows or mend it.")
    try:
        image = Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"])
    except Exception:  # said below, or a path that only the datasets library can open
        image = None
    if image is not None:
        with image:
            _check_header(image, split, column, row)
    try:
        return datasets.Image().decode_example({"bytes": value.get("bytes"), "path": value.get("path")})
    except Exception as error:  # Pillow's readers raise what they like
        raise _unreadable(split, column, row, stored, error) from error


def _check_header(image: Image.Image, split: Split, column: str, row: int) -> None:
    """Refuse what is too large, run by other programs or of 16 bits in colour; not yet decoded."""
    holds, sides = split.where(column, row), f"{image.width} x {image.height} pixels"
    fits = image.width * image.height <= LARGEST
    require(fits, f"{holds} is an image of {sides}: drop it or make it smaller.")
    drawn = f"{holds} is {image.format}, which other programs would draw: convert it to PNG."
    require(image.format not in PROGRAMS, drawn)
    deep = image.mode not in DEPTHS and any(";16" in str(part) for part in getattr(image, "tile", ()))
    holds = f"{holds} has 16 bits in several channels, of which 8 would be read"
    require(not deep, f"{holds}: convert it to 8 bits, in its own range.")


def _unreadable(split: Split, column: str, row: int, stored: Any, error: Exception) -> TraceFLError:
    said = "no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else first_line(error)
    file = "" if isinstance(stored, bytes) or not stored.get("path") else f", file {stored['path']}"
    return TraceFLError(f"{split.where(column, row)}{file} has no readable image ({said}): drop or mend it.")
