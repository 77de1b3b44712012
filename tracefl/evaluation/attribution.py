"""Trace every round of a recorded run: choose the inputs, ask the provenance engine, lay the answers out as a table."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from tracefl.data.examples import Examples
from tracefl.errors import TraceFLError
from tracefl.evaluation.localization import Localization, localize
from tracefl.models import load_exchanged_state
from tracefl.provenance import Provenance, trace
from tracefl.runs import Round, Run

MIN_INPUTS = 10  # traced per round, as in the paper, if there are as many to choose from


def select_correct(
    predictions: Tensor, labels: Tensor, of_interest: set[int], per_label: int, seed: list[int]
) -> Tensor:
    """Rows of correct predictions, balanced over the labels of interest: `per_label` each, at least ten in all.

    A label with too few correct predictions gives what it has. The choice is a function of the arguments.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    correct = order[(predictions == labels)[order]]
    by_label = {label: correct[labels[correct] == label] for label in sorted(of_interest)}
    by_label = {label: rows for label, rows in by_label.items() if len(rows)}
    if not by_label:
        return torch.empty(0, dtype=torch.int64)
    count = max(per_label, -(-MIN_INPUTS // len(by_label)))
    return torch.cat([rows[:count] for rows in by_label.values()])


def select_flipped(
    predictions: Tensor, labels: Tensor, label2flip: Mapping[int, int], limit: int, seed: list[int]
) -> Tensor:
    """Rows of mispredictions from a flipped label to its target, at most `limit`."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    targets = labels.clone().fill_(-1)
    for label, target in label2flip.items():
        if label != target:
            targets[labels == label] = target
    return order[(predictions == targets)[order]][:limit]


@dataclass(frozen=True)
class Settings:
    """What is traced and how; with `label2flip`, the mispredictions that faulty clients would cause."""

    methods: list[str]
    inputs_per_label: int
    max_mispredictions: int
    layer_decay: float  # beta of the paper's method (eq. 6)
    weighted: bool  # the paper's shares times p_k (eq. 5)
    label2flip: Mapping[int, int]
    faulty: list[str]  # ids of the faulty clients


def trace_round(run: Run, number: int, model: nn.Module, examples: Examples, settings: Settings) -> pd.DataFrame:
    """One row per (method, input, client) of round `number`; no rows if there is nothing to trace.

    Args:
        model: of the run's architecture, on the device to compute on; its weights are overwritten.
        examples: the server's examples, those that the run's predictions are about.
    """
    rows = _select(run, number, examples, settings)
    if len(rows) == 0:
        return pd.DataFrame(columns=COLUMNS)
    view, device = run.round(number), next(model.parameters()).device
    predicted = run.predictions(number)[rows]
    weights = {client.id: client.weight for client in view.clients}
    # "neuron" as the paper and its artifact have it; "influence" over the whole state.
    arguments: dict[str, dict[str, Any]] = {
        "neuron": {
            "weights": weights if settings.weighted else None,
            "layer_decay": settings.layer_decay,
            "layers": "paper",
        },
        "influence": {"weights": weights},
    }
    frames = []
    try:
        load_exchanged_state(model, dict(run.global_state(number)))
        clients = {client.id: view.client_state(client.id) for client in view.clients}
        inputs = examples[rows].to(device).inputs
        for method in settings.methods:
            answer = trace(model, clients, inputs, targets=predicted.to(device), method=method, **arguments[method])
            frames.append(_frame(run, number, method, answer, rows, examples.labels[rows], predicted))
    except TraceFLError as error:
        raise TraceFLError(f"round {number} cannot be traced: {error}") from error
    return pd.concat(frames, ignore_index=True)


def _select(run: Run, number: int, examples: Examples, settings: Settings) -> Tensor:
    predictions, seed = run.predictions(number), [run["seed"], number]
    participants = {client.id for client in run.round(number).clients}
    if settings.label2flip and not participants & set(settings.faulty):
        return torch.empty(0, dtype=torch.int64)  # nobody here whom a misprediction could be traced to
    if settings.label2flip:
        return select_flipped(predictions, examples.labels, settings.label2flip, settings.max_mispredictions, seed)
    held = {label for client in run.clients if client.id in participants for label in client.trained_label_counts}
    return select_correct(predictions, examples.labels, held, settings.inputs_per_label, seed)


def _frame(
    run: Run, number: int, method: str, answer: Provenance, rows: Tensor, labels: Tensor, predicted: Tensor
) -> pd.DataFrame:
    n, k = answer.contributions.shape
    contributions = answer.contributions.cpu().numpy()
    label_counts = {client.id: client.trained_label_counts for client in run.clients}
    return pd.DataFrame(
        {
            "round": number,
            "method": method,
            "input": np.repeat(rows.numpy(), k),
            "client": np.tile(answer.client_ids, n),
            "label": np.repeat(labels.numpy(), k),
            "predicted": np.repeat(predicted.numpy(), k),
            "contribution": contributions.ravel(),
            "score": answer.scores.cpu().numpy().ravel(),
            "rank": rankdata(-contributions, method="ordinal", axis=1).ravel(),
            "label_examples": [
                label_counts[c].get(label, 0) for label in predicted.tolist() for c in answer.client_ids
            ],
        },
        columns=COLUMNS,
    )


COLUMNS = [
    "round",
    "method",
    "input",
    "client",
    "label",
    "predicted",
    "contribution",
    "score",
    "rank",
    "label_examples",
]


# How a metric is called in rounds.csv; {} becomes the method, for every method but the first.
NAMES = {
    "num_inputs": "num_inputs",
    "chance": "chance_accuracy",
    "largest_client": "largest_client_accuracy",
    "top_holder_chance": "top_holder_chance",
    "accuracy": "localization_accuracy{}",
    "top_holder": "top_holder_accuracy{}",
    "spearman": "spearman{}",
}


def evaluate_rounds(run: Run, provenance: pd.DataFrame, methods: list[str], faulty: set[str]) -> pd.DataFrame:
    """One row per round: loss, accuracy, inputs traced, and every metric of `Localization`.

    What no method changes (number of inputs, chance levels) stands once.
    """
    rows = []
    for record in run.rounds:
        row: dict[str, float] = {"round": record.number, "loss": record.loss, "accuracy": record.accuracy}
        for method in methods:
            part = provenance[(provenance["round"] == record.number) & (provenance["method"] == method)]
            suffix = "" if method == methods[0] else f"_{method}"
            judged = asdict(_judge(record, part, faulty))
            row |= {NAMES[key].format(suffix): value for key, value in judged.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def _judge(record: Round, part: pd.DataFrame, faulty: set[str]) -> Localization:
    k = len(record.clients)
    contributions = part["contribution"].to_numpy(dtype=np.float64).reshape(-1, k)
    counts = part["label_examples"].to_numpy(dtype=np.int64).reshape(-1, k)
    culprits = np.tile([client.id in faulty for client in record.clients], (len(counts), 1)) if faulty else counts > 0
    return localize(contributions, counts, culprits, np.array([client.num_examples for client in record.clients]))
