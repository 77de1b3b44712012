"""States, checked: names before the work starts, shapes when a tensor is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike

import torch
from torch import Tensor

from tracefl.errors import TraceFLError
from tracefl.states import State, StateFile

Source = State | str | PathLike[str]  # a state, or the path of a safetensors file that holds one
_REMEDY = "pass a state dict of the same architecture as the model"


class States:
    """The states of K clients, or of one reference. A tensor is read when it is asked for, and not kept.

    Args:
        states: what an error calls it -> state, or path of a safetensors file.
        model: the global model's state dict, whose shapes, types and device are the right ones.
        aliases: traced tensor -> the names under one of which a state must have it.
    """

    def __init__(self, states: Mapping[str, Source], model: State, aliases: Mapping[str, Sequence[str]]):
        self.states = {who: StateFile(s) if isinstance(s, str | PathLike) else s for who, s in states.items()}
        self.model, self.aliases = model, aliases
        self.in_memory = all(isinstance(state, dict) for state in self.states.values())
        for who, state in self.states.items():
            keys = set(state)
            missing = [name for name, names in aliases.items() if keys.isdisjoint(names)]
            if missing:
                raise TraceFLError(f"{who}: tensor {missing[0]!r} is missing ({len(missing)} in all); {_REMEDY}")
            if extra := sorted(keys - set(model)):
                raise TraceFLError(
                    f"{who}: tensor {extra[0]!r} is not in the model's state dict ({len(extra)} in all); {_REMEDY}"
                )

    def __len__(self) -> int:
        return len(self.states)

    def tensors(self, names: Sequence[str], first: int, last: int) -> list[Tensor]:
        """Tensor `names[0]` of states first to last - 1 each; of several names, their vectors end to end."""
        some = list(self.states.items())[first:last]
        if len(names) == 1:
            return [self._read(who, state, names[0]) for who, state in some]
        rows = [self._read(who, state, name) for who, state in some for name in names]
        return list(torch.cat(rows).view(len(some), -1))

    def _read(self, who: str, state: State, name: str) -> Tensor:
        """The tensor on the model's device and in its precision."""
        like, tensor = self.model[name], None
        for alias in self.aliases[name]:  # `in` would read a lazy state's tensor once more
            try:
                tensor = state[alias]
                break
            except KeyError:
                continue
        if not isinstance(tensor, Tensor):
            raise TraceFLError(f"{who}: {name!r} must be a Tensor, got a {type(tensor).__name__}: use torch.as_tensor")
        if tensor.shape != like.shape:
            shapes = f"{tuple(like.shape)}, got {tuple(tensor.shape)}"
            raise TraceFLError(f"{who}: tensor {name!r} must have the model's shape {shapes}; {_REMEDY}")
        if (tensor.dtype, tensor.device) != (like.dtype, like.device):
            tensor = tensor.to(like.device, like.dtype)
        # a tensor mapped from a file holds pages around it, a thousand of them gigabytes: copy it
        return tensor if self.in_memory else tensor.clone()

    def check_finite(self) -> None:
        """Raise TraceFLError for the first state and tensor with values that are not finite."""
        for who, state in self.states.items():
            for name in self.aliases:
                if not torch.isfinite(self._read(who, state, name)).all():
                    raise TraceFLError(
                        f"{who}: tensor {name!r} has values that are not finite; leave this client out or repair it"
                    )
