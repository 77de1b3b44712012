"""Embedding: z_s = W[token_s], so dy/dW has g_s on row token_s.

The padding row counts like any other: the output depends on it, although training leaves it alone.
"""

from typing import cast

from torch import Tensor, nn

from tracefl.errors import TraceFLError
from tracefl.provenance.contract import Rows
from tracefl.provenance.layers.registry import Gradients, register


@register(nn.Embedding)
def embedding(layer: nn.Module, x: Tensor, g: Tensor) -> Gradients:
    if cast(nn.Embedding, layer).max_norm is not None:
        raise TraceFLError("an Embedding with max_norm is not linear in its weight; leave it out by layers=[...]")
    N = len(x) if x.ndim else 1
    return {"weight": Rows(x.reshape(N, -1), g.reshape(N, -1, g.shape[-1]))}
