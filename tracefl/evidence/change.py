"""What a recorded run's model differs by without some of its clients, from round to round.

W_t is the model that round t released, F_t the mean of its clients by their weights p_k, F'_t the
mean of those that are kept. Without the others the model is

    W'_t = W_t + d_t,    d_t = R_t(d_{t-1}) + F'_t - F_t,

and R_t is how the clients of round t, who train on from another model, answer a difference. What
the server adds to the mean (noise, an optimizer's step) stays as it was: W_t - F_t. A round with
nobody left keeps the model that came in: d_t = d_{t-1} + W_{t-1} - W_t. A running variance stays
positive: it keeps at least a tenth of W_t's, or F'_t's if that is less.

`without` follows one set of clients, in double precision and from states alone. `whole_run` follows
every client by itself, on the traced tensors of a model, and finds each F'_t - F_t from F_t.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tracefl.record import Round

LEAST_VARIANCE = 0.1  # of what a variance is in the model


@dataclass
class Change:
    """d of one set of clients.

    Attributes:
        d: name -> what that tensor differs by; what is not there has not changed.
        least: F' of running variances, of the last round that was fused without the clients.
    """

    d: dict[str, Tensor] = field(default_factory=dict)
    least: dict[str, Tensor] = field(default_factory=dict)

    def fade(self, c: float, names: Iterable[str]) -> None:
        """R(d) = c d, of these tensors."""
        for name in names:
            if name in self.d:
                self.d[name] *= c

    def add(self, name: str, by: Tensor) -> None:
        self.d[name] = self.d[name] + by if name in self.d else by

    def positive(self, name: str, moved: Tensor, W: Tensor) -> Tensor:
        """W'_t, of which a running variance may have become negative."""
        if not is_variance(name):
            return moved
        return torch.maximum(moved, torch.minimum(self.least.get(name, W), LEAST_VARIANCE * W))


def is_variance(name: str) -> bool:
    return name.rpartition(".")[2] == "running_var"


def weights_of(record: Round, only: Collection[str] | None = None, but: Collection[str] = ()) -> dict[str, float]:
    """Weight of every client whose update the round used, above 0."""
    some = [client for client in record.clients if (only is None or client.id in only) and client.id not in but]
    return {client.id: client.weight for client in some if client.weight > 0}
