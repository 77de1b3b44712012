"""Convolutions are linear maps of patches: dy/dW = Σ_s g_s patch_sᵀ over output positions s.

A transposed convolution swaps input and output: dy/dW = Σ_s x_s patch_s(g)ᵀ over input positions s.
"""

from __future__ import annotations

import itertools
import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tracefl.provenance.contract import Dense, Gradient, Outer, whole
from tracefl.provenance.layers.registry import Gradients, register


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(layer: nn.Module, x: Tensor, g: Tensor) -> Gradients:
    conv = cast(nn.Conv2d, layer)
    x, g = batched(conv, x), batched(conv, g)
    zeros = conv.padding_mode == "zeros"
    padding = conv._reversed_padding_repeated_twice
    padded = functional.pad(x, padding, mode="constant" if zeros else conv.padding_mode) if any(padding) else x
    before = padding[-2::-2]  # of each axis, its first padding
    seen = (*zip(before, x.shape[2:], strict=True),) if zeros else (*((0, size) for size in padded.shape[2:]),)
    return {"weight": by_weight(conv, g, padded, seen), **by_bias(conv, g)}


@register(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed_convolution(layer: nn.Module, x: Tensor, g: Tensor) -> Gradients:
    conv = cast(nn.Conv2d, layer)
    x, g = batched(conv, x), batched(conv, g)
    paddings = cast(tuple[int, ...], conv.padding)
    padded = functional.pad(g, [p for axis in reversed(paddings) for p in (axis, axis)])
    seen = (*zip(paddings, g.shape[2:], strict=True),)
    return {"weight": by_weight(conv, x, padded, seen), **by_bias(conv, g)}


def batched(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return x if x.ndim == 2 + len(conv.kernel_size) else x[None]


def by_bias(conv: nn.Conv2d, g: Tensor) -> Gradients:
    return {} if conv.bias is None else {"bias": Dense(g.flatten(2).sum(2))}


def by_weight(conv: nn.Conv2d, left: Tensor, padded: Tensor, seen: tuple[tuple[int, int], ...]) -> Gradient:
    """Σ_s left_s patch_sᵀ.

    Args:
        left: [N, R, *positions].
        padded: what patches are cut from, [N, C, ...].
        seen: of each axis where its input lies within the padding, (start, size).
    """
    positions = left.shape[2:]
    axes = list(zip(seen, positions, conv.kernel_size, conv.stride, conv.dilation, strict=True))
    taps = tuple(live_taps(*axis) for axis in axes)

    def live(theta: Tensor) -> Tensor:
        return theta[(slice(None), slice(None), *taps)]

    select = live
    if conv.groups > 1 or 4 * math.prod(tap.stop - tap.start for tap in taps) > math.prod(conv.kernel_size):
        taps = tuple(slice(0, size) for size in conv.kernel_size)  # scattered reads cost more than the products
        select = whole

    N, groups, channels = len(left), conv.groups, padded.shape[1]
    windows = [
        [slice(t * dilation, t * dilation + (size - 1) * stride + 1, stride) for t in range(tap.start, tap.stop)]
        for tap, (_, size, _, stride, dilation) in zip(taps, axes, strict=True)
    ]
    left = left.reshape(N * groups, left.shape[1] // groups, -1).mT
    if all(len(window) == 1 for window in windows):
        patches = padded[(slice(None), slice(None), *(window[0] for window in windows))]
        right = patches.reshape(N * groups, channels // groups, -1).mT
    else:
        padded = padded.movedim(1, -1).contiguous()  # channels last: whole runs of them are copied
        patches = padded.new_empty(N, *positions, channels, math.prod(map(len, windows)))
        for i, window in enumerate(itertools.product(*windows)):
            patches[..., i] = padded[(slice(None), *window)]
        right = patches.reshape(N, left.shape[1], groups, -1).transpose(1, 2).reshape(N * groups, left.shape[1], -1)
    if groups == 1:
        return Outer(left, right, select)
    return Dense(torch.bmm(left.mT, right).view(N, groups * left.shape[2], -1))


def live_taps(seen: tuple[int, int], positions: int, kernel: int, stride: int, dilation: int) -> slice:
    """The range of kernel taps along an axis that ever see the input; others see only padding."""
    first, size = seen
    live = [
        t for t in range(kernel) if any(first <= s * stride + t * dilation < first + size for s in range(positions))
    ]
    return slice(live[0], live[-1] + 1) if live else slice(0, 1)
