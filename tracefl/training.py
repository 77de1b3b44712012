"""Train and evaluate one model on one set of examples."""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracefl.classifier import logits_of, whole_float32
from tracefl.data.examples import Examples

EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Evaluation:
    """How a model does on N examples.

    Attributes:
        loss: Mean cross-entropy; of `evaluate`, NaN where an output is not finite.
        accuracy: In [0, 1]; an own app's may be in percent.
        predictions: The predicted class of every example, int64 [N], on the CPU.
    """

    loss: float
    accuracy: float
    predictions: Tensor


def keep_freed_memory() -> None:
    """Let this process keep large freed blocks for the next batch or model, where glibc allocates.

    By default each is given back and fetched again: a system call, and a page fault per 4 KiB.
    """
    with suppress(AttributeError, TypeError):  # another allocator
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def train(
    model: nn.Module, examples: Examples, *, epochs: int, lr: float, batch_size: int, seed: int, proximal_mu: float = 0
) -> float:
    """Train a model in place: with Adam on images, on texts as transformers are fine-tuned (AdamW).

    The result depends on the arguments alone: the seed sets the order of the examples and dropout.

    Args:
        model: Takes `examples.inputs`; trained on the device that it is on.
        examples: The client's, at least one.
        epochs: Passes over the examples.
        lr: Learning rate, the same in all steps.
        batch_size: Examples in a step.
        seed: Of torch's global generator, which is set, and of the order.
        proximal_mu: FedProx's mu: adds mu/2 |W - W_in|^2 to the objective.

    Returns:
        The mean cross-entropy over the examples of all steps, without FedProx's term.
    """
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    examples = examples.to(device)
    images = isinstance(examples.inputs, Tensor)
    step = torch.optim.Adam(model.parameters(), lr=lr, fused=True).step if images else _adamw(model, lr)
    start = [p.detach().clone() for p in model.parameters()] if proximal_mu else []
    model.train()
    total, seen = torch.zeros((), dtype=torch.float64, device=device), 0
    for _ in range(epochs):
        for rows in batches(len(examples), batch_size, order):
            model.zero_grad(set_to_none=True)
            batch = examples[rows]
            loss = F.cross_entropy(logits_of(model, batch.inputs), batch.labels)
            pull = sum(((p - w).square().sum() for p, w in zip(model.parameters(), start, strict=False)), start=0.0)
            (loss + proximal_mu / 2 * pull).backward()
            step()
            total += loss.detach() * len(rows)
            seen += len(rows)
    return float(total / seen)


def _adamw(model: nn.Module, lr: float) -> Callable[[], object]:
    """AdamW with weight decay on matrices only and gradients clipped to norm 1.

    The rate is constant, without warm-up, since a client takes few steps in a round.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]  # biases and normalisation
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)

    def step() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def batches(count: int, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """The rows of one epoch, shuffled and split into batches.

    A last batch of one row is added to the batch before it: BatchNorm cannot train on one value.

    Example:
        >>> [len(rows) for rows in batches(9, 4, torch.Generator())]
        [4, 5]
    """
    parts = list(torch.randperm(count, generator=generator).split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


@torch.no_grad()
@whole_float32()
def evaluate(model: nn.Module, examples: Examples) -> Evaluation:
    """Loss, accuracy and predictions of a model, which is put in eval mode.

    Args:
        model: On any device; examples are moved there in batches of 256.
        examples: At least one.

    Returns:
        The `Evaluation` on all of them.
    """
    device = next(model.parameters()).device
    model.eval()
    parts = (examples[rows].to(device) for rows in torch.arange(len(examples)).split(EVALUATION_BATCH))
    logits = torch.cat([logits_of(model, part.inputs).cpu() for part in parts])
    predictions = logits.argmax(dim=1)
    accuracy = (predictions == examples.labels).double().mean().item()
    loss = F.cross_entropy(logits, examples.labels).item() if logits.isfinite().all() else float("nan")
    return Evaluation(loss, accuracy, predictions)
