"""A model's state: a mapping from entry name to tensor, in memory or in a safetensors file."""

import hashlib
import json
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracefl.errors import TraceFLError, require

State = Mapping[str, Tensor]
# What is taken for one: a mapping to tensors or NumPy arrays, the path of a safetensors file,
# Flower's ArrayRecord, or arrays in the order of the model's state dict.
Source = Mapping[str, Any] | Sequence[Any] | str | PathLike[str]

_DTYPES = {  # names of the safetensors format, in the order in which their tensors lie in a file
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
    "F32": torch.float32, "U32": torch.uint32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class StateFile(Mapping[str, Tensor]):
    """A state in a safetensors file: a tensor is read when it is asked for, and nothing is kept.

    The library parses the file's header again at every opening, and a file held open keeps its
    pages in memory; so the header is kept here, and a read is one seek.

    Args:
        file: path of a safetensors file.
        sha256: what the file's SHA-256 must be, checked before the first read; None: any.
        whose: who an error says that the file is of, such as "client 'ann'".
        order: names in the order to go through them, others last; else as in the file, which
            safetensors sorts.

    Attributes:
        metadata: the file's, once an entry was looked at (`check`).
    """

    def __init__(
        self, file: str | PathLike[str], sha256: str | None = None, whose: str = "", order: Sequence[str] = ()
    ) -> None:
        self._file, self._sha256, self._order = Path(file), sha256, order
        self._name = f"{whose}: {file}" if whose else str(file)
        self.metadata: dict[str, str] = {}

    @cached_property
    def _entries(self) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
        """Name -> dtype, shape, start and end in the file."""
        try:
            require(self._file.is_file() or not self._file.exists(), f"{self._name} is no file: correct the path")
            with self._file.open("rb") as content:
                found = self._sha256 and hashlib.file_digest(content, "sha256").hexdigest()
                changed = f"{self._name} is not the file that was recorded: restore it or train the run again"
                require(found == self._sha256, changed)
                content.seek(0)
                length, size = self._file.stat().st_size, int.from_bytes(content.read(8), "little")
                header = json.loads(content.read(min(size, length)))
            self.metadata = dict(header.pop("__metadata__", {}))
            entries, place = {}, {name: index for index, name in enumerate(self._order)}
            for name, entry in sorted(header.items(), key=lambda item: place.get(item[0], len(place))):
                start, end = (8 + size + offset for offset in entry["data_offsets"])
                entries[sys.intern(name)] = entry["dtype"], tuple(entry["shape"]), start, end
            for kind, shape, start, end in entries.values():
                if not _fits(kind, shape, end - start) or start < 8 + size:
                    raise ValueError
        except OSError as error:
            raise TraceFLError(f"{self._name} cannot be read ({error.strerror}): correct the path") from None
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
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
        try:
            read = np.fromfile(self._file, np.uint8, end - start, offset=start)
        except OSError as error:
            raise TraceFLError(f"{self._name} cannot be read ({error.strerror}): restore it") from None
        require(len(read) == end - start, f"{self._name} ends too early: restore it")
        return torch.from_numpy(read).view(dtype).view(shape)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _fits(kind: str, shape: tuple[int, ...], length: int) -> bool:
    """Whether a tensor of this type and shape has so many bytes; a type that is not known may."""
    whole = all(type(size) is int and size >= 0 for size in shape) and length >= 0
    return whole and (kind not in _DTYPES or math.prod(shape) * _DTYPES[kind].itemsize == length)


def as_file(state: State, metadata: Mapping[str, str] | None = None) -> list[memoryview]:
    """The content of a safetensors file, in parts: its header, and every tensor from where it is.

    The library's own writers copy the whole model, one of them twice.

    Args:
        state: tensors by name.
        metadata: of the file, words by name.

    Raises:
        TraceFLError: a tensor is of a type that the format does not know.
    """
    for name, tensor in state.items():
        unknown = f"entry '{name}' is of type {tensor.dtype}, which safetensors does not know"
        require(tensor.dtype in _NAMES, f"{unknown}: convert it, or leave it out")
    ranks = {dtype: rank for rank, dtype in enumerate(_NAMES)}
    names = sorted(state, key=lambda name: (ranks[state[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    parts, end = list[memoryview](), 0
    for name in names:
        tensor = state[name]
        parts.append(as_bytes(tensor).data)
        start, end = end, end + parts[-1].nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *parts]


def as_bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor on the CPU, uint8 [bytes]; a copy only where it is needed."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy()


class Renamed(Mapping[str, Tensor]):
    """A state under other names, of tensors or of arrays, which are made tensors when asked for.

    Args:
        arrays: tensors, NumPy's or Flower's arrays by any name.
        names: name of a tensor -> its name there.
    """

    def __init__(self, arrays: Mapping[str, Any], names: Mapping[str, str]) -> None:
        self._arrays, self._names = arrays, names

    def __getitem__(self, name: str) -> Any:
        """The tensor; or what is there, if that holds no numbers."""
        found = self._arrays[self._names[name]]
        if isinstance(found, Tensor):
            return found
        array = np.array(found.numpy() if hasattr(found, "numpy") else found)
        if array.dtype.kind not in "biufc":
            return found
        array = array.astype(np.float64) if array.dtype == np.longdouble else array
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def as_state(state: Source, whose: str, entries: Collection[str], saved_as: Mapping[str, str]) -> State:
    """A state in any of the forms that people have it in.

    Args:
        state: a state dict, of tensors or NumPy arrays; a mapping that reads its tensors when
            asked; the path of a safetensors file; Flower's ArrayRecord (alone in a RecordDict, or
            as Parameters of earlier versions); or a list of arrays.
        whose: who an error says that the state is of.
        entries: names of the model's state dict, in its order, which is that of a list.
        saved_as: other names of some of them -> entry.

    Raises:
        TraceFLError: it is something else, or a list of another length.
    """
    if isinstance(state, str | PathLike):
        state = StateFile(state, whose=whose)
    records = getattr(state, "array_records", None)
    if records is not None:
        require(len(records) == 1, f"{whose} must hold one ArrayRecord, got {len(records)}: pass the model's")
        state = next(iter(records.values()))
    if hasattr(state, "tensor_type"):
        from flwr.common import parameters_to_ndarrays

        state = parameters_to_ndarrays(state)  # type: ignore[arg-type]
    if isinstance(state, Mapping) and "0" not in entries and list(state) == [str(i) for i in range(len(state) or 1)]:
        state = list(state.values())  # an ArrayRecord of a list
    if isinstance(state, list | tuple):
        must = f"{whose} must have an array for each of the model's {len(entries)} entries, in their order"
        require(len(state) == len(entries), f"{must}, got {len(state)}: pass dict(zip(names, arrays))")
        state = dict(zip(entries, state, strict=True))
    kind = type(state).__name__
    forms = "a state dict, an ArrayRecord, a list of arrays or the path of a safetensors file"
    remedy = "pass its state_dict()" if hasattr(state, "state_dict") else "pass one of these"
    if not isinstance(state, Mapping):
        raise TraceFLError(f"{whose} must be {forms}, got a {kind}: {remedy}")
    names = {saved_as.get(name, name): name for name in state}
    for name in saved_as.keys() & state.keys():
        twice = saved_as[name] in state
        require(not twice, f"{whose}: tensor {saved_as[name]!r} is there twice, as {name!r} too: leave one out")
    if isinstance(state, dict) and all(isinstance(tensor, Tensor) for tensor in state.values()):
        return {name: state[there] for name, there in names.items()}
    return Renamed(state, names)


def as_real(tensor: Tensor) -> Tensor:
    """A tensor of real numbers: complex [...] as [..., 2], so that products add up as real ones."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def is_continuous(tensor: Tensor) -> bool:
    """Whether a tensor's values can change a little: floating-point or complex numbers."""
    return tensor.is_floating_point() or tensor.is_complex()


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite.

    Example:
        >>> is_finite(torch.tensor([1e38, 3e38])), is_finite(torch.tensor([1.0, float("nan")]))
        (True, False)
    """
    if not is_continuous(tensor):
        return True
    # A sum is 10 times as fast; it may overflow, but no value that is not finite leaves it finite
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
