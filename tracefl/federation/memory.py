"""What a strategy carries from round to round: read for the run, and given back when it goes on.

Flower's server optimizers and its adaptive clipping are known; another strategy is asked for its
`state_dict()`, and given it by `load_state_dict(state)`, if it has both.
"""

import inspect
import json
import pickle
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.dp_adaptive_clipping import DifferentialPrivacyAdaptiveBase
from torch import Tensor

from tracefl.errors import TraceFLError
from tracefl.states import State

MOMENTS = ("m_t", "v_t", "momentum_vector")  # by name, by name, a list
OURS = ("flwr.", "tracefl.")
NO_SETTING = ("min_available_nodes", "min_evaluate_nodes", "fraction_evaluate")  # they change no model


def parts(strategy: Strategy) -> list[Strategy]:
    """A strategy and those that it wraps, whatever it calls them, from outside."""
    found, waiting = list[Strategy](), [strategy]
    while waiting:
        one = waiting.pop(0)
        if not any(one is other for other in found):
            found.append(one)
            held = [list(v) if isinstance(v, list | tuple) else [v] for v in getattr(one, "__dict__", {}).values()]
            waiting += [value for values in held for value in values if isinstance(value, Strategy)]
    return found


def innermost(strategy: Strategy) -> Strategy:
    """The strategy that aggregates, inside of its wrappers."""
    return parts(strategy)[-1]


def settings_of(strategy: Strategy) -> dict[str, Any]:
    """Class of every part -> the arguments of Flower's classes that change what it aggregates."""
    found = {}
    for part in parts(strategy):
        names = sorted(arguments(part) - set(NO_SETTING))
        values = {name: getattr(part, name, None) for name in names}
        found[type(part).__name__] = {k: v for k, v in values.items() if isinstance(v, bool | int | float | str)}
    return found


def state_of(strategy: Strategy) -> dict[str, Tensor]:
    """What the strategy keeps, as tensors by name; empty if it keeps nothing.

    Raises:
        TraceFLError: a state_dict() holds something that cannot be written.
    """
    inner, state, packed = innermost(strategy), dict[str, Tensor](), {}
    for moment in MOMENTS:
        values = getattr(inner, moment, None) or {}
        named = values.items() if isinstance(values, dict) else enumerate(values)
        state |= {f"{moment}/{name}": torch.from_numpy(np.array(value)) for name, value in named}
    for index, part in enumerate(parts(strategy)):
        if isinstance(part, DifferentialPrivacyAdaptiveBase):
            state[f"clipping_norm/{index}"] = torch.tensor(part.clipping_norm, dtype=torch.float64)
        if keeps_state(part):
            packed[str(index)] = _pack(part.state_dict(), state, type(part).__name__)  # type: ignore[attr-defined]
    if packed:
        state["state_dict"] = torch.frombuffer(bytearray(json.dumps(packed).encode()), dtype=torch.uint8)
    return state


def load_state(strategy: Strategy, state: State) -> None:
    """Give a strategy what `state_of` read from it."""
    for moment in MOMENTS:
        kept = {name.split("/", 1)[1]: state[name].numpy() for name in state if name.startswith(f"{moment}/")}
        if kept:
            listed = moment == "momentum_vector"
            setattr(innermost(strategy), moment, [kept[str(i)] for i in range(len(kept))] if listed else kept)
    packed = json.loads(state["state_dict"].numpy().tobytes()) if "state_dict" in state else {}
    for index, part in enumerate(parts(strategy)):
        if f"clipping_norm/{index}" in state:
            part.clipping_norm = float(state[f"clipping_norm/{index}"])  # type: ignore[attr-defined]
        if str(index) in packed and keeps_state(part):
            part.load_state_dict(_unpack(packed[str(index)], state))  # type: ignore[attr-defined]


def fingerprints(strategy: Strategy) -> dict[str, bytes]:
    """The pickle of every value that `state_of` cannot read, by "Class.attribute"."""
    found = {}
    for part in parts(strategy):
        known = {*arguments(part), *MOMENTS, "current_arrays"} - {"accountant"}
        ours = type(part).__module__.startswith(OURS) or keeps_state(part)
        names = {"accountant"} if ours else set(vars(part)) - known
        own = {name: value for name, value in vars(part).items() if name in names and not callable(value)}
        for name, value in own.items():
            if not isinstance(value, Strategy):
                with suppress(Exception):  # it cannot be pickled
                    found[f"{type(part).__name__}.{name}"] = pickle.dumps(value)
    return found


def arguments(part: Strategy) -> set[str]:
    """Names of the arguments of those of its classes that are Flower's or ours."""
    flowers = [kind for kind in type(part).__mro__ if kind.__module__.startswith(OURS)]
    return {name for kind in flowers for name in inspect.signature(kind).parameters} - {"self", "strategy"}


def keeps_state(part: Strategy) -> bool:
    """Whether it has state_dict() and load_state_dict(state)."""
    return callable(getattr(part, "state_dict", None)) and callable(getattr(part, "load_state_dict", None))


def _pack(value: Any, tensors: dict[str, Tensor], whose: str) -> Any:
    """A value as JSON; tensors and arrays go into `tensors`."""
    if isinstance(value, ArrayRecord):
        return {"record": _pack(dict(value.to_torch_state_dict()), tensors, whose)}
    if isinstance(value, Tensor | np.ndarray | np.generic):
        name = f"state_dict/{len(tensors)}"
        tensors[name] = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        return {"tensor" if isinstance(value, Tensor) else "array": name}
    if isinstance(value, Mapping):
        return {"dict": [[_pack(key, tensors, whose), _pack(entry, tensors, whose)] for key, entry in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(entry, tensors, whose) for entry in value]}
    if isinstance(value, float):
        return {"float": value.hex()}
    if value is None or isinstance(value, bool | int | str):
        return value
    takes = "tensors, arrays, numbers, strings, and lists and dicts of them"
    raise TraceFLError(f"{whose}.state_dict() must hold {takes}, got a {type(value).__name__}: leave it out")


def _unpack(value: Any, tensors: State) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind in ("tensor", "array"):
        return tensors[content] if kind == "tensor" else tensors[content].numpy()
    if kind == "record":
        return ArrayRecord(_unpack(content, tensors))
    if kind == "dict":
        return {_unpack(key, tensors): _unpack(entry, tensors) for key, entry in content}
    if kind == "float":
        return float.fromhex(content)
    entries = [_unpack(entry, tensors) for entry in content]
    return entries if kind == "list" else tuple(entries)
