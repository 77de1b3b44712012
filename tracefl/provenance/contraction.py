"""Gradients of inputs meet the tensors of clients: S_nk = <θ_k - base, G_n>, tensor by tensor, added up by layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tracefl.provenance.clients import Clients, State, read
from tracefl.provenance.collect import Group
from tracefl.provenance.gradients import Gradient, written_out


class Ledger:
    """One account [N, K] a layer, and with `with_global` a column more for the global model itself.

    A client's tensor is read once for every group of inputs, and where states load lazily, no more of them than take
    `scratch` bytes are held at a time.
    """

    def __init__(
        self, clients: Clients, model: Mapping[str, Tensor], base: State | None, with_global: bool, scratch: int
    ):
        self.clients, self.model, self.base, self.with_global = clients, model, base, with_global
        self.scratch = scratch
        self.layers: dict[str, Tensor] = {}

    def open(self, layers: list[str], N: int) -> None:
        """Accounts of layers that have none yet."""
        K = len(self.clients.ids) + self.with_global
        for layer in layers:
            self.layers.setdefault(layer, torch.zeros(N, K, dtype=torch.float64))

    def misses(self, change: Tensor) -> float:
        """Mean |global model's column - change of y| as a fraction of the mean |change|."""
        total = torch.stack([account[:, -1] for account in self.layers.values()]).sum(0)
        return float((total - change).abs().sum() / change.abs().sum().clamp_min(1e-300))

    def halve(self) -> None:
        for account in self.layers.values():
            account /= 2

    @torch.no_grad()
    def add(self, group: Group, factor: float = 1.0) -> None:
        """Enter `factor` times the shares of one group of inputs."""
        K = len(self.clients.ids)
        uses_of: dict[str, list[tuple[str, Gradient]]] = {}
        for layer, own in group.layers.items():
            for name, gradient in own.items():
                uses_of.setdefault(name, []).append((layer, gradient))
        for name, uses in uses_of.items():
            theta, names = self.model[name], self.clients.aliases[name]
            base = None if self.base is None else read(None, self.base, names, theta)
            block = K if self.clients.resident else max(1, self.scratch // max(1, theta.nbytes))
            if block < K:  # what every block would compute again
                uses = [(layer, written_out(gradient, self.scratch)) for layer, gradient in uses]
            for first in range(0, K, block):
                thetas = self.clients.tensors(name, first, min(K, first + block))
                if self.with_global and first + block >= K:
                    thetas.append(theta)
                for layer, gradient in uses:
                    account = self.layers[layer][group.first : group.last, first : first + len(thetas)]
                    account += gradient.contract(thetas, base).cpu() * factor
                del thetas  # before the next block is read
