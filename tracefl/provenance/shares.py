"""Add up: the shares of K clients in N inputs, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tracefl.provenance.clients import States
from tracefl.provenance.contract import Buffers, Dense, Gradient, Outer, contract, through_outputs, whole


class Shares:
    """`layers`: layer -> its shares, float64 [N, K], in execution order.

    Args:
        clients: K states; a tensor of each is read once for every pass.
        base: one state, what every client is compared with; None: zero.
        with_model: add a last column for the global model itself.
        read_at_once: bytes of clients' tensors in memory at a time, where they are read from files.
    """

    def __init__(self, clients: States, base: States | None, with_model: bool, N: int, read_at_once: int):
        self.clients, self.base, self.with_model = clients, base, with_model
        self.N, self.read_at_once = N, read_at_once
        self.layers: dict[str, Tensor] = {}
        self._buffers: Buffers = {}

    def open(self, layers: Sequence[str]) -> None:
        """Make room for these layers; those that have it keep it."""
        device = self.clients.model[next(iter(self.clients.aliases))].device
        for layer in layers:
            if layer not in self.layers:
                columns = len(self.clients) + self.with_model
                self.layers[layer] = torch.zeros(self.N, columns, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, inputs: slice, factor: float, layer: str, gradients: Mapping[str, Gradient]) -> None:
        """Add `factor` times the shares of some inputs through one call of a layer.

        The layer's vectors (biases, normalisation) go end to end: one product instead of many.
        """
        vectors = {name: G.values for name, G in gradients.items() if isinstance(G, Dense) and G.values.ndim == 2}
        products = [([name], G) for name, G in gradients.items() if name not in vectors]
        if vectors:
            products.append((list(vectors), Dense(torch.cat(list(vectors.values()), 1))))
        for names, G in products:
            self._add(self.layers[layer][inputs], factor, names, G)

    def _add(self, account: Tensor, factor: float, names: list[str], G: Gradient) -> None:
        K, model = len(self.clients), self.clients.model
        theta = torch.cat([model[name] for name in names]) if len(names) > 1 else model[names[0]]
        base = None if self.base is None else self.base.tensors(names, 0, 1)[0]
        block = K if self.clients.in_memory else max(1, self.read_at_once // max(1, theta.nbytes))
        if block < K and isinstance(G, Outer) and G.select is whole and not through_outputs(G.left.shape[1], block):
            if len(G.left) * theta.nbytes <= self.read_at_once:
                G = Dense(torch.bmm(G.left.mT, G.right))  # once, not for every block of clients again
        for first in range(0, K, block):
            last = min(K, first + block)
            thetas = self.clients.tensors(names, first, last)
            if self.with_model and last == K:
                thetas.append(theta)
            found = contract(G, thetas, base, self._buffers) * factor
            if len(account) == 1:  # of one input all rows are its own
                found = found.sum(0, keepdim=True)
            account[:, first : first + len(thetas)] += found
            del thetas  # before the next block is read
