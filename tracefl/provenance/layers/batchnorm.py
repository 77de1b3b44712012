"""BatchNorm in eval mode: z = (x - mean) / sqrt(var + eps) * weight + bias.

All four tensors are traced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tracefl.provenance.contract import Dense
from tracefl.provenance.layers.registry import Gradients, register


@register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def batchnorm(layer: nn.Module, x: Tensor, g: Tensor) -> Gradients:
    """x̂ = (x - mean) / sqrt(var + eps): Σ g x̂ by weight, Σ g by bias, the rest multiples."""
    norm = cast(nn.BatchNorm2d, layer)
    x, g = x.reshape(*x.shape[:2], -1), g.reshape(*g.shape[:2], -1)  # [N, C, S]
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:  # normalised by the batch, which the engine then keeps to one input
        var, mean = torch.var_mean(x, dim=(0, 2), unbiased=False)
    scale = (var + norm.eps).rsqrt()
    ones = x.new_ones(x.shape[2])  # few positions are added up faster by a product than by sum
    by_bias = g @ ones
    by_weight = (x - mean[:, None]).mul_(g) @ ones * scale
    weight = norm.weight if norm.affine else 1.0
    return {
        "weight": Dense(by_weight),
        "bias": Dense(by_bias),
        "running_mean": Dense(-scale * weight * by_bias),
        "running_var": Dense(-0.5 * scale**2 * weight * by_weight),
    }


class WithStatistics(TorchFunctionMode):
    """While it is entered, normalisation by running statistics is written out for autograd."""

    arguments: dict[Any, list[str]] = {  # noqa: RUF012 (never changed)
        functional.batch_norm: list(inspect.signature(functional.batch_norm).parameters),
        functional.instance_norm: list(inspect.signature(functional.instance_norm).parameters),
        torch.batch_norm: ["input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"],
        torch.instance_norm: ["input", "weight", "bias", "running_mean", "running_var", "use_input_stats", "_", "eps"],
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.arguments:
            given = {"eps": 1e-5, **dict(zip(self.arguments[func], args, strict=False)), **(kwargs or {})}
            mean, var = given.get("running_mean"), given.get("running_var")
            by_input = given.get("training", given.get("use_input_stats", "instance" in func.__name__))
            if mean is not None and var is not None and not by_input:
                shape = (-1, *[1] * (given["input"].ndim - 2))
                z = (given["input"] - mean.view(shape)) / (var.view(shape) + given["eps"]).sqrt()
                z = z if given.get("weight") is None else z * given["weight"].view(shape)
                return z if given.get("bias") is None else z + given["bias"].view(shape)
        return func(*args, **(kwargs or {}))


def laid_out_like_input(node: Any) -> Callable[[Sequence[Tensor | None]], tuple[Tensor | None, ...]]:
    """A hook before autograd's node of a batch normalisation, which may be wrong without it.

    On the CPU, PyTorch 2.15 differentiates it wrongly, and says nothing, where one of input and
    gradient lies channels last and the other does not but has an axis of length 1.
    """

    def hook(grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        g, x = grads[0], node._saved_input
        if g is not None and g.stride() != x.stride():
            g = torch.empty_like(x).copy_(g)
        return g, *grads[1:]

    return hook
