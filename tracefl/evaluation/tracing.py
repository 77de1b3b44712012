"""Trace a round of a recorded run: choose inputs, trace them, lay the answers out as a table."""

import logging
import time
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from tracefl.classifier import take
from tracefl.config import Config
from tracefl.data.examples import Examples, Inputs
from tracefl.errors import TraceFLError
from tracefl.evaluation.selection import (
    faulty_clients,
    select_correct,
    select_flipped,
    select_triggered,
    select_wrong,
    with_trigger,
)
from tracefl.evaluation.stopwatch import Stopwatch
from tracefl.evidence.whole_run import trace_run
from tracefl.federation.noise import gaussian_noise, noise_std
from tracefl.models import load_exchanged_state
from tracefl.provenance import Provenance, trace
from tracefl.provenance.spread import Spread, here, trace_spread
from tracefl.runs import Run

# One row per (round, method, input, client). `input` is the row of the server's examples, `score`
# the softmax of the contributions (eq. 7), `rank` counts from 1, `label_examples` are the client's
# training examples of the predicted label; `server` and `noise` are the contributions of the server
# itself and of its noise, where influence knows them. With evaluation.coalitions a last column is
# added, standard_error, of the contributions of the method "shapley".
COLUMNS = [
    *("round", "method", "input", "client", "label", "predicted", "contribution", "score", "rank"),
    *("label_examples", "server", "noise"),
]
# One row per (round, method, input, layer), of the client that contributes most: its contribution
# through this layer. Layers that add nothing are left out; `place` counts those of the model.
LAYER_COLUMNS = [*("round", "method", "input", "client", "place", "layer", "contribution")]
log = logging.getLogger("tracefl")


def trace_round(
    config: Config,
    run: Run,
    model: nn.Module,
    examples: Examples,
    number: int,
    watch: Stopwatch | None = None,
    layers: list[pd.DataFrame] | None = None,
    spread: Spread = here,
) -> pd.DataFrame:
    """Trace round `number` with every method of `config.provenance.methods`.

    Args:
        config: says which inputs are traced and how, and which clients are faulty.
        run: the recorded run.
        model: of the run's architecture, on the device to compute on; its weights are overwritten.
        examples: the server's examples, those that the run's predictions are about.
        number: of the round, from 1.
        watch: measures every method, from checked client states on disk to answers.
        layers: gets a table with `LAYER_COLUMNS` for every method but "shapley".
        spread: does parts of the clients elsewhere; default: all here, as Shapley values are.

    Returns:
        A table with `COLUMNS`, without rows if there is nothing to trace. With a backdoor, an input
        is the example with the trigger on it. With `config.evaluation.coalitions` the method
        "shapley" comes last, of some of the inputs.

    Raises:
        TraceFLError: the round cannot be traced, for example because a client's file is damaged.
    """
    watch = watch or Stopwatch()
    weights = {client.id: client.weight for client in run.round(number).clients}
    paper = {"layers": "paper", "layer_decay": 0.9 if config.enable_beta else 1.0}
    paper["weights"] = weights if config.client_weights_normalization else None
    arguments: dict[str, dict[str, Any]] = {"neuron": paper, "influence": {"weights": weights}}
    tables = []
    try:
        load_exchanged_state(model, dict(run.global_state(number)))
        rows, inputs, targets = _chosen(config, run, model, examples, number)
        if len(rows) == 0:
            return pd.DataFrame(columns=COLUMNS)
        clients = run.client_states(number)  # checked before the clock runs
        for method in config.provenance.methods:
            with watch.measure(method, len(rows)):
                given = {"targets": targets, "method": method, **arguments[method]}
                answer = trace_spread(spread, model, clients, inputs, **given)
            server = noise = torch.full((len(rows),), torch.nan, dtype=torch.float64)
            if method == "influence" and answer.residual is not None:
                server, noise = answer.residual, _noise_share(run, number, model, inputs, targets, config)
            of_input = {"input": rows, "label": examples.labels[rows], "server": server, "noise": noise}
            tables.append(_table(run, number, answer, of_input))
            if layers is not None:
                layers.append(_layers(number, answer, rows))
        if config.evaluation.coalitions:
            some = at_even_distances(len(rows), config.evaluation.coalition_inputs)
            log.info("[Round %d] fusing coalitions of %d clients for %d inputs", number, len(clients), len(some))
            start, of_some = time.perf_counter(), take(inputs, some.tolist())
            given = {"weights": weights, "reference": run.global_state(number - 1)}
            with watch.measure("shapley", len(some)):
                answer = trace(
                    model, clients, of_some, targets=targets[some.to(targets.device)], method="shapley", **given
                )
            log.info("[Round %d] Shapley values in %.1f s", number, time.perf_counter() - start)
            unknown = torch.full((len(some),), torch.nan, dtype=torch.float64)
            of_input = {"input": rows[some], "label": examples.labels[rows[some]], "server": unknown, "noise": unknown}
            tables.append(_table(run, number, answer, of_input))
    except TraceFLError as error:
        raise TraceFLError(f"round {number} cannot be traced: {error}") from error
    return pd.concat(tables, ignore_index=True)


