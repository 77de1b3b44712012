"""Is the gradient the derivative? A model's own `autograd.Function` may say otherwise.

A reversed gradient or a straight-through estimator trains a model, but does not tell how its output
depends on its weights. Where a pass holds such a function, the share of a made-up client, a small
random step D of the weights, is compared with what the output changes by: <D, dy/dW> with
(y(W + D) - y(W - D)) / 2, for D and D / 2. Only if those two agree do they tell; otherwise smaller
and larger steps are tried. A function that rounds is flat, or jumps, at every one.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tracefl.errors import TraceFLError

STEP = 1e-3  # of a weight's size
SCALES = (1.0, 0.1, 0.01, 10.0)  # of the steps that are tried, until one is clear
AGREE, DIFFER = 0.03, 0.1  # relative differences


def own_functions(nodes: list[Any]) -> list[str]:
    """Of a graph's nodes the names of the functions that are written in Python, or round."""
    return sorted({node.name().removesuffix("Backward").removesuffix("Backward0") for node in nodes if is_own(node)})


def is_own(node: Any) -> bool:
    """Whether a node of autograd's may give another gradient than the derivative."""
    kind: Any = torch.autograd.function.BackwardCFunction
    return isinstance(node, kind) or node.name().startswith("FakeQuantize")


def random_step(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A small random step of every tensor; statistics keep their sign."""
    generator = torch.Generator().manual_seed(0)
    steps = {}
    for name, tensor in tensors.items():
        w = tensor.detach()
        size = w.abs() + (w.abs().mean() or 1.0) if isinstance(tensor, nn.Parameter) else w.abs()
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
        TraceFLError: y changes by something else, or not as a differentiable function does.
    """
    kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def at(factor: float) -> float:
        for name, tensor in tensors.items():
            tensor.data.copy_(kept[name] + factor * steps[name])
        return y().item()

    try:
        for scale in SCALES:
            change, half = ((at(factor) - at(-factor)) / (2 * factor) for factor in (scale, scale / 2))
            clear = abs(half) > 0 and abs(change - half) <= AGREE * abs(half)
            if clear or (change == half == share == 0):
                break
    finally:
        for name, tensor in tensors.items():
            tensor.data.copy_(kept[name])
    if not clear or abs(share - half) > DIFFER * max(abs(half), abs(share)):
        said = f"the model's own function {' or '.join(names)} gives a gradient that is not its derivative"
        remedy = "make its backward the derivative of its forward (no reversal, no straight-through), or leave it out"
        raise TraceFLError(f"{said} (a small step changes the output by {half:.3g}, not {share:.3g}): {remedy}")
