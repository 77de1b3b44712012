"""A call of a strategy's own `start`: its arguments by name, however it is declared and called."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from tracefl.errors import as_sentence, require

FLOWERS = [each for each in inspect.signature(Strategy.start).parameters.values() if each.name != "self"]
IN_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Call:
    """The arguments, of which some can be replaced.

    The first three are the grid, the initial model and the number of rounds, whatever `start` calls
    them; what goes into its *args has the names that it has in Flower's own `start`.

    Args:
        name: of `start`, in a sentence.
        start: the strategy's.
        args: of the call.
        kwargs: of the call.

    Raises:
        TraceFLError: `start` does not take them, or the model or the number of rounds is none.

    Example:
        >>> import torch
        >>> def start(grid, *args, **kwargs):
        ...     return args[1:], kwargs
        >>> model = ArrayRecord({"w": torch.ones(1)})
        >>> call = Call("start", start, ("grid", model, 5), {"note": "mine"})
        >>> call.num_rounds, call.run({"num_rounds": 2})
        (5, ((2,), {'note': 'mine'}))
    """

    def __init__(self, name: str, start: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._start, self._args, self._kwargs = start, args, kwargs
        signature = inspect.signature(start)
        with as_sentence(f"{name} does not take these arguments", "give those that it takes", TypeError):
            signature.bind(*args, **kwargs)
        own = [each.name for each in signature.parameters.values() if each.kind in IN_PLACE]
        usual = [each.name for each in FLOWERS]
        self._names = own + usual[len(own) :]
        values = dict(zip(self._names, args, strict=False)) | dict(kwargs)
        self._calls = {name: name if name in values else self._names[i] for i, name in enumerate(usual[:3])}
        defaults = {each.name: each.default for each in (*FLOWERS, *signature.parameters.values())}
        grid, initial, num_rounds = self._calls.values()
        given = grid in values and initial in values
        require(given, f"{name} must be given a grid and an initial model: give what the app gave its own strategy")
        self.grid: Grid = values[grid]
        self.initial: ArrayRecord = values[initial]
        self.num_rounds = values.get(num_rounds, defaults[num_rounds])
        self.train_config: ConfigRecord | None = values.get("train_config")
        self.evaluate_fn: Callable[..., Any] | None = values.get("evaluate_fn")
        kind = type(self.initial).__name__
        require(isinstance(self.initial, ArrayRecord), f"initial_arrays must be an ArrayRecord, got a {kind}")
        require(self.initial, "initial_arrays must have at least one entry: give the model's")
        require(isinstance(self.num_rounds, int), f"num_rounds must be a whole number, got {self.num_rounds!r}")

    def run(self, new: Mapping[str, Any]) -> Any:
        """Call `start` with these values in the place of those given; names are Flower's."""
        values = {self._calls.get(name, name): value for name, value in new.items()}
        args = [values.get(name, value) for name, value in zip(self._names, self._args, strict=False)]
        rest = self._args[len(args) :]
        return self._start(*args, *rest, **{name: values.get(name, value) for name, value in self._kwargs.items()})
