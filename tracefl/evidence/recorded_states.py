"""The states of a recorded run up to a round, as replaying it needs them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tracefl.errors import require
from tracefl.evidence.change import Change, is_variance, weights_of
from tracefl.provenance.clients import States
from tracefl.provenance.state import names_of_adapters, traced_state
from tracefl.provenance.trace import normalised
from tracefl.runs import Run
from tracefl.states import State, as_real, as_state


class RecordedStates:
    """The recorded states of a run up to a round, checked as they are read, tensor by tensor.

    Args:
        run: the run.
        model: of its architecture, in full precision; `load` changes its weights.
        last: the round.
    """

    def __init__(self, run: Run, model: nn.Module, last: int):
        self.run, self.model, self.last = run, model, last
        self.saved_as = names_of_adapters(model)
        self.p = {record.number: _shares(weights_of(record)) for record in run.rounds[:last]}
        took_part = {client.id for record in run.rounds[:last] for client in record.clients}
        known = [client.id for client in run.clients if client.id in took_part]
        self.ids = known + sorted(took_part - set(known))
        self.entries = dict(model.state_dict())
        self.clients = {t: self._clients(t) for t in self.p}
        self.sent = {t: frozenset[str]().union(*of.values()) for t, of in self.clients.items()}
        state = traced_state(model, "all", True, frozenset().union(*self.sent.values()))
        self.aliases, self.tensors = state.aliases, {name: as_real(w) for name, w in state.tensors.items()}
        require(self.tensors, f"no client of {run.path} sends a floating-point tensor: there is nothing to replay")
        self.nbytes = sum(w.nbytes for w in self.tensors.values())

    def _clients(self, t: int) -> dict[str, State]:
        record = self.run.round(t)
        whose = {k: f"round {t}, client {k!r}" for k in self.p[t]}
        return {whose[k]: as_state(record.client_state(k), whose[k], self.entries, self.saved_as) for k in whose}

    @torch.no_grad()
    def load(self, t: int) -> dict[str, Tensor]:
        """Load the model released by round t; its traced tensors."""
        whose = f"the global model of round {t}"
        state = as_state(self.run.global_state(t), whose, self.entries, self.saved_as)
        released = States({whose: state}, self.entries, self.aliases)
        W = {name: released.tensors([name], 0, 1)[0] for name in self.tensors}
        for name in state.keys() - {alias for some in self.aliases.values() for alias in some}:
            self.entries[name].copy_(state[name])  # counters, and what no client sends
        self.put(W)
        return W

    @torch.no_grad()
    def put(self, W: Mapping[str, Tensor], change: Change | None = None) -> None:
        """Make W + d the model's weights."""
        for name, tensor in self.tensors.items():
            w = W[name]
            tensor.copy_(w if change is None else change.positive(name, w + change.d[name], w))

    def no_change(self) -> Change:
        return Change({name: torch.zeros_like(w) for name, w in self.tensors.items()})

    def leave_out(self, t: int, changes: Mapping[str, Change]) -> None:
        """Add F' - F of round t without that client to its change; every client is read once.

        A client with all the weight is left out.
        """
        states, p = States(self.clients[t], self.entries, self.aliases_of(t)), self.p[t]
        for name in self.aliases_of(t):
            thetas = states.tensors([name], 0, len(p))
            F = self._mean(t, thetas)
            for (k, p_k), theta in zip(p.items(), thetas, strict=True):
                if k in changes and p_k < 1:
                    by = p_k / (1 - p_k) * (F - theta.double())
                    changes[k].add(name, by.to(theta.dtype))
                    if is_variance(name):
                        changes[k].least[name] = (F + by).to(theta.dtype)

    def fusion(self, t: int, W: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Σ p W_k of round t; what its clients do not send is as in W."""
        states, fused = States(self.clients[t], self.entries, self.aliases_of(t)), dict(W)
        for name in self.aliases_of(t):
            fused[name] = self._mean(t, states.tensors([name], 0, len(self.p[t]))).to(W[name].dtype)
        return fused

    def _mean(self, t: int, thetas: list[Tensor]) -> Tensor:
        return torch.stack([p * theta.double() for p, theta in zip(self.p[t].values(), thetas, strict=True)]).sum(0)

    def aliases_of(self, t: int) -> dict[str, list[str]]:
        return {name: some for name, some in self.aliases.items() if self.sent[t] & set(some)}


def _shares(weights: dict[str, float]) -> dict[str, float]:
    """p_k of the clients whose updates a round used; none, if it used no update."""
    return dict(zip(weights, normalised(weights, list(weights)).tolist(), strict=True)) if weights else {}
