"""Convolutions are linear maps of patches of the input: dy/dW = Σ_s g_s patch_sᵀ over output pixels s."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tracefl.provenance.gradients import Dense, Gradient, Outer
from tracefl.provenance.layers.registry import register


def live_taps(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> slice:
    """The range of kernel taps along one axis that ever see the input; others see only padding and give 0."""
    live = [
        t for t in range(kernel) if any(0 <= o * stride - padding + t * dilation < size for o in range(out))
    ]
    return slice(live[0], live[-1] + 1) if live else slice(0, 1)


@register(nn.Conv2d)
def conv2d(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Gradient]:
    conv = cast(nn.Conv2d, layer)
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    (H, W), (out_h, out_w) = x.shape[2:], g.shape[2:]
    ph, pw = cast(tuple[int, int], conv.padding)
    rows, columns = live_taps(H, out_h, kh, sh, ph, dh), live_taps(W, out_w, kw, sw, pw, dw)
    padded = functional.pad(x, (pw, pw, ph, ph))
    # patches [N, I, taps, taps, out_h, out_w]
    patches = torch.stack(
        [
            torch.stack(
                [
                    padded[
                        :,
                        :,
                        r * dh : r * dh + (out_h - 1) * sh + 1 : sh,
                        c * dw : c * dw + (out_w - 1) * sw + 1 : sw,
                    ]
                    for c in range(columns.start, columns.stop)
                ],
                2,
            )
            for r in range(rows.start, rows.stop)
        ],
        2,
    )
    right = patches.flatten(4).flatten(1, 3).mT
    return {
        "weight": Outer(g.flatten(2).mT, right, lambda theta: theta[:, :, rows, columns]),
        "bias": Dense(g.sum((2, 3))),
    }
