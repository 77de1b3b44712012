"""Integrated provenance: the gradient averaged over the straight path from the incoming to the outgoing global model.

    ∫₀¹ dy/dW (W_ref + t (W_g - W_ref)) dt  ≈  Σ_i w_i dy/dW (W_ref + t_i (W_g - W_ref))    (trapezoid rule)

Contracted with W_g - W_ref the integral is y(W_g) - y(W_ref), so the error of the sum is known. Networks of ReLUs are
not smooth along the path: the error falls as 1 / steps for every rule, and this one keeps its points when refined.
ResNet-18, first round from random weights, 4, 8, 16, 32 points: 14, 4.7, 2.5, 0.7 % by this rule, 7.3, 4.6, 3.1, 1.2 %
by Gauss and Legendre's; points crowded at the start, where the variances move most, gain nothing either.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tracefl.provenance.capture import Batch, Explain, logits_of
from tracefl.provenance.clients import State
from tracefl.provenance.collect import batch_size, take, take_targets


def along_path(model: nn.Module, reference: State, steps: int) -> Iterator[tuple[float, nn.Module]]:
    """(w_i, model at t_i) of `steps` intervals; one copy that moves, its running variances between positive ones."""
    return _at(model, reference, [(i / steps, (0.5 if i in (0, steps) else 1) / steps) for i in range(steps + 1)])


def between(model: nn.Module, reference: State, steps: int) -> Iterator[tuple[float, nn.Module]]:
    """The points that turn `steps` intervals into twice as many; the sum so far then counts half."""
    return _at(model, reference, [((i + 0.5) / steps, 0.5 / steps) for i in range(steps)])


def _at(model: nn.Module, reference: State, points: list[tuple[float, float]]) -> Iterator[tuple[float, nn.Module]]:
    moving = copy.deepcopy(model)
    for t, weight in points:
        place(moving, model, reference, t)
        yield weight, moving


def place(moving: nn.Module, model: nn.Module, reference: State, t: float) -> None:
    """Set the floating-point state of `moving` to W_ref + t (W_g - W_ref)."""
    there = model.state_dict()
    with torch.no_grad():
        for name, tensor in moving.state_dict().items():
            if tensor.is_floating_point() and name in reference:
                start = reference[name].to(tensor.device, tensor.dtype)
                tensor.copy_(torch.lerp(start, there[name], t))


@torch.no_grad()
def change_of_output(
    model: nn.Module, reference: State, inputs: Batch, targets: Tensor | None, explain: Explain, chunk: int = 32
) -> tuple[Tensor, Tensor]:
    """y(W_g) - y(W_ref) as float64 [N], and the targets [N], which W_g predicts where none are given."""
    end = copy.deepcopy(model).eval()
    start = copy.deepcopy(end)
    place(start, model, reference, 0.0)
    N = batch_size(inputs)
    changes, explained = [], []
    for first in range(0, N, chunk):
        batch, own = take(inputs, first, first + chunk), take_targets(targets, first, first + chunk)
        after, own = explain(logits_of(end, batch), own)
        before, _ = explain(logits_of(start, batch), own)
        changes.append((after.double() - before.double()).cpu())
        explained.append(own)
    return torch.cat(changes), torch.cat(explained)
