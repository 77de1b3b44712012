"""Trace every round of a recorded run: choose the inputs, ask the provenance engine, lay the answers out as a table."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from tracefl.data.examples import Examples, Inputs
from tracefl.errors import TraceFLError
from tracefl.evaluation.localization import Localization, localize, name_faulty
from tracefl.evaluation.selection import (
    select_correct,
    select_flipped,
    select_triggered,
    select_wrong,
    with_trigger,
)
from tracefl.evaluation.stopwatch import Stopwatch
from tracefl.federation.noise import gaussian_noise
from tracefl.models import load_exchanged_state
from tracefl.provenance import Provenance, trace
from tracefl.runs import Round, Run


@dataclass(frozen=True)
class Settings:
    """What is traced and how; with faulty clients, the mispredictions that they would cause."""

    methods: list[str]
    inputs_per_label: int
    max_mispredictions: int
    layer_decay: float  # beta of the paper's method (eq. 6)
    weighted: bool  # the paper's shares times p_k (eq. 5)
    label2flip: Mapping[int, int]
    faulty: list[str]  # ids of the faulty clients
    fault: str = "label_flip"  # what they do
    target: int = 0  # of a backdoor
    noise: float = 0.0  # z C of differential privacy: the noise's standard deviation times the number of participants


def trace_round(
    run: Run, number: int, model: nn.Module, examples: Examples, settings: Settings, watch: Stopwatch | None = None
) -> pd.DataFrame:
    """One row per (method, input, client) of round `number`; no rows if there is nothing to trace.

    With a backdoor, an input is the example of that index with the trigger on it.

    Args:
        model: of the run's architecture, on the device to compute on; its weights are overwritten.
        examples: the server's examples, those that the run's predictions are about.
        watch: measures every method, from checked client states on disk to answers.
    """
    view, device, watch = run.round(number), next(model.parameters()).device, watch or Stopwatch()
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
        rows = _select(run, number, model, examples, settings)
        if len(rows) == 0:
            return pd.DataFrame(columns=COLUMNS)
        chosen, predicted = examples[rows], run.predictions(number)[rows]
        if settings.faulty and settings.fault == "backdoor":
            chosen, predicted = with_trigger(chosen), torch.full_like(predicted, settings.target)
        inputs, targets = chosen.to(device).inputs, predicted.to(device)
        clients = {client.id: view.client_state(client.id) for client in view.clients}
        for state in clients.values():
            state.check()  # before the clock runs
        for method in settings.methods:
            with watch.measure(method, len(rows)):
                answer = trace(model, clients, inputs, targets=targets, method=method, **arguments[method])
            frame = _frame(run, number, method, answer, rows, examples.labels[rows], predicted)
            if method == "influence" and answer.residual is not None:
                noise = _noise_share(run, number, model, inputs, targets, settings.noise)
                frame["server"] = np.repeat(answer.residual.cpu().numpy(), len(answer.client_ids))
                frame["noise"] = np.repeat(noise.cpu().numpy(), len(answer.client_ids))
            frames.append(frame)
    except TraceFLError as error:
        raise TraceFLError(f"round {number} cannot be traced: {error}") from error
    return pd.concat(frames, ignore_index=True)


def _select(run: Run, number: int, model: nn.Module, examples: Examples, settings: Settings) -> Tensor:
    """Rows to trace; `model` holds the round's global model."""
    predictions, seed = run.predictions(number), [run["seed"], number]
    participants = {client.id for client in run.round(number).clients}
    labels, limit = examples.labels, settings.max_mispredictions
    if not settings.faulty:
        held = {label for client in run.clients if client.id in participants for label in client.trained_label_counts}
        return select_correct(predictions, labels, held, settings.inputs_per_label, seed)
    if not participants & set(settings.faulty):
        return torch.empty(0, dtype=torch.int64)  # nobody here whom a misprediction could be traced to
    if settings.fault == "label_flip":
        return select_flipped(predictions, labels, settings.label2flip, limit, seed)
    if settings.fault == "backdoor":
        return select_triggered(model, predictions, examples, settings.target, limit, seed)
    return select_wrong(predictions, labels, limit, seed)


