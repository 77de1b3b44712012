"""Gradients of inputs meet the tensors of clients: S_nk = <θ_k - base, G_n>, tensor by tensor, added up by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tracefl.provenance.clients import Clients, State, read
from tracefl.provenance.collect import Group
from tracefl.provenance.gradients import Dense, Gradient, written_out


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
        uses_of: dict[str, list[tuple[str, Gradient]]] = {}
        for layer, own in group.layers.items():
            for name, gradient in own.items():
                uses_of.setdefault(name, []).append((layer, gradient))
        vectors: dict[str, dict[str, Dense]] = {}  # layer -> its vectors that no other layer uses
        for name, uses in uses_of.items():
            layer, gradient = uses[0]
            if len(uses) == 1 and isinstance(gradient, Dense) and gradient.values.ndim == 2:
                vectors.setdefault(layer, {})[name] = gradient
            else:
                self._enter([name], uses, group, factor)
        for layer, dense in vectors.items():
            values = [gradient.values for gradient in dense.values()]
            self._enter(list(dense), [(layer, Dense(torch.cat(values, 1)))], group, factor)

    def _enter(self, names: list[str], uses: list[tuple[str, Gradient]], group: Group, factor: float) -> None:
        """The shares of one tensor through every layer that uses it; vectors of one layer go end to end as one."""
        K, theta = len(self.clients.ids), _end_to_end([[self.model[name] for name in names]])[0]
        base = None
        if self.base is not None:
            aliases = self.clients.aliases
            base = _end_to_end([[read(None, self.base, aliases[name], self.model[name]) for name in names]])[0]
        block = K if self.clients.resident else max(1, self.scratch // max(1, theta.nbytes))
        if block < K:  # what every block would compute again
            uses = [(layer, written_out(gradient, self.scratch)) for layer, gradient in uses]
        for first in range(0, K, block):
            last = min(K, first + block)
            columns = zip(*(self.clients.tensors(name, first, last) for name in names), strict=True)
            thetas = _end_to_end(list(columns))
            if self.with_global and last == K:
                thetas.append(theta)
            for layer, gradient in uses:
                account = self.layers[layer][group.first : group.last, first : first + len(thetas)]
                account += gradient.contract(thetas, base).cpu() * factor
            del thetas, columns  # before the next block is read


def _end_to_end(clients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """For every client, its tensors as one: itself if there is but one, else the vectors in a row."""
    if len(clients[0]) == 1:
        return [tensors[0] for tensors in clients]
    return list(torch.cat([t for tensors in clients for t in tensors]).view(len(clients), -1))
