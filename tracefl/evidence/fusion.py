"""Fuse a round without some of its clients.

    W_S = Σ_{k in S} p_k W_k / Σ_{k in S} p_k        S: the clients that are kept

Sums are in double precision. A whole number (BatchNorm's counter, a mask) has no mean: it is that
of the client with the largest weight.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from tracefl.errors import TraceFLError, require
from tracefl.provenance.trace import normalised
from tracefl.states import Source, State, as_state, is_continuous


@torch.no_grad()
def fuse(
    clients: Mapping[str, Source],
    weights: Mapping[str, float],
    *,
    without: Collection[str] = (),
    reference: Source | None = None,
) -> dict[str, Tensor]:
    """The weighted mean of client states, in which some clients may be left out.

    A tensor at a time is read, of every client that counts, once.

    Args:
        clients: client id -> state, in any of the forms that `trace` takes.
        weights: client id -> weight, such as its number of examples; scaled so that those of the
            clients that are kept add up to 1. A client of weight 0 does not count.
        without: ids of the clients that are left out.
        reference: state of the incoming model. It is the answer if nobody is left, gives the
            entries that no client sends, and names those of states that are lists of arrays, which
            are "0", "1", ... otherwise.

    Returns:
        A state dict. Floating-point and complex entries are means in their own type; of whole
        numbers, those of the client with the largest weight.

    Raises:
        TraceFLError: an argument or a state is unusable, or nobody is left and there is no
            reference; the message names client and tensor, or the argument, and what to do.

    Example:
        >>> import torch
        >>> from tracefl import fuse
        >>> values = {"ann": 1.0, "bob": 4.0, "eve": 99.0}
        >>> clients = {who: {"w": torch.tensor([w])} for who, w in values.items()}
        >>> fuse(clients, {"ann": 2, "bob": 1, "eve": 1}, without=["eve"])
        {'w': tensor([2.])}
    """
    kind = "an empty one" if isinstance(clients, Mapping) else f"a {type(clients).__name__}"
    require(isinstance(clients, Mapping) and clients, f"clients must be a dict of states by client id, got {kind}")
    left_out, p = as_ids(without, clients, "without"), normalised(weights, list(clients)).tolist()
    start = None if reference is None else _named(reference, "reference", ())
    kept = {who: share for who, share in zip(clients, p, strict=True) if share and who not in left_out}
    if not kept:
        nobody = f"without={left_out} leaves no client that has a weight"
        if start is None:
            raise TraceFLError(f"{nobody}: leave out fewer, or pass reference, the incoming model's state")
        return {name: _read("reference", start, name).clone() for name in start}
    states = {who: _named(clients[who], f"client {who!r}", tuple(start or ())) for who in kept}
    names, fused = same_names(states, start), dict[str, Tensor]()
    for name in start or names:
        if name in names:
            mean, dtype = mean_of(states, kept, name)
            fused[name] = mean.to(dtype)
        elif start is not None:
            fused[name] = _read("reference", start, name).clone()
    return fused


def as_ids(given: Collection[Any], known: Collection[str], argument: str) -> list[str]:
    """An argument as ids of clients, each once, in the order of those that are known.

    Raises:
        TraceFLError: it is no collection of ids, or one of them is unknown.
    """
    single = isinstance(given, str | bytes) or not isinstance(given, Collection)
    require(not single, f"{argument} must be a list of client ids, got {given!r}: pass [{given!r}]")
    ids = list(known)
    some = ", ".join(map(repr, ids[:20])) + (", ..." if len(ids) > 20 else "")
    for who in given:
        require(who in ids, f"{argument} must name clients, got {who!r}: choose from {some}")
    return [who for who in ids if who in given]


def same_names(states: Mapping[str, State], start: State | None = None) -> list[str]:
    """The names of the entries, in the first client's order.

    Args:
        states: client id -> state, at least one; all must have the same entries.
        start: a state that must have every one of them.

    Raises:
        TraceFLError: a client lacks an entry of another's, or has one that `start` has not.
    """
    first, usual = next(iter(states.items()))
    names = list(usual)
    for who, state in states.items():
        keys = set(state)
        for other, lacking in ((who, set(names) - keys), (first, keys - set(names))):
            if lacking:
                sender, name = who if other == first else first, min(lacking)
                without = "pass states with the same entries, or leave the client out"
                raise TraceFLError(
                    f"client {other!r}: tensor {name!r} is missing, though {sender!r} sends it; {without}"
                )
    if start is not None and (extra := sorted(set(names) - set(start))):
        remedy = "pass states of the same architecture"
        raise TraceFLError(f"client {first!r}: tensor {extra[0]!r} is not in the reference; {remedy}")
    return names


def mean_of(states: Mapping[str, State], weights: Mapping[str, float], name: str) -> tuple[Tensor, torch.dtype]:
    """The weighted mean of one entry, float64 or complex128, and the type that it is of.

    Of whole numbers, those of the client with the largest weight. Each state is read once.

    Args:
        states: client id -> state, at least one.
        weights: client id -> weight, above 0.
        name: of the entry.

    Raises:
        TraceFLError: a client's tensor is unusable or unlike the others'.
    """
    total, share, first, heaviest = torch.empty(0), 0.0, "", ""
    dtype = torch.bool
    for who, state in states.items():
        tensor, weight = _read(f"client {who!r}", state, name), weights[who]
        if not first:
            first, dtype, total = who, tensor.dtype, torch.zeros_like(tensor, dtype=wide(tensor.dtype))
        unlike = tensor.shape != total.shape or is_continuous(tensor) != is_continuous(total)
        must = f"client {who!r}: tensor {name!r} must be {tuple(total.shape)} {dtype}, as {first!r} sends it"
        require(not unlike, f"{must}, got {tuple(tensor.shape)} {tensor.dtype}; pass states of the same architecture")
        if not is_continuous(tensor):
            if not heaviest or weight > weights[heaviest]:
                heaviest, total, dtype = who, tensor.clone(), tensor.dtype
            continue
        double, share = tensor.to(total.device, wide(tensor.dtype)), share + weight
        finite = f"client {who!r}: tensor {name!r} has values that are not finite; leave the client out or repair it"
        require(torch.isfinite(double).all(), finite)
        dtype = torch.promote_types(dtype, tensor.dtype) if dtype != tensor.dtype else dtype
        total = (
            total + weight * double if double.is_complex() != total.is_complex() else total.add_(double, alpha=weight)
        )
    return (total if heaviest else total.div_(share)), dtype


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which numbers add up; whole numbers stay as they are."""
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def _named(source: Source, whose: str, names: Collection[str]) -> State:
    """A state by names; a list of arrays without any by positions, as Flower's ArrayRecord does."""
    arrays: Any = getattr(source, "tensors", source)
    positions = range(len(arrays) if isinstance(arrays, list | tuple) else 1)
    return as_state(source, whose, names or [str(i) for i in positions], {})


def _read(whose: str, state: State, name: str) -> Tensor:
    tensor = state[name]
    usable = isinstance(tensor, Tensor) and tensor.device.type != "meta" and not tensor.is_quantized
    found = "no data" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
    require(usable, f"{whose}: entry {name!r} must be a Tensor of numbers, got {found}; pass a state dict")
    tensor = tensor.detach()
    return tensor if tensor.layout is torch.strided else tensor.to_dense()
