"""Per-input gradients G_n = dy_n/dθ in the form they come in, and their contraction S_nk = <θ_k, G_n>.

Three forms: `Outer` (a sum over S positions of left ⊗ right: linear maps), `Dense` (written out) and `Rows`
(an embedding's gradient lives on the rows looked up). A layer rule returns one form per tensor; the engine
merges, joins and contracts them without knowing the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Select = Callable[[Tensor], Tensor]

_TILE = 1 << 22  # bytes of one tile of stacked client weights: in cache between the copy and the product
_BLOCK = 1 << 23  # bytes of written-out gradient at a time on the route through `Outer.dense`


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

    def contract(self, thetas: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """<θ_k - base, G_n> as float64 [N, K]."""


@dataclass(frozen=True)
class Dense:
    values: Tensor  # [N, *select(θ).shape]
    select: Select = whole

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    @property
    def form(self) -> tuple[object, ...]:
        return Dense, self.values.shape[1:]

    def merge(self, inputs: int) -> Dense:
        values = self.values
        return Dense(values.reshape(inputs, -1, *values.shape[1:]).sum(1), self.select)

    def join(self, others: Sequence[Gradient]) -> Dense:
        return Dense(torch.cat([self.values, *(o.values for o in others)]), self.select)  # type: ignore[attr-defined]

    def contract(self, thetas: Sequence[Tensor], base: Tensor | None) -> Tensor:
        G = self.values if self.values.ndim > 1 else self.values[:, None]  # a scalar θ has one row
        select = self.select if self.values.ndim > 1 else lambda theta: self.select(theta).reshape(1)
        S = torch.zeros(len(G), len(thetas), dtype=torch.float64, device=G.device)
        rows = _rows_per_tile(G[0, 0], len(thetas))
        for start, tile in _tiles([select(t) for t in thetas], None if base is None else select(base), rows):
            g = G[:, start : start + tile.shape[1]].reshape(len(G), -1)
            S += _products(g, tile.flatten(1))
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

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The gradient written out for some rows: [N, rows, C]."""
        return torch.bmm(self.left[:, :, start:stop].mT, self.right)

    def contract(self, thetas: Sequence[Tensor], base: Tensor | None) -> Tensor:
        (N, positions, _), C, K = self.left.shape, self.right.shape[2], len(thetas)
        thetas = [self.select(t) for t in thetas]
        base = None if base is None else self.select(base)
        S = torch.zeros(N, K, dtype=torch.float64, device=self.left.device)
        rows = _rows_per_tile(self.right[0, 0], K)
        if _through_outputs(N, K, positions):
            x = self.right.reshape(N * positions, C)
            for start, tile in _tiles(thetas, base, rows):
                g = self.left[:, :, start : start + tile.shape[1]].reshape(N * positions, -1, 1)
                z = (x @ tile.flatten(2).flatten(0, 1).T).view(N * positions, K, -1)
                S += torch.bmm(z, g).view(N, positions, K).sum(1)
            return S
        block = rows * max(1, _BLOCK // (rows * N * C * self.left.element_size()))
        G, first = self.dense(0, block).flatten(1), 0
        for start, tile in _tiles(thetas, base, rows):
            if start >= first + block:
                first = start
                G = self.dense(first, first + block).flatten(1)
            g = G[:, (start - first) * C : (start - first + tile.shape[1]) * C]
            S += _products(g, tile.flatten(1))
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

    def contract(self, thetas: Sequence[Tensor], base: Tensor | None) -> Tensor:
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
    if isinstance(gradient, Outer):
        _, S, R = gradient.left.shape
        C = gradient.right.shape[2]
        if R * C <= S * (R + C):
            return Dense(gradient.dense(), gradient.select)
    return gradient


def written_out(gradient: Gradient, limit: int) -> Gradient:
    """The gradient as it is contracted with one block of clients after the other, if it takes at most `limit` bytes."""
    if isinstance(gradient, Outer):
        N, S, R = gradient.left.shape
        if S > 1 and N * R * gradient.right.shape[2] * gradient.left.element_size() <= limit:
            return Dense(gradient.dense(), gradient.select)
    return gradient


def _through_outputs(N: int, K: int, S: int) -> bool:
    """Is K * S multiply-adds per parameter and input, through the layer's outputs, cheaper than S + K through its
    gradient? The latter's product has but N x K results, which is slow when they are few, and the gradient is
    written and read once; both measured.
    """
    return S + K * (1 + 20 / min(N, K)) + 6 >= K * S


def _products(g: Tensor, theta: Tensor) -> Tensor:
    """[N, P], [K, P] -> [N, K]; the longer side goes last, which libraries are tuned for."""
    return g @ theta.T if len(theta) >= len(g) else (theta @ g.T).T


def _rows_per_tile(row: Tensor, K: int) -> int:
    """Odd: strides of many powers of two would put the rows of a tile into the same cache sets."""
    rows = max(1, _TILE // (K * row.nbytes))
    return rows - (rows + 1) % 2


def _tiles(thetas: Sequence[Tensor], base: Tensor | None, rows: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, θ_k - base of the next rows as [K, rows, ...]), in a buffer that is written over."""
    first = thetas[0]
    if len(first) <= rows:
        tile = torch.stack(list(thetas))
        yield 0, tile if base is None else tile.sub_(base)
        return
    buffer = first.new_empty(len(thetas) * min(rows, len(first)) * first[0].numel())
    # unsafe_split: split without its bookkeeping for autograd, which is off here
    pieces = zip(*(theta.unsafe_split(rows) for theta in thetas), strict=True)
    bases = iter(()) if base is None else iter(base.unsafe_split(rows))
    for i, piece in enumerate(pieces):
        tile = buffer[: len(thetas) * piece[0].numel()].view(len(thetas), *piece[0].shape)
        torch.stack(piece, out=tile)
        if base is not None:
            tile -= next(bases)
        yield i * rows, tile
