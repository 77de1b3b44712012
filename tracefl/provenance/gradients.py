"""Per-input gradients G_n = dy_n/dθ in the form they come in, and their contraction S_nk = <θ_k, G_n>.

Three forms: `Outer` (a sum over S positions of left ⊗ right: linear maps), `Dense` (written out) and `Rows`
(an embedding's gradient lives on the rows looked up). A layer rule returns one form per tensor; the engine
merges, joins and contracts them without knowing the layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Select = Callable[[Tensor], Tensor]

_TILE = 1 << 23  # bytes of one tile of stacked client weights: in cache between the copy and the product
_BLOCK = 1 << 25  # bytes of written-out gradient at a time where `Outer` goes through the gradient


class Workspace:
    """Memory that is written over again and again: fresh memory costs more than the arithmetic done in it."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    def empty(self, purpose: str, like: Tensor, *shape: int) -> Tensor:
        """Unset [*shape] of the type and device of `like`, valid until the next call for the same purpose."""
        key, size = (purpose, like.dtype, like.device), math.prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = like.new_empty(size)
        return buffer[:size].view(shape)


def whole(theta: Tensor) -> Tensor:
    return theta


class Gradient(Protocol):
    """dy_n/dθ for N inputs. `select` takes from θ the part that the gradient speaks of, rows first."""

    @property
    def nbytes(self) -> int: ...

    @property
    def form(self) -> tuple[object, ...]:
        """Equal for gradients that `join`."""

    def merge(self, inputs: int) -> Gradient:
        """Sum the gradients of consecutive rows that belong to one input: [N * m, ...] -> [N, ...]."""

    def join(self, others: Sequence[Gradient]) -> Gradient:
        """The same tensor's gradients for further inputs: [N1, ...], [N2, ...] -> [N1 + N2, ...]."""

    def contract(self, thetas: Sequence[Tensor], base: Tensor | None, work: Workspace) -> Tensor:
        """<θ_k - base, G_n> as float64 [N, K]."""


@dataclass(frozen=True)
class Dense:
    values: Tensor  # [N, *θ.shape]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    @property
    def form(self) -> tuple[object, ...]:
        return Dense, self.values.shape[1:]

    def merge(self, inputs: int) -> Dense:
        values = self.values
        return self if len(values) == inputs else Dense(values.reshape(inputs, -1, *values.shape[1:]).sum(1))

    def join(self, others: Sequence[Gradient]) -> Dense:
        return Dense(torch.cat([self.values, *(o.values for o in others)]))  # type: ignore[attr-defined]

    def contract(self, thetas: Sequence[Tensor], base: Tensor | None, work: Workspace) -> Tensor:
        G = self.values.reshape(len(self.values), -1)
        S = torch.zeros(len(G), len(thetas), dtype=torch.float64, device=G.device)
        for first, tile in _tiles(thetas, base, work):
            S += _products(G[:, first : first + tile.shape[1]], tile)
        return S


