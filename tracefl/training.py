"""Train and evaluate one model on one set of examples."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracefl.data.examples import Examples

EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy, accuracy in [0, 1], and the predicted class int64 [N] of every example."""

    loss: float
    accuracy: float
    predictions: Tensor


def train(model: nn.Module, examples: Examples, *, epochs: int, lr: float, batch_size: int, seed: int) -> float:
    """Train in place with Adam; the mean loss over all steps' examples.

    The result is a function of the arguments alone: `seed` rules the order of the examples and dropout.
    """
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    inputs, labels = examples.inputs.to(device), examples.labels.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    model.train()
    total, seen = torch.zeros((), dtype=torch.float64, device=device), 0
    for _ in range(epochs):
        for rows in batches(len(labels), batch_size, order):
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(inputs[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
            seen += len(rows)
    return float(total / seen)


def batches(count: int, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """A shuffled epoch; a last batch of one joins its neighbour, since BatchNorm cannot train on one value."""
    parts = list(torch.randperm(count, generator=generator).split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


@torch.no_grad()
def evaluate(model: nn.Module, examples: Examples) -> Evaluation:
    """Loss, accuracy and predictions in eval mode."""
    device = next(model.parameters()).device
    model.eval()
    logits = torch.cat([model(part.to(device)).cpu() for part in examples.inputs.split(EVALUATION_BATCH)])
    predictions = logits.argmax(dim=1)
    return Evaluation(
        loss=F.cross_entropy(logits, examples.labels).item(),
        accuracy=(predictions == examples.labels).double().mean().item(),
        predictions=predictions,
    )
