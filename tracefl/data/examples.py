"""Labelled examples as tensors: one safetensors file per client, one for the server.

Images are stored as bytes [N, C, 32, 32], decoded and resized once, and normalized on loading.
Texts are stored as token ids [N, T] with their lengths; loading adds the attention mask. Every
client process imports this module, so its imports are few.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

IMAGE_SIZE = 32
# ImageNet's channel statistics: what torchvision's pretrained weights expect.
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
DTYPES = {"U8": torch.uint8, "I32": torch.int32, "I64": torch.int64}  # of what prepare.py writes

Inputs = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Examples:
    """N model inputs with their labels.

    Attributes:
        inputs: Images, float [N, 3, 32, 32]; or of texts the keyword arguments input_ids and
            attention_mask, int64 [N, T], padded on the right.
        labels: int64 [N].

    Example:
        >>> import torch
        >>> from tracefl.flower import Examples
        >>> mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        >>> texts = Examples({"input_ids": 7 * mask, "attention_mask": mask}, torch.tensor([0, 1]))
        >>> len(texts), texts[torch.tensor([0])].inputs["input_ids"].tolist()
        (2, [[7, 7]])
    """

    inputs: Inputs
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> "Examples":
        """The examples at `rows` (int64); texts lose columns that are padding in all of them."""
        if isinstance(self.inputs, Tensor):
            return Examples(self.inputs[rows], self.labels[rows])
        longest = int(self.inputs["attention_mask"][rows].sum(dim=1).max()) if len(rows) else 0
        return Examples({name: value[rows, :longest] for name, value in self.inputs.items()}, self.labels[rows])

    def to(self, device: torch.device | str) -> "Examples":
        """The same examples with their tensors on `device`."""
        if isinstance(self.inputs, Tensor):
            return Examples(self.inputs.to(device), self.labels.to(device))
        return Examples({name: value.to(device) for name, value in self.inputs.items()}, self.labels.to(device))


def normalize(pixels: Tensor) -> Tensor:
    """Pixels in the scale that torchvision's pretrained weights expect.

    Args:
        pixels: uint8 [N, C, H, W] with C = 1 or 3.

    Returns:
        float32 [N, 3, H, W]; the one channel of grey images is repeated.
    """
    scaled = pixels.to(torch.float32).div_(255).expand(-1, 3, -1, -1)
    return (scaled - MEAN) / STD


def count_labels(labels: Tensor | np.ndarray) -> dict[int, int]:
    """How many examples there are of each label, by label."""
    return dict(sorted(Counter(labels.tolist()).items()))


def load_prepared(folder: Path, name: str) -> Examples:
    """Read a file of prepared data, compared with the hash in their data.json.

    Args:
        folder: where data.json is.
        name: the file's path there, as "clients/7.safetensors".

    Raises:
        OSError: it cannot be read.
        ValueError: it is not as it was prepared.
        KeyError: data.json does not know it.
    """
    return load_examples(folder / name, json.loads(_content(folder / "data.json"))["sha256"][name])


def load_examples(file: Path, sha256: str | None = None) -> Examples:
    """Read one of the files that prepare.py writes; `sha256` is what its SHA-256 must be."""
    tensors = read_tensors(file, sha256)
    _check_forms(tensors)
    if "input_ids" in tensors:
        ids, lengths = tensors["input_ids"].long(), tensors["lengths"]
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return Examples({"input_ids": ids, "attention_mask": mask}, tensors["labels"])
    return Examples(normalize(tensors["pixels"]), tensors["labels"])


def _check_forms(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless they are labels and, of each, an image or a text (`prepare`)."""
    N, images = len(tensors["labels"]), "pixels" in tensors
    forms = {name: (value.dtype, value.shape[:1], value.shape[1:]) for name, value in tensors.items()}
    must: dict[str, tuple[Any, ...]] = {"labels": (torch.int64, (N,), ())}
    if images:
        channels = 1 if forms["pixels"][2][:1] == (1,) else 3
        must["pixels"] = (torch.uint8, (N,), (channels, IMAGE_SIZE, IMAGE_SIZE))
    else:
        must |= {"input_ids": (torch.int32, (N,), tensors["input_ids"].shape[1:2]), "lengths": (torch.int32, (N,), ())}
    odd = next((name for name in must.keys() | forms.keys() if forms.get(name) != must.get(name)), None)
    if odd is not None:
        raise ValueError(f"its {odd} are not as they are prepared")


def read_tensors(file: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, read without that library, which a client need not have.

    Args:
        file: its path.
        sha256: what its SHA-256 must be; None: anything.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no safetensors file, holds other types than prepared data have, or has
            another SHA-256.
    """
    content = bytearray(_content(file))
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("it is not as it was prepared")
    start = 8 + int.from_bytes(content[:8], "little")
    if not 8 < start <= len(content):
        raise ValueError("it is no safetensors file, or not a whole one")
    header: dict[str, Any] = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} is {entry['dtype']}, must be one of {', '.join(DTYPES)}")
        begin, end = (start + offset for offset in entry["data_offsets"])
        dtype, count = DTYPES[entry["dtype"]], math.prod(entry["shape"])
        if end > len(content) or end - begin != count * dtype.itemsize:
            raise ValueError(f"{name} is cut off")
        tensors[name] = torch.empty(entry["shape"], dtype=dtype)
        if count:
            tensors[name] = torch.frombuffer(content, dtype=dtype, count=count, offset=begin).view(entry["shape"])
    return tensors


def _content(file: Path) -> bytes:
    """What is in a file; a pipe or a device in its place would keep the reader waiting."""
    if file.exists() and not file.is_file():
        raise ValueError("it is no file")
    return file.read_bytes()


def longest_text(files: Iterable[Path]) -> tuple[int, Inputs]:
    """Of the texts in these files the one with most tokens, and how many; few others are read."""
    from safetensors import safe_open

    longest, place = -1, (Path(), 0)
    for file in files:
        with safe_open(file, "pt") as tensors:
            lengths = tensors.get_tensor("lengths")
        if int(lengths.max()) > longest:
            longest, place = int(lengths.max()), (file, int(lengths.argmax()))
    file, row = place
    return longest, load_examples(file)[torch.tensor([row])].inputs
