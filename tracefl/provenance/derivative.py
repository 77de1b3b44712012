"""Is the gradient the derivative? A model's own `autograd.Function` may say otherwise.

A reversed gradient or a straight-through estimator trains a model, but does not tell how its output
depends on its weights. Where a pass holds such a function, the share of a made-up client, a small
random step D of the weights, is compared with what the output changes by: <D, dy/dW> with
y(W + D) - y(W - D), twice, for D and D / 2. Only if those two agree does the gradient have to.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tracefl.errors import TraceFLError

STEP = 1e-3  # of a weight's size
AGREE, DIFFER = 0.05, 0.2  # relative differences


def own_functions(nodes: list[Any]) -> list[str]:
    """Of a graph's nodes the names of the functions that are written in Python."""
    kind: Any = torch.autograd.function.BackwardCFunction
    return sorted({node.name().removesuffix("Backward") for node in nodes if isinstance(node, kind)})


def random_step(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A small random step of every tensor; statistics keep their sign."""
    generator = torch.Generator().manual_seed(0)
    steps = {}
    for name, tensor in tensors.items():
        w = tensor.detach()
        size = w.abs() + w.abs().mean() if isinstance(tensor, nn.Parameter) else w.abs()
        steps[name] = STEP * size * torch.randn(w.shape, generator=generator).to(w.device, w.dtype)
    return steps


@torch.no_grad()
def check_derivative(
    names: list[str], share: float, steps: Mapping[str, Tensor], tensors: Mapping[str, Tensor], y: Callable[[], Tensor]
) -> None:
    """Compare the share of a step with the change of y.

    Args:
        names: of the model's own functions, for the message.
        share: <D, dy/dW>.
        steps: D, for every tensor.
        tensors: W; they are as they were on exit.
        y: the explained output of one input at the present weights.

    Raises:
        TraceFLError: the change of y is clear, and another one.
    """
    kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def at(factor: float) -> float:
        for name, tensor in tensors.items():
            tensor.data.copy_(kept[name] + factor * steps[name])
        return y().item()

    try:
        changes = [(at(factor) - at(-factor)) / (2 * factor) for factor in (1.0, 0.5)]
    finally:
        for name, tensor in tensors.items():
            tensor.data.copy_(kept[name])
    clear = abs(changes[0] - changes[1]) <= AGREE * abs(changes[1])
    if clear and abs(share - changes[1]) > DIFFER * max(abs(changes[1]), abs(share)):
        said = f"the model's own function {' or '.join(names)} gives a gradient that is not its derivative"
        remedy = "make its backward the derivative of its forward (no reversal, no straight-through), or leave it out"
        raise TraceFLError(f"{said} (a small step changes the output by {changes[1]:.3g}, not {share:.3g}): {remedy}")
