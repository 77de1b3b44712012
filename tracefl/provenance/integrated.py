"""Integrated provenance: the gradient averaged from the incoming to the outgoing global model.

    ∫₀¹ dy/dW (W_ref + t (W_g - W_ref)) dt  ≈  Σ_i w_i dy/dW (W_ref + t_i (W_g - W_ref))

by the trapezoid rule.

Contracted with W_g - W_ref the integral is y(W_g) - y(W_ref), so the error of the sum is known.
Networks of ReLUs are not smooth along the path: the error falls as 1 / steps for every rule, and
this one keeps its points when refined. ResNet-18, first round from random weights, 4, 8, 16, 32
points: 14, 4.7, 2.5, 0.7 % by this rule, 7.3, 4.6, 3.1, 1.2 % by Gauss and Legendre's; points
crowded at the start, where the variances move most, gain nothing either.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tracefl.classifier import copied
from tracefl.errors import as_sentence
from tracefl.provenance.contract import Shares
from tracefl.states import State, is_continuous

TOLERANCE, FIRST_STEPS, MOST_STEPS = 0.01, 16, 256


def integrate(
    model: nn.Module, reference: State, steps: int | None, shares: Shares, add_at: Callable[[nn.Module, float], Tensor]
) -> Tensor:
    """Add the shares at every point of the path, by its weight; the change of y, float64 [N].

    Args:
        steps: intervals of the path; None: doubled from 16 until the model's own column, the last,
            misses the change of y by less than 1 %, up to 256.
        add_at: adds a number times the shares at a model; its y [N].
    """
    moving, end, count = copied(model), model.state_dict(), steps or FIRST_STEPS

    def add(t: float, weight: float) -> Tensor:
        """At W_ref + t (W_g - W_ref), whose running variances lie between positive ones."""
        with torch.no_grad():
            for name, tensor in moving.state_dict().items():
                if is_continuous(tensor) and name in reference:
                    with as_sentence(
                        f"reference: tensor {name!r} does not fit the model's", "correct it", RuntimeError
                    ):
                        tensor.copy_(torch.lerp(reference[name].to(tensor.device, tensor.dtype), end[name], t))
        return add_at(moving, weight)

    change = add(1.0, 0.5 / count) - add(0.0, 0.5 / count)
    for i in range(1, count):
        add(i / count, 1 / count)
    while steps is None and count < MOST_STEPS:
        found = torch.stack([layer[:, -1] for layer in shares.layers.values()]).sum(0).cpu()
        if (found - change).abs().sum() <= TOLERANCE * change.abs().sum():
            break
        for layer in shares.layers.values():
            layer /= 2
        for i in range(count):
            add((i + 0.5) / count, 0.5 / count)
        count *= 2
    return change
