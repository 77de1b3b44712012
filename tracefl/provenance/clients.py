"""The clients' states, checked: names before the work starts, shapes when a tensor is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tracefl.errors import TraceFLError

State = Mapping[str, Tensor]
_REMEDY = "pass a state dict of the same architecture as the model"


class Clients:
    """K states behind one door. A tensor is asked for when it is needed and never kept."""

    def __init__(
        self,
        states: Mapping[str, State],
        expected: Mapping[str, Tensor],
        aliases: Mapping[str, Sequence[str]],
    ):
        """`expected`: the global model's state dict; `aliases`: the names of each traced tensor."""
        if not isinstance(states, Mapping):
            raise TraceFLError(f"clients is a {type(states).__name__}: pass a dict from client id to state dict")
        if not states:
            raise TraceFLError("clients is empty: pass at least one client id with its state dict")
        self.ids = list(states)
        self.states = list(states.values())
        self.expected = expected
        self.aliases = aliases
        # all states are in memory already, so that asking for many tensors at once takes none
        self.resident = all(isinstance(state, dict) for state in self.states)
        for who, state in states.items():
            check_names(who, state, expected, aliases)

    def tensors(self, name: str, first: int, last: int) -> list[Tensor]:
        """The tensor `name` of clients first to last - 1, on the model's device and in its precision."""
        names, like = self.aliases[name], self.expected[name]
        form, found = (like.shape, like.dtype, like.device), []
        for k in range(first, last):
            used, tensor = _first(self.states[k], names)
            if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype, tensor.device) != form:
                tensor = _fitting(self.ids[k], used, tensor, like)
            # a tensor mapped from a file holds pages around it, a thousand of them gigabytes: copy and let go
            found.append(tensor if self.resident else tensor.clone())
        return found

    def blame(self) -> None:
        """Raise for the first tensor that is not finite, if there is one."""
        for who, state in zip(self.ids, self.states, strict=True):
            for name in self.aliases:
                tensor = read(who, state, self.aliases[name], self.expected[name])
                if not torch.isfinite(tensor).all():
                    raise TraceFLError(
                        f"{_named(who)}: tensor {name!r} has values that are not finite; "
                        "leave this client out or repair its state"
                    )


def check_names(
    who: str | None, state: State, expected: Mapping[str, Tensor], aliases: Mapping[str, Sequence[str]]
) -> None:
    """`who` is a client's id, or None for the reference."""
    keys = set(state)
    missing = [name for name, names in aliases.items() if keys.isdisjoint(names)]
    if missing:
        raise TraceFLError(f"{_named(who)}: tensor {missing[0]!r} is missing ({len(missing)} in all); {_REMEDY}")
    extra = sorted(keys - set(expected))
    if extra:
        raise TraceFLError(
            f"{_named(who)}: tensor {extra[0]!r} is not in the model's state dict ({len(extra)} in all); {_REMEDY}"
        )


def read(who: str | None, state: State, names: Sequence[str], like: Tensor) -> Tensor:
    return _fitting(who, *_first(state, names), like)


def _fitting(who: str | None, name: str, tensor: object, like: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TraceFLError(f"{_named(who)}: {name!r} is a {type(tensor).__name__}; pass it through torch.as_tensor")
    if tensor.shape != like.shape:
        raise TraceFLError(
            f"{_named(who)}: tensor {name!r} has shape {tuple(tensor.shape)}, the model's has "
            f"{tuple(like.shape)}; {_REMEDY}"
        )
    return tensor.to(like.device, like.dtype)


def _first(state: State, names: Sequence[str]) -> tuple[str, Tensor]:
    """The tensor under the first name that the state has. `in` would read a lazy state's tensor once more."""
    for name in names:
        try:
            return name, state[name]
        except KeyError:
            continue
    raise KeyError(names[0])


def _named(who: str | None) -> str:
    return "reference" if who is None else f"client {who!r}"
