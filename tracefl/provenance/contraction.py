"""Gradients of inputs meet the tensors of clients: S_nk = <θ_k - base, G_n>, tensor by tensor, added up by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tracefl.provenance.clients import Clients, State, read
from tracefl.provenance.gradients import Dense, Gradient, Workspace, written_out


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
        self.workspace = Workspace()
        self.layers: dict[str, Tensor] = {}

    def open(self, layers: list[str], N: int) -> None:
        """Accounts of layers that have none yet."""
        K, traced = len(self.clients.ids) + self.with_global, next(iter(self.clients.aliases))
        for layer in layers:
            if layer not in self.layers:
                self.layers[layer] = torch.zeros(N, K, dtype=torch.float64, device=self.model[traced].device)

    def misses(self, change: Tensor) -> float:
        """Mean |global model's column - change of y| as a fraction of the mean |change|."""
        total = torch.stack([account[:, -1] for account in self.layers.values()]).sum(0).cpu()
        return float((total - change).abs().sum() / change.abs().sum().clamp_min(1e-300))

    def halve(self) -> None:
        for account in self.layers.values():
            account /= 2

    @torch.no_grad()
    def enter(self, layer: str, gradients: Mapping[str, Gradient], first: int, last: int, factor: float) -> None:
        """Enter `factor` times one layer's shares in inputs first to last - 1; its vectors go end to end as one."""
        vectors: dict[str, Tensor] = {}
        account = self.layers[layer][first:last]
        for name, gradient in gradients.items():
            if isinstance(gradient, Dense) and gradient.values.ndim == 2:
                vectors[name] = gradient.values
            else:
                self._enter([name], gradient, account, factor)
        if vectors:
            self._enter(list(vectors), Dense(torch.cat(list(vectors.values()), 1)), account, factor)

    def _enter(self, names: list[str], gradient: Gradient, account: Tensor, factor: float) -> None:
        K, theta = len(self.clients.ids), _end_to_end([[self.model[name] for name in names]])[0]
        base = None
        if self.base is not None:
            aliases = self.clients.aliases
            base = _end_to_end([[read(None, self.base, aliases[name], self.model[name]) for name in names]])[0]
        block = K if self.clients.resident else max(1, self.scratch // max(1, theta.nbytes))
        if block < K:  # what every block would compute again
            gradient = written_out(gradient, self.scratch)
        for first in range(0, K, block):
            last = min(K, first + block)
            columns = zip(*(self.clients.tensors(name, first, last) for name in names), strict=True)
            thetas = _end_to_end(list(columns))
            if self.with_global and last == K:
                thetas.append(theta)
            shares = gradient.contract(thetas, base, self.workspace)
            account[:, first : first + len(thetas)] += shares.to(account.device) * factor
            del thetas, columns  # before the next block is read


def _end_to_end(clients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """For every client, its tensors as one: itself if there is but one, else the vectors in a row."""
    if len(clients[0]) == 1:
        return [tensors[0] for tensors in clients]
    return list(torch.cat([t for tensors in clients for t in tensors]).view(len(clients), -1))
