"""What a faulty client does to its own training data."""

import numpy as np
import torch
from torch import Tensor


def client_seed(seed: int, server_round: int, partition: int) -> int:
    """An independent stream per (seed, round, partition); round 0 is for what does not change from round to round."""
    return int(np.random.SeedSequence([seed, server_round, partition]).generate_state(1)[0])


def flip_labels(labels: Tensor, label2flip: dict[int, int], rates: dict[int, float], seed: int) -> Tensor:
    """Labels [N] in which a share `rates[a]` of each label a in `label2flip` became `label2flip[a]`."""
    generator = torch.Generator().manual_seed(seed)
    flipped = labels.clone()
    for label, target in label2flip.items():
        rows = (labels == label).nonzero().flatten()
        chosen = rows[torch.randperm(len(rows), generator=generator)[: round(rates[label] * len(rows))]]
        flipped[chosen] = target
    return flipped
