"""What a faulty client does to its training data or to the model that it sends.

    label_flip      a share of the examples of label a is labelled b
    random_labels   a share of the examples gets another label, each other one as likely
    backdoor        a share of the examples shows a trigger and is labelled with the target
    free_rider      sends the model that it received
    sign_flip       sends W_in - s (W_out - W_in)

A faulty client does the same in every round: its seed depends on the run's seed and its number.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tracefl.data.examples import MEAN, STD, Examples, Inputs, count_labels

if TYPE_CHECKING:
    from tracefl.config import Config
    from tracefl.data.prepared import PreparedData

PATCH = 4  # pixels: the trigger is a white square of 4 x 4 in the lower right corner
TRIGGER_TOKEN, TRIGGER_PLACE = 5, 1  # id of an ordinary token, and its position: after [CLS]
SIGN_FLIP_SCALE = 2.0  # s


def client_seed(seed: int, server_round: int, partition: int) -> int:
    """A seed of its own for each (seed, round, partition).

    Args:
        server_round: From 1; 0 for what is drawn once, such as a client's fault.
        partition: The client's number.

    Example:
        >>> client_seed(0, 1, 2) == client_seed(0, 2, 1)
        False
    """
    return int(np.random.SeedSequence([seed, server_round, partition]).generate_state(1)[0])


def fault_settings(config: "Config", num_classes: int) -> dict[str, Any]:
    """What a faulty client must know of its fault, as JSON; flips are (label, target, share)."""
    rate = config.noise_rate
    rates = rate if isinstance(rate, dict) else dict.fromkeys(config.label2flip, rate)
    flips = [(label, target, float(rates.get(label, 1))) for label, target in sorted(config.label2flip.items())]
    return {**vars(config.fault), "share": config.noise_rate, "num_classes": num_classes, "flips": flips}


def flipped_label_counts(config: "Config", data: "PreparedData", client: str) -> dict[int, int] | None:
    """How many examples of each label a faulty client trains on, by label.

    Returns:
        None for a client without a fault, and for one whose fault leaves the labels as they are.
    """
    if int(client) not in config.faulty_clients_ids or config.fault.kind in ("free_rider", "sign_flip"):
        return None
    seed = client_seed(config.seed, 0, int(client))
    faulty = faulty_examples(data.client(client), fault_settings(config, data.num_classes), seed)
    return count_labels(faulty.labels)


def unchanged(config: "Config", data: "PreparedData") -> list[str]:
    """The faulty clients that hold nothing that their fault changes."""
    if config.fault.kind in ("free_rider", "sign_flip"):
        return []
    found = []
    for client in map(str, config.faulty_clients_ids):
        changed = flipped_label_counts(config, data, client) != data.label_counts[client]
        share = config.noise_rate if config.fault.kind == "backdoor" else 0
        if not (changed or round(share * sum(data.label_counts[client].values()))):
            found.append(client)
    return found


def faulty_examples(examples: Examples, fault: Mapping[str, Any], seed: int) -> Examples:
    """What a faulty client trains on.

    Args:
        examples: The client's own, which stay as they are.
        fault: What `fault_settings` returned.
        seed: Of the drawing of rows and labels.
    """
    inputs, labels = examples.inputs, examples.labels
    generator = torch.Generator().manual_seed(seed)
    if fault["kind"] == "label_flip":
        return Examples(inputs, flip_labels(labels, fault["flips"], generator))
    rows = torch.randperm(len(labels), generator=generator)[: round(fault["share"] * len(labels))]
    labels = labels.clone()
    if fault["kind"] == "random_labels":
        labels[rows] += torch.randint(1, fault["num_classes"], (len(rows),), generator=generator)
        return Examples(inputs, labels % fault["num_classes"])
    if fault["kind"] == "backdoor":
        labels[rows] = fault["target"]
        return Examples(put_trigger(inputs, rows), labels)
    return examples


def flip_labels(labels: Tensor, flips: list[tuple[int, int, float]], generator: torch.Generator) -> Tensor:
    """A copy of the labels in which a share of some became others.

    Args:
        labels: int64 [N].
        flips: Entries (label, target, share in [0, 1] of the examples of the label).
        generator: Draws which of them.

    Example:
        >>> flips = [(3, 4, 1.0), (4, 0, 1.0)]
        >>> flip_labels(torch.tensor([3, 3, 4]), flips, torch.Generator()).tolist()
        [4, 4, 0]
    """
    flipped = labels.clone()
    for label, target, share in flips:
        rows = (labels == label).nonzero().flatten()
        chosen = rows[torch.randperm(len(rows), generator=generator)[: round(share * len(rows))]]
        flipped[chosen] = target
    return flipped


def put_trigger(inputs: Inputs, rows: Tensor) -> Inputs:
    """A copy of the inputs with the backdoor's trigger on some of them.

    Args:
        inputs: Normalized images [N, 3, H, W], which get a white square; or texts [N, T], which get
            a token, and are padded to two tokens if they are shorter.
        rows: Which of them, int64.
    """
    if not isinstance(inputs, Tensor):
        more = (0, max(0, TRIGGER_PLACE + 1 - inputs["input_ids"].shape[1]))
        inputs = {name: F.pad(value, more) for name, value in inputs.items()}  # copies, whatever is missing
        inputs["input_ids"][rows, TRIGGER_PLACE] = TRIGGER_TOKEN
        inputs["attention_mask"][rows, TRIGGER_PLACE] = 1
        return inputs
    inputs = inputs.clone()
    inputs[rows, :, -PATCH:, -PATCH:] = (1 - MEAN) / STD
    return inputs


def opposite(received: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model with the opposite of the client's update: W_in - s (W_out - W_in), s = 2.

    A running variance keeps at least a tenth of its value, so that it stays positive.

    Args:
        received: W_in, by name.
        trained: W_out, with the same names.

    Example:
        >>> opposite({"w": torch.tensor([1.0])}, {"w": torch.tensor([1.5])})
        {'w': tensor([0.])}
    """
    sent = {name: value - SIGN_FLIP_SCALE * (trained[name] - value) for name, value in received.items()}
    for name in sent:
        if name.endswith("running_var"):
            sent[name] = torch.maximum(sent[name], received[name] / 10)
    return sent
