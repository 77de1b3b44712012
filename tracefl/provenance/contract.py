"""Multiply and add up: client k's share in input n through a tensor θ is <θ_k - base, dy_n/dθ>.

Axes, here and in the rules of layers:

    N inputs    K clients    S positions of one input (pixels, tokens)
    R rows of θ (its first axis)    C columns (the entries of a row)

In a pass of one input a layer may see it cut in N pieces (windows): all of them are its own.

A rule gives G_n = dy_n/dθ in one of three forms, whichever costs it nothing: `Dense`, `Outer` or
`Rows`. `Shares` asks for the clients' tensors, multiplies them with G, and adds up by layer.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tracefl.provenance.clients import States

TILE = 1 << 23  # bytes of clients' tensors that are multiplied at a time: they stay in the cache
BLOCK = 1 << 25  # bytes of an `Outer` that are written out at a time
Buffers = dict[tuple[object, ...], Tensor]


def whole(theta: Tensor) -> Tensor:
    """All of θ."""
    return theta


@dataclass(frozen=True)
class Dense:
    """The gradient written out.

    Attributes:
        values: [N, *θ.shape], of N inputs.
    """

    values: Tensor  # [N, *θ.shape]


@dataclass(frozen=True)
class Outer:
    """G_n = Σ_s left_ns ⊗ right_ns, as linear maps have it.

    Attributes:
        left: [N, S, R], of N inputs with S positions each; θ has R rows.
        right: [N, S, C]; a row of θ has C entries.
        select: makes of θ the slice that the gradient covers, [R, ...] with C entries a row: all of
            it, or the kernel taps of a convolution that ever see its input.
    """

    left: Tensor  # [N, S, R]
    right: Tensor  # [N, S, C]
    select: Callable[[Tensor], Tensor] = whole


@dataclass(frozen=True)
class Rows:
    """A gradient that is zero but on the rows of θ that an input looks up.

    Attributes:
        index: [N, S], whole numbers: the rows that each of N inputs looks up.
        values: [N, S, C]: the gradient of each of these rows, added up where one comes twice.
    """

    index: Tensor  # [N, S]
    values: Tensor  # [N, S, C]


Gradient = Dense | Outer | Rows


class Shares:
    """`layers`: layer -> its shares, float64 [N, K], in execution order.

    Args:
        clients: K states; every tensor of each is read once in a pass.
        base: one state, what every client is compared with; None: zero.
        N: number of inputs.
        read_at_once: bytes of clients' tensors in memory at a time, where they are read from files.
    """

    def __init__(self, clients: States, base: States | None, N: int, read_at_once: int):
        self.clients, self.base, self.N, self.read_at_once = clients, base, N, read_at_once
        self.layers: dict[str, Tensor] = {}
        self._buffers: Buffers = {}

    def open(self, layers: Sequence[str]) -> None:
        """Make room for these layers; those that have it keep it."""
        K, device = len(self.clients.states), self.clients.model[next(iter(self.clients.aliases))].device
        for layer in layers:
            self.layers.setdefault(layer, torch.zeros(self.N, K, dtype=torch.float64, device=device))

    @torch.no_grad()
    def add(self, inputs: slice, factor: float, layer: str, gradients: Mapping[str, Gradient]) -> None:
        """Add `factor` times the shares of some inputs through one call of a layer.

        The layer's vectors (biases, normalisation) go end to end: one product instead of many.
        """
        vectors = {name: G.values for name, G in gradients.items() if isinstance(G, Dense) and G.values.ndim == 2}
        products = [([name], G) for name, G in gradients.items() if name not in vectors]
        if vectors:
            products.append((list(vectors), Dense(torch.cat(list(vectors.values()), 1))))
        account, K = self.layers[layer][inputs], len(self.clients.states)
        for names, G in products:
            base = None if self.base is None else self.base.tensors(names, 0, 1)[0]
            nbytes = sum(self.clients.model[name].nbytes for name in names)
            block = K if self.clients.in_memory else max(1, self.read_at_once // max(1, nbytes))
            for first in range(0, K, block):
                some = slice(first, min(K, first + block))
                found = contract(G, self.clients.tensors(names, some.start, some.stop), base, self._buffers)
                account[:, some] += factor * (found.sum(0) if len(account) == 1 else found)


def contract(G: Gradient, thetas: Sequence[Tensor], base: Tensor | None, buffers: Buffers) -> Tensor:
    """<θ_k - base, G_n> as float64 [N, K].

    Args:
        thetas: θ of each client, K tensors of one shape.
        base: what every θ_k is compared with; None: zero.
        buffers: memory to write over; at first an empty dict, then the same one again and again.
    """
    if isinstance(G, Rows):
        return _look_up(G, thetas, base)
    if isinstance(G, Dense):
        return _multiply(G.values, thetas, base, buffers)
    thetas, base = [G.select(theta) for theta in thetas], None if base is None else G.select(base)
    (N, S, R), K, C = G.left.shape, len(thetas), G.right.shape[2]
    # Multiply-adds per input and parameter: S K through every client's outputs, S + K through the
    # gradient; to write it and to bring the clients together costs as much as 40 more.
    if S * K <= S + K + 40:
        return _by_outputs(G, thetas, base, buffers)
    rows = max(1, BLOCK // (N * G.right[0, 0].nbytes))
    shares = torch.zeros(N, K, dtype=torch.float64, device=G.left.device)
    for part in [slice(r, min(R, r + rows)) for r in range(0, R, rows)]:
        left = G.left[:, :, part].mT
        written = torch.bmm(left, G.right, out=_buffer(buffers, "gradient", left, N, left.shape[1], C))
        shares += _multiply(written, [t[part] for t in thetas], None if base is None else base[part], buffers)
    return shares


def _multiply(G: Tensor, thetas: Sequence[Tensor], base: Tensor | None, buffers: Buffers) -> Tensor:
    """Through the gradient [N, *θ.shape]: clients are put together, a tile of rows at a time."""
    N, K, G = len(G), len(thetas), G.reshape(len(G), -1)
    R = len(thetas[0]) if thetas[0].ndim else 1
    rows = max(1, TILE * R // max(1, K * thetas[0].nbytes)) | 1  # odd: even strides crowd in the cache
    shares, start = torch.zeros(N, K, dtype=torch.float64, device=G.device), 0
    for part in [...] if rows >= R else [slice(r, r + rows) for r in range(0, R, rows)]:
        some = [theta[part] for theta in thetas]
        tile = torch.stack(some, out=_buffer(buffers, "tile", G, K, *some[0].shape))
        tile = (tile if base is None else tile.sub_(base[part])).view(K, -1)
        g = G[:, start : start + tile.shape[1]]
        shares += g @ tile.T if K >= N else (tile @ g.T).T  # libraries want the longer side last
        start += tile.shape[1]
    return shares


def _by_outputs(G: Outer, thetas: Sequence[Tensor], base: Tensor | None, buffers: Buffers) -> Tensor:
    """Through the outputs z = (θ_k - base) x of every client, times dy/dz."""
    N, S, R = G.left.shape
    x, g = G.right.reshape(N * S, -1), G.left.reshape(N, S * R)
    shares = torch.empty(N, len(thetas), dtype=torch.float64, device=g.device)
    z, moved = _buffer(buffers, "outputs", x, N * S, R), _buffer(buffers, "moved", x, *thetas[0].shape)
    for k, theta in enumerate(thetas):
        if base is not None:
            theta = torch.sub(theta, base, out=moved)
        elif not theta.is_contiguous():
            theta = moved.copy_(theta)
        shares[:, k] = torch.linalg.vecdot(torch.mm(x, theta.view(R, -1).T, out=z).view(N, -1), g)
    return shares


def _look_up(G: Rows, thetas: Sequence[Tensor], base: Tensor | None) -> Tensor:
    """Only the rows that the inputs look up, of every client."""
    g, origin = G.values.flatten(1), 0 if base is None else base[G.index]
    return torch.stack([torch.linalg.vecdot((theta[G.index] - origin).flatten(1), g) for theta in thetas], 1).double()


def _buffer(buffers: Buffers, use: str, like: Tensor, *shape: int) -> Tensor:
    """Unset memory [*shape] that the next call for that use overwrites: fresh memory is slow."""
    key, size = (use, like.dtype, like.device), math.prod(shape)
    if key not in buffers or len(buffers[key]) < size:
        buffers[key] = like.new_empty(size)
    return buffers[key][:size].view(shape)
