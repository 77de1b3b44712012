"""The clients' states, checked: names before the work starts, shapes when a tensor is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tracefl.errors import TraceFLError

State = Mapping[str, Tensor]


class Clients:
    """K states behind one door. A tensor is asked for when it is needed and never kept."""

    def __init__(
        self,
        states: Mapping[str, State],
        expected: Mapping[str, Tensor],
        aliases: Mapping[str, Sequence[str]],
    ):
        """`expected`: the global model's state dict; `aliases`: the names of each traced tensor."""
        if not states:
            raise TraceFLError("clients is empty: pass at least one client id with its state dict")
        self.ids = list(states)
        self.states = list(states.values())
        self.expected = expected
        self.aliases = aliases
        for who, state in states.items():
            check_names(f"client {who!r}", state, expected, aliases)

    def tensors(self, name: str, first: int, last: int) -> list[Tensor]:
        """The tensor `name` of clients first to last - 1, on the model's device and in its precision."""
        return [
            read(f"client {self.ids[k]!r}", self.states[k], self.aliases[name], self.expected[name])
            for k in range(first, last)
        ]

    def blame(self) -> None:
        """Raise for the first tensor that is not finite, if there is one."""
        for who, state in zip(self.ids, self.states, strict=True):
            for name in self.aliases:
                tensor = read(f"client {who!r}", state, self.aliases[name], self.expected[name])
                if not torch.isfinite(tensor).all():
                    raise TraceFLError(
                        f"client {who!r}: tensor {name!r} has values that are not finite; "
                        "leave this client out or repair its state"
                    )


def check_names(
    who: str, state: State, expected: Mapping[str, Tensor], aliases: Mapping[str, Sequence[str]]
) -> None:
    keys = set(state)
    missing = [name for name, names in aliases.items() if keys.isdisjoint(names)]
    if missing:
        raise TraceFLError(
            f"{who}: tensor {missing[0]!r} is missing ({len(missing)} in all); "
            "pass a state dict of the same architecture as the model"
        )
    extra = sorted(keys - set(expected))
    if extra:
        raise TraceFLError(
            f"{who}: tensor {extra[0]!r} is not in the model's state dict ({len(extra)} in all); "
            "pass a state dict of the same architecture as the model"
        )


def read(who: str, state: State, names: Sequence[str], like: Tensor) -> Tensor:
    name = next(name for name in names if name in state)
    tensor = state[name]
    if tensor.shape != like.shape:
        raise TraceFLError(
            f"{who}: tensor {name!r} has shape {tuple(tensor.shape)}, the model's has {tuple(like.shape)}; "
            "pass a state dict of the same architecture as the model"
        )
    return tensor.detach().to(like.device, like.dtype)
