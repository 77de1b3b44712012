"""Which of the server's examples are traced. Every choice is a function of its arguments.

Predictions and labels are int64 [N]; the answers are rows, int64 [n], drawn at random by `seed`.
"""

import math

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


def select_correct(predictions: Tensor, labels: Tensor, held: set[int], per_label: int, seed: list[int]) -> Tensor:
    """Rows of correct predictions, `per_label` of each label in `held`, at least ten in all.

    A label with too few correct predictions gives what it has.
    """
    correct = _shuffled(predictions == labels, seed)
    by_label = [correct[labels[correct] == label] for label in sorted(held)]
    filled = sum(len(rows) > 0 for rows in by_label)
    count = max(per_label, math.ceil(MIN_INPUTS / max(filled, 1)))
    return torch.cat([rows[:count] for rows in by_label] or [correct[:0]])


def select_flipped(
    predictions: Tensor, labels: Tensor, label2flip: dict[int, int], limit: int, seed: list[int]
) -> Tensor:
    """Rows of mispredictions from a flipped label to its target, at most `limit`."""
    targets = labels.clone().fill_(-1)
    for label, target in label2flip.items():
        if label != target:
            targets[labels == label] = target
    return _shuffled(predictions == targets, seed)[:limit]


def select_wrong(predictions: Tensor, labels: Tensor, limit: int, seed: list[int]) -> Tensor:
    """Rows of mispredictions of any kind, at most `limit`."""
    return _shuffled(predictions != labels, seed)[:limit]


def select_triggered(
    model: nn.Module, predictions: Tensor, examples: Examples, target: int, limit: int, seed: list[int]
) -> Tensor:
    """Rows whose prediction becomes the target when the trigger is put on them, at most `limit`.

    Rows of that label, and those predicted as the target without the trigger (`predictions`), are
    left out.
    """
    order = _shuffled((examples.labels != target) & (predictions != target), seed)
    found = torch.empty(0, dtype=torch.int64)
    for rows in order.split(TRIGGERED_BATCH):
        if len(found) < limit:
            predicted = evaluate(model, with_trigger(examples[rows])).predictions
            found = torch.cat([found, rows[predicted == target]])
    return found[:limit]


def with_trigger(examples: Examples) -> Examples:
    """The same examples, each with the trigger on its input."""
    return Examples(put_trigger(examples.inputs, torch.arange(len(examples))), examples.labels)


def _shuffled(wanted: Tensor, seed: list[int]) -> Tensor:
    """The rows at which `wanted`, bool [N], is true."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(wanted)))
    return order[wanted[order]]
