"""Slow references, written straight from the definitions; each is what a fast path is tested against."""

from __future__ import annotations

import copy
from types import MethodType

import torch
from torch import nn
from torch.func import functional_call


def explained(model, x, target, output="logit"):
    """y of one input; x is a batch of one."""
    out = model(**x) if isinstance(x, dict) else model(x)
    logits = getattr(out, "logits", out)[0]
    if output == "logit":
        return logits[target]
    return logits[target] - torch.cat([logits[:target], logits[target + 1 :]]).logsumexp(0)


def neuron(model, states, x, target):
    """Σ_j c_j z_kj of every call of modules with parameters, [L, K]: clients' layers at the global input."""
    model, calls = copy.deepcopy(model).eval(), []

    def record(module, args, out):
        z = out.clone()
        z.retain_grad()
        calls.append((module, args[0].detach().clone(), z))
        return z.clone()  # whatever the model does to its output in place, z stays

    names = {m: name for name, m in model.named_modules() if list(m.parameters(recurse=False))}
    handles = [module.register_forward_hook(record) for module in names]
    explained(model, x, target).backward()
    for handle in handles:
        handle.remove()
    shares = [
        [(of_client(module, names[module], state)(z_in) * z.grad).sum().item() for state in states.values()]
        for module, z_in, z in calls
    ]
    return torch.tensor(shares, dtype=torch.float64)


def of_client(module, name, state):
    client = copy.deepcopy(module)
    for own, parameter in client.named_parameters(recurse=False):
        parameter.data.copy_(state[f"{name}.{own}" if name else own])
    return client


def gradients(model, x, target, output, names):
    """dy/dW by autograd for the named entries of the state, running statistics included."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = MethodType(batchnorm, module)
    W = {name: model.state_dict()[name].detach().clone().requires_grad_() for name in names}

    class Explained(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return explained(self.model, x, target, output)

    y = functional_call(Explained(), {f"model.{name}": w for name, w in W.items()}, (x,), tie_weights=False)
    grads = torch.autograd.grad(y, list(W.values()), allow_unused=True)
    return {name: torch.zeros_like(W[name]) if g is None else g for name, g in zip(W, grads, strict=True)}


def batchnorm(self, x):
    """Eval-mode BatchNorm spelt out, so that autograd sees its statistics."""
    shape = (1, -1) + (1,) * (x.ndim - 2)
    z = (x - self.running_mean.view(shape)) / (self.running_var.view(shape) + self.eps).sqrt()
    return z * self.weight.view(shape) + self.bias.view(shape) if self.affine else z


def influence(model, states, weights, x, target, output="log_odds"):
    """p_k <W_k - W_g, dy/dW> over every floating-point entry of the state, [K]."""
    W = {name: w for name, w in model.state_dict().items() if w.is_floating_point()}
    G = gradients(model, x, target, output, list(W))
    p = torch.tensor([float(weights[who]) for who in states], dtype=torch.float64)
    shares = [sum(((s[n].double() - W[n].double()) * G[n].double()).sum() for n in W) for s in states.values()]
    return torch.stack(shares) * p / p.sum()


def perturbed(model, K=3, scale=0.05):
    """K client states around the model's, and integer weights for them. No tensor is the same in two of them, also not
    one that starts at zero, as biases do.
    """
    states = {f"c{k}": {name: noisy(w, scale) for name, w in model.state_dict().items()} for k in range(K)}
    return states, {who: 1 + k for k, who in enumerate(states)}


def noisy(w, scale):
    if not w.is_floating_point():
        return w
    size = w.abs().mean().item() or 1.0
    return w + scale * size * torch.randn_like(w)


def fused(states, weights):
    """FedAvg: Σ p_k W_k."""
    p = {who: weights[who] / sum(weights.values()) for who in states}
    first = next(iter(states.values()))
    floats = [name for name, w in first.items() if w.is_floating_point()]
    return {**first, **{name: sum(p[who] * states[who][name] for who in states) for name in floats}}


def row(x, n):
    """Input n as a batch of one."""
    return {name: v[n : n + 1] for name, v in x.items()} if isinstance(x, dict) else x[n : n + 1]
