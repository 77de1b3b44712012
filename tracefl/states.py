"""A model's state: a mapping from entry name to tensor, in memory or in a safetensors file."""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tracefl.errors import TraceFLError, require

State = Mapping[str, Tensor]

_DTYPES = {  # names of the safetensors format
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class StateFile(Mapping[str, Tensor]):
    """A state in a safetensors file: a tensor is read when it is asked for, and nothing is kept.

    The library parses the file's header again at every opening, and a file held open keeps its
    pages in memory; so the header is kept here, and a read is one seek.

    Args:
        file: path of a safetensors file.
        sha256: what the file's SHA-256 must be, checked before the first read; None: any.
        whose: who an error says that the file is of, such as "client 'ann'".
    """

    def __init__(self, file: str | PathLike[str], sha256: str | None = None, whose: str = "") -> None:
        self._file, self._sha256 = Path(file), sha256
        self._name = f"{whose}: {file}" if whose else str(file)

    @cached_property
    def _entries(self) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
        """Name -> dtype, shape, start and end in the file."""
        try:
            with self._file.open("rb") as content:
                found = self._sha256 and hashlib.file_digest(content, "sha256").hexdigest()
                changed = f"{self._name} is not the file that was recorded: restore it or train the run again"
                require(found == self._sha256, changed)
                content.seek(0)
                length, size = self._file.stat().st_size, int.from_bytes(content.read(8), "little")
                header = json.loads(content.read(min(size, length)))
            header.pop("__metadata__", None)
            entries = {}
            for name, entry in header.items():
                start, end = (8 + size + offset for offset in entry["data_offsets"])
                entries[sys.intern(name)] = entry["dtype"], tuple(entry["shape"]), start, end
        except OSError as error:
            raise TraceFLError(f"{self._name} cannot be read ({error.strerror}): correct the path") from None
        except (ValueError, AttributeError, KeyError, TypeError):
            raise TraceFLError(f"{self._name} is no safetensors file: write it with safetensors") from None
        require(all(end <= length for *_, end in entries.values()), f"{self._name} ends too early: restore it")
        return entries

    def check(self) -> None:
        """Read the header and compare the file's hash now, not at the first read.

        Raises:
            TraceFLError: the file is missing, damaged, or not the one that `sha256` stands for.
        """
        _ = self._entries

    def __getitem__(self, name: str) -> Tensor:
        kind, shape, start, end = self._entries[name]
        dtype = _DTYPES.get(kind)
        if dtype is None:
            raise TraceFLError(f"{self._name}: tensor {name!r} is of type {kind}, which is not supported")
        if start == end:
            return torch.empty(shape, dtype=dtype)
        read = np.fromfile(self._file, np.uint8, end - start, offset=start)
        return torch.from_numpy(read).view(dtype).view(shape)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def as_state(state: "State | str | PathLike[str]", whose: str) -> State:
    """A state as it is, or the one in the safetensors file of that path.

    Raises:
        TraceFLError: it is neither; the message begins with `whose` it is.
    """
    if isinstance(state, str | PathLike):
        return StateFile(state, whose=whose)
    kind = type(state).__name__
    require(isinstance(state, Mapping), f"{whose} must be a state dict or the path of a safetensors file, got a {kind}")
    return state
