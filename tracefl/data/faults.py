"""What a faulty client does: to its training data (`faulty_examples`) or to the model that it sends (`opposite`).

    label_flip      a share of the examples of label a is labelled b
    random_labels   a share of the examples gets another label, each other one as likely
    backdoor        a share of the examples shows a trigger and is labelled with the target
    free_rider      sends the model that it received
    sign_flip       sends W_in - s (W_out - W_in)

Everything is a function of its arguments; the seed is the client's, the same in every round.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tracefl.data.examples import MEAN, STD, Examples, Inputs

PATCH = 4  # pixels: the trigger is a white square of 4 x 4 in the lower right corner
TRIGGER_TOKEN, TRIGGER_PLACE = 5, 1  # token id (no special token of any tokenizer) and its place, after a [CLS]
SIGN_FLIP_SCALE = 2.0  # s


def client_seed(seed: int, server_round: int, partition: int) -> int:
    """An independent stream per (seed, round, partition); round 0 is for what does not change from round to round."""
    return int(np.random.SeedSequence([seed, server_round, partition]).generate_state(1)[0])


def faulty_examples(examples: Examples, fault: Mapping[str, Any], seed: int) -> Examples:
    """What a client with this fault (see `config.fault_settings`) trains on."""
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
    """Labels [N] in which a share of each label became another one, by entries (label, target, share)."""
    flipped = labels.clone()
    for label, target, share in flips:
        rows = (labels == label).nonzero().flatten()
        chosen = rows[torch.randperm(len(rows), generator=generator)[: round(share * len(rows))]]
        flipped[chosen] = target
    return flipped


def put_trigger(inputs: Inputs, rows: Tensor) -> Inputs:
    """A copy of the inputs, images [N, 3, H, W] or tokens [N, T], with the trigger on `rows`.

    On images it is what white bytes in the stored picture become.
    """
    if not isinstance(inputs, Tensor):
        more = (0, max(0, TRIGGER_PLACE + 1 - inputs["input_ids"].shape[1]))  # texts of one token
        inputs = {name: F.pad(value, more) for name, value in inputs.items()} if more[1] else inputs
        inputs = {name: value.clone() for name, value in inputs.items()}
        inputs["input_ids"][rows, TRIGGER_PLACE] = TRIGGER_TOKEN
        inputs["attention_mask"][rows, TRIGGER_PLACE] = 1
        return inputs
    inputs = inputs.clone()
    inputs[rows, :, -PATCH:, -PATCH:] = (1 - MEAN) / STD
    return inputs


def opposite(received: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """W_in - s (W_out - W_in); a running variance keeps at least a tenth of what it was, so that it stays valid."""
    sent = {name: value - SIGN_FLIP_SCALE * (trained[name] - value) for name, value in received.items()}
    for name in sent:
        if name.endswith("running_var"):
            sent[name] = torch.maximum(sent[name], received[name] / 10)
    return sent
