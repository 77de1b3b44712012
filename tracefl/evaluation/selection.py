"""Which of the server's examples are traced. Every choice is a function of its arguments.

Predictions and labels are int64 [N]; the answers are rows, int64 [n], drawn at random by `seed`.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from tracefl.config import Config
from tracefl.data.examples import Examples
from tracefl.data.faults import put_trigger
from tracefl.training import evaluate

MIN_INPUTS = 10  # traced per round, as in the paper, if there are as many to choose from
TRIGGERED_BATCH = 64  # inputs that get the trigger and are predicted at a time


def faulty_clients(config: Config) -> set[str]:
    """Ids of the clients that the configuration makes faulty."""
    return {str(client) for client in config.faulty_clients_ids}


def select_correct(
    predictions: Tensor, labels: Tensor, of_interest: set[int], per_label: int, seed: list[int]
) -> Tensor:
    """Rows of correct predictions, `per_label` of each label of interest, at least ten in all.

    A label with too few correct predictions gives what it has.
    """
    order = _shuffled(labels, seed)
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
    order = _shuffled(labels, seed)
    targets = labels.clone().fill_(-1)
    for label, target in label2flip.items():
        if label != target:
            targets[labels == label] = target
    return order[(predictions == targets)[order]][:limit]


def select_wrong(predictions: Tensor, labels: Tensor, limit: int, seed: list[int]) -> Tensor:
    """Rows of mispredictions of any kind, at most `limit`."""
    order = _shuffled(labels, seed)
    return order[(predictions != labels)[order]][:limit]


def select_triggered(
    model: nn.Module, predictions: Tensor, examples: Examples, target: int, limit: int, seed: list[int]
) -> Tensor:
    """Rows whose prediction becomes the target when the trigger is put on them, at most `limit`.

    Rows of that label, and those predicted as the target without the trigger (`predictions`), are
    left out.
    """
    order = _shuffled(examples.labels, seed)
    order = order[(examples.labels[order] != target) & (predictions[order] != target)]
    found = torch.empty(0, dtype=torch.int64)
    for rows in order.split(TRIGGERED_BATCH):
        if len(found) < limit:
            predicted = evaluate(model, with_trigger(examples[rows])).predictions
            found = torch.cat([found, rows[predicted == target]])
    return found[:limit]


def with_trigger(examples: Examples) -> Examples:
    """The same examples, each with the trigger on its input."""
    return Examples(put_trigger(examples.inputs, torch.arange(len(examples))), examples.labels)


def _shuffled(labels: Tensor, seed: list[int]) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
