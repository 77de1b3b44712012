"""How clients' states are stored: all or the last ones, whole or as differences, rounded or not.

A tensor of a client's file is as the client sent it, unless the file's metadata says otherwise:

    rounded   in a narrower type than it was sent in; it comes back in its own type
    xor       as the XOR of its bits with those of the same tensor in the model that the round began
              with, rounded alike: every bit comes back. An update changes the low bits of a number,
              so the upper ones are 0. The bytes are ordered by their place in a number and each
              place is compressed; what does not get smaller stays as it is.
"""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracefl.config import TYPES
from tracefl.errors import TraceFLError, as_sentence, first_line
from tracefl.rules import KEEP, one_of
from tracefl.states import State, StateFile, as_bytes

METADATA = "tracefl"  # key in a file's metadata


@dataclass(frozen=True)
class Storing:
    """What a run keeps of its clients' states. The global models are always kept, exactly.

    Args:
        keep: "all"; "last:N", the states of the last N rounds; or "deltas", all of them as
            differences to the model that the round began with, without loss.
        dtype: "float32", every state as it was sent; or "float16" or "bfloat16", rounded where a
            client sent something wider.

    Raises:
        TraceFLError: a value is none of these.

    Example:
        >>> Storing("last:3").rounds, Storing("deltas").exact, Storing(dtype="float16").exact
        (3, True, False)
    """

    keep: str = "all"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        KEEP.check("storage.keep", str(self.keep))
        one_of(TYPES).check("storage.dtype", self.dtype)

    def __str__(self) -> str:
        """As on the command line."""
        return f"storage.keep={self.keep} storage.dtype={self.dtype}"

    @property
    def rounds(self) -> int | None:
        """Of how many rounds the states are kept; None: of all."""
        return int(self.keep.partition(":")[2]) if self.keep.startswith("last:") else None

    @property
    def deltas(self) -> bool:
        """Whether states are stored as differences."""
        return self.keep == "deltas"

    @property
    def exact(self) -> bool:
        """Whether states come back as they were sent."""
        return self.dtype == "float32"

    @property
    def usual(self) -> bool:
        """Whether these are the default settings."""
        return self == Storing()

    @property
    def plain(self) -> bool:
        """Whether a client's file holds its tensors as they were sent."""
        return self.exact and not self.deltas

    def as_json(self) -> dict[str, str]:
        """What run.json holds: the settings that are not the default ones."""
        return {name: value for name, value in vars(self).items() if value != getattr(Storing, name)}