def _noise_share(run: Run, number: int, model: nn.Module, inputs: Inputs, targets: Tensor, noise: float) -> Tensor:
    """[N] share of the round's noise in each prediction, < noise, dy/dW >: the noise is drawn once more."""
    if not noise:
        return torch.zeros(len(targets))
    released, buffers = run.global_state(number), dict(model.named_buffers())
    std = noise / len(run.round(number).clients)
    noisy = {
        name: value if name in buffers else value + gaussian_noise(name, value, std, run["seed"], number)
        for name, value in released.items()
    }
    weights = {"noise": 1.0}
    return trace(model, {"noise": noisy}, inputs, targets=targets, weights=weights, method="influence").contributions[
        :, 0
    ]


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
            "server": np.full(n * k, np.nan),
            "noise": np.full(n * k, np.nan),
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
    "server",
    "noise",
]


# How a metric is called in rounds.csv; {} becomes the method's suffix: the paper's method has the plain names.
SUFFIX = {"neuron": "", "influence": "_influence"}
NAMES = {
    "num_inputs": "num_inputs",
    "chance": "chance_accuracy",
    "largest_client": "largest_client_accuracy",
    "top_holder_chance": "top_holder_chance",
    "accuracy": "localization_accuracy{}",
    "top_holder": "top_holder_accuracy{}",
    "spearman": "spearman{}",
}
# The same where clients are faulty; the rank of client 3 is called rank_of_c3{}.
FAULTY_NAMES = {
    "precision": "faulty_precision{}",
    "precision_chance": "faulty_precision_chance",
    "recall": "faulty_recall{}",
    "recall_chance": "faulty_recall_chance",
    "rank_chance": "faulty_rank_chance",
}
RANK = "rank_of_c{}"


def evaluate_rounds(run: Run, provenance: pd.DataFrame, methods: list[str], faulty: set[str]) -> pd.DataFrame:
    """One row per round: loss, accuracy, inputs traced, every metric of `Localization`, with faulty clients those of
    `FaultNaming`, and the server's own part in the influence.

    What no method changes (number of inputs, chance levels) stands once.
    """
    rows = []
    for record in run.rounds:
        row: dict[str, float] = {"round": record.number, "loss": record.loss, "accuracy": record.accuracy}
        for method in methods:
            part = provenance[(provenance["round"] == record.number) & (provenance["method"] == method)]
            suffix = SUFFIX[method]
            judged = asdict(_judge(record, part, faulty))
            row |= {NAMES[key].format(suffix): value for key, value in judged.items()}
            if faulty:
                row |= _naming(record, part, faulty, suffix)
            if method == "influence":
                row |= _ledger(part)
        rows.append(row)
    return pd.DataFrame(rows)


def _judge(record: Round, part: pd.DataFrame, faulty: set[str]) -> Localization:
    k = len(record.clients)
    contributions = part["contribution"].to_numpy(dtype=np.float64).reshape(-1, k)
    counts = part["label_examples"].to_numpy(dtype=np.int64).reshape(-1, k)
    culprits = np.tile([client.id in faulty for client in record.clients], (len(counts), 1)) if faulty else counts > 0
    return localize(contributions, counts, culprits, np.array([client.num_examples for client in record.clients]))


def _naming(record: Round, part: pd.DataFrame, faulty: set[str], suffix: str) -> dict[str, float]:
    present = np.array([client.id in faulty for client in record.clients])
    row = {RANK.format(client) + suffix: float("nan") for client in sorted(faulty, key=int)}
    if not present.any():
        return row | {name.format(suffix): float("nan") for name in FAULTY_NAMES.values()}
    found = name_faulty(part["rank"].to_numpy(dtype=np.int64).reshape(-1, len(present)), present, len(faulty))
    ids = [client.id for client in record.clients if client.id in faulty]
    row |= {RANK.format(client) + suffix: rank for client, rank in zip(ids, found.ranks.tolist(), strict=True)}
    return row | {name.format(suffix): getattr(found, key) for key, name in FAULTY_NAMES.items()}


def _ledger(part: pd.DataFrame) -> dict[str, float]:
    """What the server added to the fusion (clipping, noise, momentum, a median), and its noise alone.

    Mean over inputs of |server| and |noise| as shares of sum_k |contribution_k| + |server|.
    """
    inputs = part.assign(size=part["contribution"].abs()).groupby("input")
    gross = inputs["size"].sum() + inputs["server"].first().abs()
    return {f"{name}_share": (inputs[name].first().abs() / gross).mean() for name in ("server", "noise")}
