"""Add up: the shares of K clients in N inputs, layer by layer."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tracefl.provenance.clients import States
from tracefl.provenance.contract import Buffers, Dense, Gradient, contract


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
                # of a pass of one input all rows are its own
                found = contract(G, self.clients.tensors(names, some.start, some.stop), base, self._buffers)
                account[:, some] += factor * (found.sum(0) if len(account) == 1 else found)
