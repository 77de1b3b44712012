"""What a faulty client does to its own training data."""

import torch
from torch import Tensor


def flip_labels(
    labels: Tensor, label2flip: dict[int, int], rates: dict[int, float], generator: torch.Generator
) -> Tensor:
    """Labels [N] in which a share `rates[a]` of the examples of each label a in `label2flip` became `label2flip[a]`."""
    flipped = labels.clone()
    for label, target in label2flip.items():
        rows = (labels == label).nonzero().flatten()
        chosen = rows[torch.randperm(len(rows), generator=generator)[: round(rates[label] * len(rows))]]
        flipped[chosen] = target
    return flipped
