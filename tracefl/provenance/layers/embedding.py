"""Embeddings: z_s = W[token_s], so dy/dW has g_s on row token_s.

The padding row counts like any other: the output depends on it, although training leaves it alone.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
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


def whole_gradient(node: Any) -> Callable[[Any, Any], Any]:
    """A hook on autograd's node of an embedding or a bag that has no rule: the gradient as it is.

    Training leaves the row `padding_idx` out and divides by the tokens' frequencies
    (`scale_grad_by_freq`); the output depends on every row all the same.
    """

    def hook(gradients: tuple[Tensor | None, ...], arrived: tuple[Tensor, ...]) -> tuple[Tensor | None, ...] | None:
        if gradients[0] is None:
            return None
        tokens, rows = node._saved_indices.flatten(), node._saved_weight_sym_argsize_0
        if node.name() == "EmbeddingBackward0":
            g = arrived[0].reshape(len(tokens), -1)
            found = torch.sparse_coo_tensor(tokens[None], g, (rows, g.shape[1]), check_invariants=False)
            return (found if node._saved_sparse else found.to_dense()), *gradients[1:]
        if node._saved_scale_grad_by_freq:  # a bag; it reads no padding
            return gradients[0] * tokens.bincount(minlength=rows)[:, None], *gradients[1:]
        return None

    return hook
