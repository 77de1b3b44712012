"""Every layer rule against autograd on the layer itself, on random shapes: <θ_k, dy/dθ> for y = Σ c_j z_j."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.squeezebert.modeling_squeezebert import SqueezeBertLayerNorm
from transformers.pytorch_utils import Conv1D

from tests.provenance.reference import batchnorm
from tracefl.errors import TraceFLError
from tracefl.provenance.contract import contract
from tracefl.provenance.layers import rule_for

torch.set_num_threads(2)
sizes = st.integers(1, 4)


def linear(draw):
    i, o = draw(sizes), draw(sizes)
    shape = draw(st.lists(sizes, max_size=2))
    return nn.Linear(i, o, bias=draw(st.booleans())), (*shape, i)


def conv1d_of_transformers(draw):
    i, o = draw(sizes), draw(sizes)
    return Conv1D(o, i), (*draw(st.lists(sizes, max_size=2)), i)


def convolution(dims):
    def make(draw):
        groups = draw(st.integers(1, 3))
        i, o = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
        kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
        dilation = [draw(st.integers(1, 2)) for _ in range(dims)]
        mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
        same = draw(st.booleans())
        stride = [1 if same else draw(st.integers(1, 3)) for _ in range(dims)]
        padding = [draw(st.integers(0, 2)) for _ in range(dims)]
        shape = [
            max(d * (k - 1) + 1 - 2 * (0 if same else p) * (mode == "zeros"), 1 if mode == "zeros" else 5)
            + draw(st.integers(0, 3))
            for d, k, p in zip(dilation, kernel, padding, strict=True)
        ]
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
            i, o, kernel, stride, "same" if same else padding, dilation, groups, draw(st.booleans()), mode
        )  # fmt: skip
        return layer, (i, *shape)

    return make


def transposed_convolution(dims):
    def make(draw):
        groups = draw(st.integers(1, 3))
        i, o = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
        kernel = [draw(st.integers(2, 3)) for _ in range(dims)]
        stride = [draw(st.integers(1, 3)) for _ in range(dims)]
        padding = [draw(st.integers(0, 1)) for _ in range(dims)]
        extra = [draw(st.integers(0, s - 1)) for s in stride]
        layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1](
            i, o, kernel, stride, padding, extra, groups, draw(st.booleans()), draw(st.integers(1, 2))
            if max(extra) == 0 else 1,
        )  # fmt: skip
        return layer, (i, *(draw(st.integers(2, 4)) for _ in range(dims)))

    return make


def normalised(make_layer):
    """A layer over the channels of [N, C, *shape]."""

    def make(draw):
        channels = 2 * draw(st.integers(1, 3))
        layer, dims = make_layer(channels, draw)
        return layer, (channels, *(draw(st.integers(2, 4)) for _ in range(dims)))

    return make


def layernorm(of):
    def make(draw):
        shape = draw(st.lists(st.integers(2, 4), min_size=1, max_size=2))
        return of(shape), (*draw(st.lists(sizes, max_size=1)), *shape)

    return make


LAYERS: dict[str, Callable] = {
    "linear": linear,
    "transformers Conv1D": conv1d_of_transformers,
    "Conv1d": convolution(1),
    "Conv2d": convolution(2),
    "Conv3d": convolution(3),
    "ConvTranspose1d": transposed_convolution(1),
    "ConvTranspose2d": transposed_convolution(2),
    "ConvTranspose3d": transposed_convolution(3),
    "LayerNorm": layernorm(nn.LayerNorm),
    "RMSNorm": layernorm(nn.RMSNorm),
    "SqueezeBERT LayerNorm": normalised(lambda c, draw: (SqueezeBertLayerNorm(c), 1)),
    "GroupNorm": normalised(lambda c, draw: (nn.GroupNorm(2, c), draw(st.integers(1, 3)))),
    "InstanceNorm1d": normalised(lambda c, draw: (nn.InstanceNorm1d(c, affine=True), 1)),
    "InstanceNorm2d": normalised(
        lambda c, draw: (nn.InstanceNorm2d(c, affine=True, track_running_stats=draw(st.booleans())), 2)
    ),
    "InstanceNorm3d": normalised(lambda c, draw: (nn.InstanceNorm3d(c, affine=True), 3)),
    "BatchNorm1d": normalised(lambda c, draw: (nn.BatchNorm1d(c), draw(st.integers(0, 1)))),
    "BatchNorm2d": normalised(lambda c, draw: (nn.BatchNorm2d(c, affine=draw(st.booleans())), 2)),
    "BatchNorm3d": normalised(lambda c, draw: (nn.BatchNorm3d(c), 3)),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_rule(make, data):
    layer, shape = make(data.draw)
    N, K = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def random(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    layer = layer.double().eval()
    for name, tensor in layer.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(random(*tensor.shape).abs() + 0.1 if name == "running_var" else random(*tensor.shape))
    x = random(N, *shape)
    g = random(*layer(x).shape)
    agree(layer, x, g, [random, K])


def test_embedding_rule():
    layer = nn.Embedding(7, 3, padding_idx=2).double()
    x = torch.tensor([[1, 2, 1], [6, 0, 0]])
    random = lambda *size: torch.randn(size, dtype=torch.float64)  # noqa: E731
    agree(layer, x, random(2, 3, 3), [random, 2], forward=lambda index: layer.weight[index])
    with pytest.raises(TraceFLError, match="max_norm"):
        rule_for(layer)(nn.Embedding(7, 3, max_norm=1), x, random(2, 3, 3))


def agree(layer, x, g, draw, forward=None):
    """The rule's contractions equal those of autograd, input by input, with and without a base."""
    random, K = draw
    spelt_out = getattr(layer, "running_mean", None) is not None
    forward = forward or (lambda x: batchnorm(layer, x) if spelt_out else layer(x))
    tensors = {n: t for n, t in layer.state_dict(keep_vars=True).items() if t.is_floating_point()}
    gradients = rule_for(layer)(layer, x, g)
    assert set(tensors) <= set(gradients)
    for name, tensor in tensors.items():
        thetas, base = [random(*tensor.shape) for _ in range(K)], random(*tensor.shape)
        tensor.requires_grad_()
        by_autograd = torch.stack(
            [torch.autograd.grad((forward(x[n : n + 1]) * g[n : n + 1]).sum(), tensor)[0] for n in range(len(x))]
        )
        tensor.requires_grad_(False)
        for origin in (None, base):
            moved = torch.stack(thetas) - (0 if origin is None else origin)
            slow = by_autograd.flatten(1) @ moved.flatten(1).T
            fast = contract(gradients[name], thetas, origin, {})
            size = by_autograd.flatten(1).abs() @ moved.flatten(1).abs().T
            assert ((fast - slow).abs() <= 1e-9 * size).all(), name
