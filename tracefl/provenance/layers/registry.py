"""Which rule covers which layer type: (layer, x, dy/dz) -> the gradient of each of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from tracefl.provenance.contract import Gradient

Gradients = Mapping[str, Gradient]
LayerRule = Callable[[nn.Module, Tensor, Tensor], Gradients]
_RULES: dict[type | str, LayerRule] = {}
# A subclass or an instance that has one of these of its own computes something else.
_COMPUTE = {"forward", "_conv_forward", "weight", "bias", "running_mean", "running_var"}  # the last as properties


def register(*types: type | str) -> Callable[[LayerRule], LayerRule]:
    """Declare the rule of layer types, which says what a layer's gradient dy/dθ is.

    A rule gets the layer in eval mode, its first argument x [N, ...] and dy/dz [N, ...] of its
    output z, and returns of each of its tensors, by its name in the layer, the gradient of every
    input: `Dense` (values [N, *θ.shape]), `Outer` (of a linear map, left [N, S, R] and right
    [N, S, C]) or `Rows` (of a table that is looked up, index [N, S] and values [N, S, C]). It runs
    without autograd. A tensor that it leaves out contributes 0.

    Args:
        types: layer classes, or "package.module.Class", which imports nothing.

    Returns:
        A decorator that leaves the rule as it is. Subclasses use the rule unless they have a
        forward of their own; a rule of their own replaces it.

    Example:
        >>> import torch
        >>> from tracefl.provenance import Dense, register
        >>> class Scaled(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.by = torch.nn.Parameter(torch.ones(3))
        ...     def forward(self, x):
        ...         return x * self.by
        >>> @register(Scaled)
        ... def scaled(layer, x, g):
        ...     return {"by": Dense(x * g)}
    """

    def add(rule: LayerRule) -> LayerRule:
        _RULES.update(dict.fromkeys(types, rule))
        return rule

    return add


def rule_for(layer: nn.Module) -> LayerRule | None:
    """The rule of the nearest registered base class, if `layer` computes what that does."""
    for base in type(layer).__mro__:
        rule = _RULES.get(base) or _RULES.get(f"{base.__module__}.{base.__qualname__}")
        if rule is not None:
            same = all(getattr(type(layer), name, None) is getattr(base, name, None) for name in _COMPUTE)
            return rule if same and not vars(layer).keys() & _COMPUTE else None
    return None
