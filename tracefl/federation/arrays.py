"""Arrays that a client has sent, opened with care.

An array comes as the bytes of a .npy file. Its header is read first and compared with what the
server expects; only then are its values copied. So nothing is unpickled, and nothing is allocated
that is larger than the model's own entry, whatever the header says.
"""

import math
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from flwr.app import Array
from numpy.lib import format as npy
from torch import Tensor

STYPE = "numpy.ndarray"  # how Flower calls the .npy format
NARROWER = {torch.float64: ("torch.float32", "torch.float16"), torch.float32: ("torch.float16",)}
KINDS = "biufc"  # NumPy's letters for truth values, whole, real and complex numbers


class BadArrayError(Exception):
    """An array that cannot be used; the text goes on "its 'w' "."""


@dataclass(frozen=True)
class Header:
    """What the bytes of an array say of it; the values begin at `start`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    start: int

    @property
    def kind(self) -> tuple[tuple[int, ...], str]:
        """Shape and type, the type as torch calls it."""
        try:
            return self.shape, str(torch.from_numpy(np.empty(0, self.dtype)).dtype)
        except TypeError:  # torch has no such type
            return self.shape, str(self.dtype)


def read_header(array: Array) -> Header:
    """Read what an array is, without its values.

    Raises:
        BadArrayError: it is no array of numbers, or its length is another than its shape says.
    """
    if array.stype != STYPE or not isinstance(array.data, bytes):
        raise BadArrayError(f"must be sent as '{STYPE}', got {array.stype!r}")
    file = BytesIO(array.data)
    try:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file)
    except Exception as error:  # of many types: the header is a text in Python's syntax
        raise BadArrayError("is no .npy array") from error
    if dtype.kind not in KINDS or not dtype.isnative:
        raise BadArrayError(f"must hold numbers in the machine's byte order, got {dtype}")
    if any(length < 0 for length in shape):
        raise BadArrayError(f"must have lengths of at least 0, got {shape}")
    if (tuple(array.shape), array.dtype) != (shape, str(dtype)):
        raise BadArrayError(f"is said to be {tuple(array.shape), array.dtype}, its bytes say {shape, str(dtype)}")
    wanted, there = math.prod(shape) * dtype.itemsize, len(array.data) - file.tell()
    if wanted != there:
        raise BadArrayError(f"must have {wanted} bytes for its shape {shape}, got {there}")
    return Header(shape, dtype, fortran, file.tell())


def read_values(array: Array, expected: Tensor) -> Tensor:
    """The values of an array, which must be of the shape and type of `expected`.

    A real type of less precision is taken too.

    Raises:
        BadArrayError: it is something else.
    """
    header = read_header(array)
    wanted, sent = (tuple(expected.shape), str(expected.dtype)), header.kind
    less = expected.is_floating_point() and sent[1] in NARROWER.get(expected.dtype, ())
    if sent[0] != wanted[0] or not (sent == wanted or less):
        raise BadArrayError(f"must be {wanted}, got {sent}")
    flat = np.frombuffer(array.data, header.dtype, offset=header.start)
    values = flat.reshape(header.shape, order="F" if header.fortran else "C")
    return torch.from_numpy(np.array(values, order="C"))
