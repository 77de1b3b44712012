"""Ask a recorded run about one prediction: what `Run.trace` does."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tracefl.classifier import Batch, copied
from tracefl.data.examples import Inputs
from tracefl.errors import as_sentence, require
from tracefl.provenance import Provenance, trace
from tracefl.provenance.state import names_of_adapters
from tracefl.reading import Recorded
from tracefl.states import as_state

UNWEIGHTED = ("neuron",)  # methods that take no weights unless they are given
WITH_REFERENCE = ("integrated", "shapley")


def trace_recorded(
    run: Recorded,
    index: int | Sequence[int] | None,
    number: int | None,
    inputs: Batch | None,
    model: nn.Module | None,
    method: str,
    options: dict[str, Any],
) -> Provenance:
    """`Run.trace`, whose arguments these are; `options` go on to `trace`."""
    require(run.rounds, f"{run.path} has no complete round to trace: train it first")
    number = len(run.rounds) if number is None else number
    must = f"round must be a whole number from 1 to {len(run.rounds)}, got {number!r}"
    require(_is_whole(number) and 1 <= number <= len(run.rounds), must)
    one = (index is None) != (inputs is None)
    require(one, "index and inputs: pass one of them, the number of a server's example or an input of your own")
    model = released(run, number, model)
    chosen = inputs if inputs is not None else server_inputs(run, number, index)
    given: dict[str, Any] = {"method": method}
    if method not in UNWEIGHTED:
        given["weights"] = {client.id: client.weight for client in run.round(number).clients}
    if method in WITH_REFERENCE:
        given["reference"] = run.global_state(number - 1)
    return trace(model, run.client_states(number), chosen, **{**given, **options})


def released(run: Recorded, number: int, model: nn.Module | None) -> nn.Module:
    """The global model of a round; of an own model a copy that holds its weights.

    Raises:
        TraceFLError: the run is an own Flower app's and no model is given, or another one is.
    """
    if model is None:
        own = f"{run.path} was recorded by an own Flower app, which alone knows how its model is built: pass model="
        require("model" in run, own)
        return run.model(number)
    require(isinstance(model, nn.Module), f"model must be a torch.nn.Module, got a {type(model).__name__}")
    model = copied(model)
    entries, whose = model.state_dict(), f"the global model of round {number}"
    state = dict(as_state(run.global_state(number), whose, entries, names_of_adapters(model)))
    odd = [name for name in state if name not in entries]
    fit = f"model does not fit {whose}, which has {odd[0]!r} besides: pass the one that was trained" if odd else ""
    require(not odd, fit)
    with as_sentence(f"model does not fit {whose}", "pass the one that was trained", RuntimeError):
        model.load_state_dict(state, strict=False)
    return model


def server_inputs(run: Recorded, number: int, index: Any) -> Inputs:
    """The server's examples with these numbers.

    Raises:
        TraceFLError: there are none with that number, or the run's server data are not known.
    """
    own = f"{run.path} was recorded by an own Flower app, and its server's data are not in it: pass inputs="
    require("data_folder" in run, own)
    examples, predicted = run.server_examples(), len(run.predictions(number))
    other = f"the server has {len(examples)} examples, {run.path} was recorded with {predicted}"
    require(len(examples) == predicted, f"{other}: prepare the same data again")
    plain = index.tolist() if hasattr(index, "tolist") else index
    rows = list(plain) if isinstance(plain, Sequence) and not isinstance(plain, str) else [plain]
    must = f"index must be one or more whole numbers from 0 to {len(examples) - 1}, of the server's examples"
    require(rows, f"{must}, got none")
    for row in rows:
        require(_is_whole(row) and 0 <= row < len(examples), f"{must}, got {row!r}")
    return examples[torch.tensor(rows)].inputs


def _is_whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)
