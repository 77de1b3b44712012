"""The method on one page: an input at a time, autograd's gradients. `trace` gives the same, faster.

A layer is linear in its own parameters θ given its input, so client k's share in an output y
through it, with c_j = dy/dz_j and z_kj = w_kj · z_in + b_kj (equations 2 to 6), is

    "neuron"       Σ_j c_j z_kj = <θ_k, dy/dθ>,         y the logit of the predicted class
    "influence"    p_k <W_k - W_g, dy/dW>,              y its log-odds, W the whole state

and one gradient of the global model W_g answers for all clients.
"""

import copy
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from tracefl.classifier import Batch, batch_size, explained, output_of, take
from tracefl.states import State


def plain(
    model: nn.Module, clients: Mapping[str, State], inputs: Batch, weights: Mapping[str, float] | None = None
) -> Tensor:
    """Contributions [N, K]: "influence" if there are weights, else "neuron" without layer decay.

    Args:
        model: the global model, an image or text classifier.
        clients: client id -> state dict.
        inputs: Tensor [N, ...], or the model's keyword arguments.
        weights: client id -> w_k; p_k = w_k / Σ w.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> model.weight.data = torch.tensor([[1.0, 1.0]])
        >>> clients = {"ann": {"weight": torch.tensor([[3.0, -1.0]])}}
        >>> plain(model, clients, torch.tensor([[1.0, 2.0]])).item()
        1.0
    """
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            module.forward = MethodType(batchnorm, module)  # type: ignore[method-assign]
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # whose row autograd would leave out
    W = dict([*model.named_parameters(), *(model.named_buffers() if weights else ())])
    W = {name: W[name].requires_grad_(True) for name in model.state_dict() if name in W and W[name].is_floating_point()}
    T = torch.zeros(batch_size(inputs), len(clients), dtype=torch.float64)
    for n in range(len(T)):
        logits = output_of(model, take(inputs, slice(n, n + 1)))
        y, _ = explained(logits, None, "log_odds" if weights else "logit")
        G = torch.autograd.grad(y.sum(), list(W.values()), allow_unused=True)
        for k, (who, theta) in enumerate(clients.items()):
            for (name, w), g in zip(W.items(), G, strict=True):
                delta = theta[name] - w.detach() if weights else theta[name]
                T[n, k] += 0 if g is None else (delta.double() * g.double()).sum()
            T[n, k] *= weights[who] / sum(weights.values()) if weights else 1
    return T


def batchnorm(norm: Any, x: Tensor) -> Tensor:
    """BatchNorm in eval mode written out, so that autograd sees its running statistics too."""
    shape = (-1, *[1] * (x.ndim - 2))
    xhat = (x - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
    return xhat * norm.weight.view(shape) + norm.bias.view(shape) if norm.affine else xhat
