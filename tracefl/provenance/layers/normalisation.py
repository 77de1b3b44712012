"""Layers that normalise by the input's statistics: z = x̂ * weight + bias, x̂ free of parameters."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from tracefl.provenance.contract import Dense
from tracefl.provenance.layers.batchnorm import batchnorm
from tracefl.provenance.layers.registry import Gradients, register


@register(nn.LayerNorm)
def layernorm(layer: nn.Module, x: Tensor, g: Tensor) -> Gradients:
    norm = cast(nn.LayerNorm, layer)
    return over_last_axes(functional.layer_norm(x, norm.normalized_shape, eps=norm.eps), g, norm.normalized_shape)


@register(nn.RMSNorm)
def rmsnorm(layer: nn.Module, x: Tensor, g: Tensor) -> Gradients:
    norm = cast(nn.RMSNorm, layer)
    return over_last_axes(functional.rms_norm(x, norm.normalized_shape, eps=norm.eps), g, norm.normalized_shape)


@register("transformers.models.squeezebert.modeling_squeezebert.SqueezeBertLayerNorm")
def layernorm_of_squeezebert(layer: nn.Module, x: Tensor, g: Tensor) -> Gradients:
    """A LayerNorm over the channels of [N, C, S]."""
    return layernorm(layer, x.mT, g.mT)


@register(nn.GroupNorm)
def groupnorm(layer: nn.Module, x: Tensor, g: Tensor) -> Gradients:
    norm = cast(nn.GroupNorm, layer)
    return over_channels(functional.group_norm(x, norm.num_groups, eps=norm.eps), g)


@register(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instancenorm(layer: nn.Module, x: Tensor, g: Tensor) -> Gradients:
    norm = cast(nn.InstanceNorm2d, layer)
    if x.ndim == norm._get_no_batch_dim():
        x, g = x[None], g[None]
    if norm.running_mean is not None and norm.track_running_stats:
        return batchnorm(layer, x, g)
    return over_channels(functional.instance_norm(x, eps=norm.eps), g)


def over_last_axes(xhat: Tensor, g: Tensor, shape: tuple[int, ...]) -> Gradients:
    N = len(xhat) if xhat.ndim > len(shape) else 1
    xhat, g = xhat.reshape(N, -1, *shape), g.reshape(N, -1, *shape)
    return {"weight": Dense((g * xhat).sum(1)), "bias": Dense(g.sum(1))}


def over_channels(xhat: Tensor, g: Tensor) -> Gradients:
    """[N, C, ...]"""
    xhat, g = xhat.reshape(*xhat.shape[:2], -1), g.reshape(*g.shape[:2], -1)
    return {"weight": Dense((g * xhat).sum(2)), "bias": Dense(g.sum(2))}
