"""States, checked: names before the work starts, shapes when a tensor is read."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tracefl.errors import TraceFLError, require
from tracefl.states import State, as_real, is_continuous

_REMEDY = "pass a state dict of the same architecture as the model"


class States:
    """The states of K clients, or of one reference; a tensor is read when asked for, and not kept.

    Args:
        states: what an error calls it -> state.
        model: the global model's state dict, whose shapes, types and device are the right ones.
        aliases: traced tensor -> the names under one of which a state must have it.
    """

    def __init__(self, states: Mapping[str, State], model: State, aliases: Mapping[str, Sequence[str]]):
        self.states, self.model, self.aliases = states, model, aliases
        self.in_memory = all(isinstance(state, dict) for state in self.states.values())
        self.entries: dict[str, dict[str, str]] = {}  # what an error calls it -> traced tensor -> its name there
        for who, state in self.states.items():
            keys = set(state)
            self.entries[who] = {name: next((a for a in some if a in keys), "") for name, some in self.aliases.items()}
            missing = [name for name, entry in self.entries[who].items() if not entry]
            extra = sorted(map(str, keys - set(model)))
            sent = "is missing, though another sends it" if len(states) > 1 else "is missing"
            for wrong, names in (("is not in the model's state dict", extra), (sent, missing)):
                if names:
                    raise TraceFLError(f"{who}: tensor {names[0]!r} {wrong} ({len(names)} in all); {_REMEDY}")

    def tensors(self, names: Sequence[str], first: int, last: int) -> list[Tensor]:
        """The tensor of that name of every state from `first` to `last` - 1.

        Of several names, which must be vectors', each state's tensors are put end to end.
        """
        some = list(self.states.items())[first:last]
        found = [self._read(who, state, name) for who, state in some for name in names]
        return found if len(names) == 1 else list(torch.cat(found).view(len(some), -1))

    def _read(self, who: str, state: State, name: str) -> Tensor:
        """The tensor on the model's device and in its precision, complex numbers as pairs."""
        like, tensor = self.model[name], state[self.entries[who][name]]
        if not isinstance(tensor, Tensor) or tensor.shape != like.shape:
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            expected = f"must be a Tensor of the model's shape {tuple(like.shape)}"
            raise TraceFLError(f"{who}: tensor {name!r} {expected}, got {found}; {_REMEDY}")
        fits = is_continuous(tensor) and tensor.is_complex() <= like.is_complex() and tensor.device.type != "meta"
        kind = "no data" if tensor.device.type == "meta" else str(tensor.dtype)
        require(fits, f"{who}: tensor {name!r} must hold numbers as the model's, {like.dtype}, got {kind}; {_REMEDY}")
        tensor = tensor if tensor.layout is torch.strided else tensor.to_dense()
        if (tensor.dtype, tensor.device) != (like.dtype, like.device):
            tensor = tensor.to(like.device, like.dtype)
        # a tensor mapped from a file holds pages around it, a thousand of them gigabytes: copy it
        return as_real(tensor if self.in_memory else tensor.clone())

    def check_finite(self) -> None:
        """Raise TraceFLError for the first state and tensor with values that are not finite."""
        for who, state in self.states.items():
            for name in self.aliases:
                finite = torch.isfinite(self._read(who, state, name)).all()
                require(finite, f"{who}: tensor {name!r} has values that are not finite; leave it out or repair it")
