"""The method on one page: one input at a time, autograd's own gradients. `trace` gives the same, faster.

A layer is linear in its own parameters θ given its input, so client k's share in an output y through
it, with c_j = dy/dz_j and z_kj = w_kj · z_in + b_kj (equations 2 to 6), is

    "neuron"       Σ_j c_j z_kj = <θ_k, dy/dθ>,         y the logit of the predicted class
    "influence"    p_k <W_k - W_g, dy/dW>,              y its log-odds, W the whole state

and one gradient of the global model W_g answers for all clients.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tracefl.classifier import Batch, batch_size, exact, explained, logits_of, take
from tracefl.states import State


def plain(
    model: nn.Module, clients: Mapping[str, State], inputs: Batch, weights: Mapping[str, float] | None = None
) -> Tensor:
    """Contributions [N, K] by "influence" if there are weights w_k (p_k = w_k / Σ w), else by "neuron" without decay."""
    kinds = Tensor if weights else nn.Parameter
    W = {
        name: w
        for name, w in model.state_dict(keep_vars=True).items()
        if isinstance(w, kinds) and w.is_floating_point()
    }
    shares = []
    norms = [module for module in model.modules() if weights and isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with exact(model, lambda: [norm.register_forward_hook(batchnorm) for norm in norms]):
        for w in W.values():
            w.requires_grad_(True)
        for n in range(batch_size(inputs)):
            logits = logits_of(model, take(inputs, slice(n, n + 1)))
            y, _ = explained(logits, None, "log_odds" if weights else "logit")
            G = torch.autograd.grad(y.sum(), list(W.values()), allow_unused=True)
            for who, state in clients.items():
                p_k, base = (weights[who] / sum(weights.values()), 1) if weights else (1, 0)
                used = [
                    (state[name] - base * w.detach(), g)
                    for (name, w), g in zip(W.items(), G, strict=True)
                    if g is not None
                ]
                shares.append(p_k * sum((delta.double() * g.double()).sum() for delta, g in used))
    return torch.stack(shares).view(-1, len(clients))


def batchnorm(norm: nn.Module, args: tuple[Tensor], z: Tensor) -> Tensor:
    """BatchNorm in eval mode as it is written, so that autograd sees its running statistics too."""
    shape = (1, -1, *[1] * (args[0].ndim - 2))
    mean, var, weight, bias = (t.view(shape) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    return (args[0] - mean) / (var + norm.eps).sqrt() * weight + bias