@dataclass(frozen=True)
class Outer:
    left: Tensor  # [N, S, R]
    right: Tensor  # [N, S, C], for select(θ) of shape [R, ...] with C entries a row
    select: Select = whole

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes

    @property
    def form(self) -> tuple[object, ...]:
        return Outer, self.left.shape[1:], self.right.shape[1:]

    def merge(self, inputs: int) -> Outer:
        left, right = (f.reshape(inputs, -1, f.shape[-1]) for f in (self.left, self.right))
        return Outer(left, right, self.select)

    def join(self, others: Sequence[Gradient]) -> Outer:
        left = torch.cat([self.left, *(o.left for o in others)])  # type: ignore[attr-defined]
        right = torch.cat([self.right, *(o.right for o in others)])  # type: ignore[attr-defined]
        return Outer(left, right, self.select)

    def dense(self) -> Tensor:
        """The gradient written out: [N, R, C]."""
        return torch.bmm(self.left.mT, self.right)

    def contract(self, thetas: Sequence[Tensor], base: Tensor | None, work: Workspace) -> Tensor:
        N, positions, R = self.left.shape
        thetas = [self.select(t) for t in thetas]
        base = None if base is None else self.select(base)
        if _through_outputs(N, len(thetas), positions):
            return self._by_outputs(thetas, base, work)
        S = torch.zeros(N, len(thetas), dtype=torch.float64, device=self.left.device)
        C = self.right.shape[2]
        rows = max(1, _BLOCK // (N * self.right[0, 0].nbytes))
        for first in range(0, R, rows):
            part = slice(first, min(R, first + rows))
            left = self.left[:, :, part].mT
            G = torch.bmm(left, self.right, out=work.empty("gradient", left, N, left.shape[1], C))
            S += Dense(G).contract([t[part] for t in thetas], None if base is None else base[part], work)
        return S

    def _by_outputs(self, thetas: Sequence[Tensor], base: Tensor | None, work: Workspace) -> Tensor:
        """Every client's own outputs z = (θ_k - base) x, times g; its tensor is read where it lies."""
        N, positions, R = self.left.shape
        x = self.right.reshape(N * positions, -1)
        g = self.left.reshape(N, -1, 1)
        S = torch.empty(N, len(thetas), dtype=torch.float64, device=g.device)
        block = max(1, _TILE // g.nbytes)
        z = work.empty("outputs", g, min(block, len(thetas)), N * positions, R)
        moved = work.empty("moved", x, *thetas[0].shape)
        for first in range(0, len(thetas), block):
            some = thetas[first : first + block]
            for theta, out in zip(some, z.unbind(), strict=False):
                if base is not None:
                    theta = torch.sub(theta, base, out=moved)
                elif not theta.is_contiguous():
                    theta = moved.copy_(theta)
                torch.mm(x, theta.view(R, -1).T, out=out)
            by_input = z[: len(some)].view(len(some), N, -1).transpose(0, 1)
            S[:, first : first + block] = torch.bmm(by_input, g)[:, :, 0]
        return S


@dataclass(frozen=True)
class Rows:
    index: Tensor  # [N, S] rows of θ
    values: Tensor  # [N, S, C]

    @property
    def nbytes(self) -> int:
        return self.index.nbytes + self.values.nbytes

    @property
    def form(self) -> tuple[object, ...]:
        return Rows, self.values.shape[1:]

    def merge(self, inputs: int) -> Rows:
        return Rows(self.index.reshape(inputs, -1), self.values.reshape(inputs, -1, self.values.shape[-1]))

    def join(self, others: Sequence[Gradient]) -> Rows:
        index = torch.cat([self.index, *(o.index for o in others)])  # type: ignore[attr-defined]
        return Rows(index, torch.cat([self.values, *(o.values for o in others)]))  # type: ignore[attr-defined]

    def contract(self, thetas: Sequence[Tensor], base: Tensor | None, work: Workspace) -> Tensor:
        N, index = len(self.index), self.index.flatten()
        g = self.values.reshape(N, -1, 1)
        origin = None if base is None else base.index_select(0, index)
        S = torch.empty(N, len(thetas), dtype=torch.float64, device=g.device)
        for k, theta in enumerate(thetas):
            looked_up = theta.index_select(0, index)
            if origin is not None:
                looked_up -= origin
            S[:, k] = torch.bmm(looked_up.view(N, 1, -1), g).view(N)
        return S


def compact(gradient: Gradient) -> Gradient:
    """The smaller of factors and written-out gradient, to hold as many inputs as possible at once."""
    if not isinstance(gradient, Outer):
        return gradient
    _, S, R = gradient.left.shape
    C = gradient.right.shape[2]
    if gradient.select is whole and R * C <= S * (R + C):
        return Dense(gradient.dense())
    # factors may be parts of what the model computed, which is to be let go
    return Outer(gradient.left.contiguous(), gradient.right.contiguous(), gradient.select)


def written_out(gradient: Gradient, limit: int) -> Gradient:
    """The gradient as it is contracted with one block of clients after the other, if it takes at most `limit` bytes."""
    if isinstance(gradient, Outer) and gradient.select is whole:
        N, S, R = gradient.left.shape
        if S > 1 and N * R * gradient.right[0, 0].nbytes <= limit:
            return Dense(gradient.dense())
    return gradient


def _through_outputs(N: int, K: int, S: int) -> bool:
    """Is it cheaper to go through every client's outputs, S multiply-adds per parameter, input and client, than through
    the gradient: 2 S + 6 once for writing it, then one for every client? Products of few rows, and those with but N x K
    results, are slow by the measured factors.
    """
    return (2 * S + 6) / K + 1 + 35 / min(N, K) >= S + 15 / N


def _products(g: Tensor, theta: Tensor) -> Tensor:
    """[N, P], [K, P] -> [N, K]; the longer side goes last, which libraries are tuned for."""
    return g @ theta.T if len(theta) >= len(g) else (theta @ g.T).T


def _tiles(thetas: Sequence[Tensor], base: Tensor | None, work: Workspace) -> Iterator[tuple[int, Tensor]]:
    """(first entry, θ_k - base of the next entries as [K, entries]), in memory that the next tile overwrites.

    Tiles hold an odd number of rows of θ: strides of many powers of two would fall into the same sets of the cache.
    """
    first, K = thetas[0], len(thetas)
    rows = max(1, _TILE * len(first) // (K * first.nbytes)) if first.ndim and first.numel() else 1
    rows -= (rows + 1) % 2
    pieces: Iterable[tuple[Sequence[Tensor], Tensor | None]] = [(thetas, base)]
    if first.ndim and len(first) > rows:
        # unsafe_split: split without its bookkeeping for autograd, which is off here
        bases = itertools.repeat(None) if base is None else base.unsafe_split(rows)
        pieces = zip(zip(*(theta.unsafe_split(rows) for theta in thetas), strict=True), bases, strict=False)
    start = 0
    for piece, origin in pieces:
        tile = torch.stack(list(piece), out=work.empty("tile", first, K, *piece[0].shape))
        yield start, (tile if origin is None else tile.sub_(origin)).view(K, -1)
        start += piece[0].numel()