def packed(state: State, base: State, storing: Storing) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A client's state as its file holds it.

    Args:
        state: as the client sent it.
        base: the model that the round began with.
        storing: how to store it.

    Returns:
        Tensors by name, and the file's metadata.

    Example:
        >>> base, sent = {"w": torch.ones(99)}, {"w": torch.full((99,), 1.001)}
        >>> tensors, metadata = packed(sent, base, Storing("deltas"))
        >>> tensors["w"].nbytes < 99, metadata
        (True, {'tracefl': '{"w": {"xor": "float32", "shape": [99]}}'})
    """
    tensors, how = dict[str, Tensor](), dict[str, dict[str, Any]]()
    for name, value in state.items():
        how[name] = {}
        stored = _rounded(value, storing)
        if stored.dtype != value.dtype:
            how[name]["rounded"] = _name(value.dtype)
        if storing.deltas and name in base and (was := base[name]).shape == value.shape and was.dtype == value.dtype:
            content = _compressed(as_bytes(stored) ^ as_bytes(was.to(stored.dtype)), stored.element_size())
            if len(content) < stored.nbytes:
                how[name] |= {"xor": _name(stored.dtype), "shape": list(value.shape)}
                stored = torch.from_numpy(content)
        tensors[name] = stored
    return tensors, {METADATA: json.dumps({name: entry for name, entry in how.items() if entry})}


class PackedFile(StateFile):
    """A client's state in a file that `packed` has made; every tensor as it was sent, or rounded.

    Args:
        file: path of the safetensors file.
        base: the model that the round began with.
        sha256: as of `StateFile`.
        order: as of `StateFile`.
    """

    def __init__(self, file: Path, base: StateFile, sha256: str | None = None, order: Sequence[str] = ()) -> None:
        super().__init__(file, sha256, order=order)
        self._base = base
        self._how: Mapping[str, Mapping[str, Any]] | None = None

    def check(self) -> None:
        """Compare the hash of the file, and of the model that its differences are to."""
        super().check()
        if any("xor" in entry for entry in self._packing().values()):
            self._base.check()

    def __getitem__(self, name: str) -> Tensor:
        stored, how = super().__getitem__(name), self._packing().get(name, {})
        broken = (ValueError, TypeError, AttributeError, LookupError, RuntimeError, zlib.error)
        with as_sentence(f"{self._name}: entry '{name}' cannot be unpacked", "restore the file", *broken):
            if "xor" in how:
                dtype, shape = getattr(torch, how["xor"]), how["shape"]
                plain = _decompressed(stored.numpy(), dtype.itemsize, math.prod(shape))
                stored = torch.from_numpy(plain ^ as_bytes(self._base[name].to(dtype))).view(dtype).view(shape)
            return stored.to(getattr(torch, how["rounded"])) if "rounded" in how else stored

    def _packing(self) -> Mapping[str, Mapping[str, Any]]:
        if self._how is None:
            try:
                self._how = {name: dict(entry) for name, entry in json.loads(self.metadata.get(METADATA, "{}")).items()}
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                problem = f"{self._name} does not say how it is packed ({first_line(error)})"
                raise TraceFLError(f"{problem}: restore the file") from None
        return self._how


def disk_line(disk: Mapping[int, int]) -> str:
    """The size on disk of every round; rounds of the same size are named together.

    Example:
        >>> disk_line({0: 44_800_000, 1: 492_000_000, 2: 492_010_000})
        'Disk: 1.0 GB; round 0: 44.8 MB; rounds 1 to 2: 492.0 MB each'
    """
    alike: list[tuple[str, list[int]]] = []
    for number, size in disk.items():
        if alike and alike[-1][0] == _size(size):
            alike[-1][1].append(number)
        else:
            alike.append((_size(size), [number]))
    parts = [f"{rounds_named(of[0], of[-1])}: {size}{' each' * (len(of) > 1)}" for size, of in alike]
    return "; ".join([f"Disk: {_size(sum(disk.values()))}", *parts])


def rounds_named(first: int, last: int) -> str:
    """Rounds as a line names them."""
    return f"round {first}" if first == last else f"rounds {first} to {last}"


def _size(count: float) -> str:
    """Bytes in the unit that suits them."""
    if count < 1000:
        return f"{count} bytes"
    for unit in ("kB", "MB"):
        count /= 1000
        if round(count, 1) < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} GB"


def _rounded(value: Tensor, storing: Storing) -> Tensor:
    """The tensor in the type to store it in: its own if that is no wider, or holds more."""
    narrow: torch.dtype = getattr(torch, storing.dtype)
    if storing.exact or not value.is_floating_point() or value.element_size() <= narrow.itemsize:
        return value
    rounded = value.to(narrow)
    return rounded if bool((rounded.isfinite() == value.isfinite()).all()) else value


def _compressed(content: np.ndarray, size: int) -> np.ndarray:
    """Numbers of `size` bytes each, place by place: the length of every place, then all of them."""
    places = [_deflated(place.tobytes()) for place in content.reshape(-1, size).T]
    lengths = np.array([len(place) for place in places], "<i8").tobytes()
    return np.frombuffer(bytearray(b"".join([lengths, *places])), np.uint8)


def _deflated(place: bytes) -> bytes:
    """As `zlib` has it, or as it is if that is no smaller."""
    # Only runs are looked for: five times as fast as level 6, and as small
    compressor = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    small = compressor.compress(place) + compressor.flush()
    return small if len(small) < len(place) else place


def _decompressed(content: np.ndarray, size: int, count: int) -> np.ndarray:
    """The bytes of `count` numbers of `size` bytes each."""
    start, places = 8 * size, []
    for length in content[:start].view("<i8").tolist():
        place = content[start : start + length].tobytes()
        places.append(np.frombuffer(place if length == count else zlib.decompress(place), np.uint8))
        start += length
    return np.stack(places, axis=1).reshape(-1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