def trace_whole_run(config: Config, run: Run, model: nn.Module, examples: Examples) -> tuple[pd.DataFrame, str]:
    """Trace the inputs of the last round over all rounds, by `trace_run`.

    Arguments as of `trace_round`.

    Returns:
        A table with `COLUMNS`, of method "replay", and by what memory. The proxy trains on the
        server's other examples.

    Raises:
        TraceFLError: the run cannot be traced.
    """
    number = len(run.rounds)
    try:
        load_exchanged_state(model, dict(run.global_state(number)))
        rows, inputs, targets = _chosen(config, run, model, examples, number)
        if len(rows) == 0:
            return pd.DataFrame(columns=COLUMNS), "nothing to trace"
        others = torch.ones(len(examples), dtype=torch.bool)
        others[rows] = False
        rest = examples[torch.nonzero(others)[:, 0]] if others.any() else None
        answer = trace_run(run, inputs, targets=targets, model=model, examples=rest, proxies=config.provenance.proxies)
    except TraceFLError as error:
        raise TraceFLError(f"the whole run cannot be traced: {error}") from error
    unknown = torch.full((len(rows),), torch.nan, dtype=torch.float64)
    of_input = {"input": rows, "label": examples.labels[rows], "server": unknown, "noise": unknown}
    return _table(run, number, answer, of_input), answer.layers[0]


def _chosen(
    config: Config, run: Run, model: nn.Module, examples: Examples, number: int
) -> tuple[Tensor, Inputs, Tensor]:
    """Rows to trace, and their inputs and predictions, on the model's device.

    With a backdoor, its trigger is on them.
    """
    device, rows = next(model.parameters()).device, _select(config, run, model, examples, number)
    chosen, predicted = examples[rows], run.predictions(number)[rows]
    if len(rows) and config.faulty_clients_ids and config.fault.kind == "backdoor":
        chosen, predicted = with_trigger(chosen), torch.full_like(predicted, config.fault.target)
    return rows, chosen.to(device).inputs, predicted.to(device)


def _select(config: Config, run: Run, model: nn.Module, examples: Examples, number: int) -> Tensor:
    """Rows to trace; `model` holds the round's global model.

    Correct predictions or, with faulty clients, the mispredictions that their fault would cause.
    """
    predictions, labels, seed = run.predictions(number), examples.labels, [run["seed"], number]
    participants, faulty = {client.id for client in run.round(number).clients}, faulty_clients(config)
    limit = config.provenance.max_mispredictions
    if not faulty:
        held = {label for client in run.clients if client.id in participants for label in client.trained_label_counts}
        return select_correct(predictions, labels, held, config.provenance.inputs_per_label, seed)
    if not participants & faulty:
        return torch.empty(0, dtype=torch.int64)  # no participant could have caused a misprediction
    if config.fault.kind == "label_flip":
        return select_flipped(predictions, labels, config.label2flip, limit, seed)
    if config.fault.kind == "backdoor":
        return select_triggered(model, predictions, examples, config.fault.target, limit, seed)
    return select_wrong(predictions, labels, limit, seed)


def at_even_distances(number: int, most: int) -> Tensor:
    """At most `most` of the numbers from 0 to `number` - 1, at even distances, in their order.

    Example:
        >>> at_even_distances(6, 3).tolist(), at_even_distances(2, 20).tolist()
        ([0, 2, 5], [0, 1])
    """
    return torch.linspace(0, number - 1, min(number, most)).long()


def _noise_share(run: Run, number: int, model: nn.Module, inputs: Inputs, targets: Tensor, config: Config) -> Tensor:
    """[N] contribution of the round's noise, drawn again, to each prediction: < noise, dy/dW >."""
    if config.noise_multiplier <= 0:
        return torch.zeros(len(targets), dtype=torch.float64)
    released, buffers = run.global_state(number), dict(model.named_buffers())
    std = noise_std(config.noise_multiplier, config.clipping_norm, len(run.round(number).clients))
    noisy = {
        name: value if name in buffers else value + gaussian_noise(name, value, std, run["seed"], number)
        for name, value in released.items()
    }
    noise = trace(model, {"noise": noisy}, inputs, targets=targets, weights={"noise": 1.0}, method="influence")
    return noise.contributions[:, 0]


def _table(run: Run, number: int, answer: Provenance, of_input: dict[str, Tensor]) -> pd.DataFrame:
    """An answer with `COLUMNS`; `of_input` are columns with a number for each of its N inputs."""
    table = answer.to_frame().rename(columns={"target": "predicted"})
    held = {client.id: client.trained_label_counts for client in run.clients}
    return table.assign(
        round=number,
        method=answer.method,
        label_examples=[held[c].get(label, 0) for c, label in zip(table["client"], table["predicted"], strict=True)],
        **{name: values.cpu().numpy()[table["input"]] for name, values in of_input.items()},
    )[[*COLUMNS, *(name for name in ["standard_error"] if name in table)]]


def _layers(number: int, answer: Provenance, rows: Tensor) -> pd.DataFrame:
    """Through which layers the first client of each answer contributes, with `LAYER_COLUMNS`."""
    first = answer.contributions.argmax(1)
    through = answer.by_layer[:, torch.arange(len(rows)), first]  # [L, N]
    n, place = through.T.nonzero(as_tuple=True)
    columns = {
        **{"round": number, "method": answer.method, "input": rows[n].numpy()},
        "client": [answer.client_ids[k] for k in first[n].tolist()],
        "place": place.numpy(),
        "layer": [answer.layers[layer] for layer in place.tolist()],
        "contribution": through[place, n].numpy(),
    }
    return pd.DataFrame(columns)[LAYER_COLUMNS]
