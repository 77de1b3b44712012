"""Work over clients' states in parts: what each client's state gives does not depend on the others.

A `Spread` calls a piece of work for parts of some names, wherever it likes, and gives the results
in their order. `here` does all at once; `federation.cluster` does the parts on a Ray cluster.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from tracefl.classifier import Batch, full_precision
from tracefl.errors import require
from tracefl.provenance.result import Provenance
from tracefl.provenance.trace import normalised, trace
from tracefl.states import Source

T = TypeVar("T")


class Spread(Protocol):
    """Calls `work` for consecutive parts of `names`; returns the results in their order."""

    def __call__(self, work: Callable[[Sequence[str]], T], names: Sequence[str]) -> list[T]: ...


def here(work: Callable[[Sequence[str]], T], names: Sequence[str]) -> list[T]:
    """All in one part, in this process.

    Example:
        >>> here(len, ["ann", "bob"])
        [2]
    """
    return [work(names)]


def trace_spread(
    spread: Spread,
    model: nn.Module,
    clients: Mapping[str, Source],
    inputs: Batch,
    *,
    method: str = "neuron",
    weights: Mapping[str, float] | None = None,
    **options: Any,
) -> Provenance:
    """Trace each part of the clients by itself, and join the answers: those of `trace`.

    Args:
        spread: does the parts.
        model: as of `trace`, like all that follow.
        clients: client id -> state; every client sends the same tensors.
        inputs: N inputs.
        method: "neuron" or "influence", whose shares of a client do not depend on the others.
        weights: client id -> weight.
        **options: further ones of `trace`, but for `reference`.

    Raises:
        TraceFLError: as of `trace`, or another method, or clients that send other tensors.

    Example:
        >>> halves = lambda work, names: [work(names[:1]), work(names[1:])]
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> clients = {k: {"weight": torch.full((2, 1), w)} for k, w in (("a", 1.0), ("b", 2.0))}
        >>> found = trace_spread(halves, model, clients, torch.ones(1, 1), targets=[0])
        >>> found.contributions.tolist()
        [[1.0, 2.0]]
    """
    require(method in ("neuron", "influence"), f"method={method!r} is not traced in parts: choose neuron or influence")
    if spread is here or not clients:
        return trace(model, clients, inputs, method=method, weights=weights, **options)
    ids = list(clients)
    p = None if weights is None else normalised(weights, ids)
    model, inputs = full_precision(model, inputs)

    def work(some: Sequence[str]) -> Provenance:
        """Unweighted shares, but for a factor 1 / n where the method wants weights."""
        equal = dict.fromkeys(some, 1.0) if method == "influence" else None
        return trace(model, {who: clients[who] for who in some}, inputs, method=method, weights=equal, **options)

    parts = spread(work, ids)
    told = "the clients of a round must send the same tensors to be traced in parts"
    require(all(part.layers == parts[0].layers for part in parts), f"{told}: leave out ray.address")
    each = [part.by_layer * (len(part.client_ids) if method == "influence" else 1) for part in parts]
    by_layer, residual = torch.cat(each, 2), None
    if p is not None:
        by_layer = by_layer * p
        of_model = torch.zeros(by_layer.shape[:2], dtype=torch.float64)
        if method == "neuron":
            of_model = trace(model, {"the model": model.state_dict()}, inputs, **options).by_layer[:, :, 0]
        residual = of_model - by_layer.sum(2)
    return Provenance(method, ids, parts[0].targets, by_layer, parts[0].layers, residual)
