"""Linear maps of the last axis: z = W x + b, so dy/dW = Σ_s g_s x_sᵀ and dy/db = Σ_s g_s."""

from __future__ import annotations

from torch import Tensor, nn

from tracefl.provenance.contract import Dense, Outer
from tracefl.provenance.layers.registry import Gradients, register


def positions(x: Tensor) -> Tensor:
    """[N, ..., D] as [N, S, D]; a lone vector [D] is one input."""
    return x.reshape(len(x) if x.ndim > 1 else 1, -1, x.shape[-1])


@register(nn.Linear)
def linear(layer: nn.Module, x: Tensor, g: Tensor) -> Gradients:
    x, g = positions(x), positions(g)
    return {"weight": Outer(g, x)} | ({} if layer.bias is None else {"bias": Dense(g.sum(1))})


@register("transformers.pytorch_utils.Conv1D")
def conv1d_of_transformers(layer: nn.Module, x: Tensor, g: Tensor) -> Gradients:
    """Hugging Face's Conv1D is a Linear with its weight transposed: [in, out]."""
    x, g = positions(x), positions(g)
    return {"weight": Outer(x, g), "bias": Dense(g.sum(1))}
