"""Which rule covers which layer type: (layer, input, output gradient) -> one gradient per tensor name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from tracefl.provenance.contract import Gradient

Gradients = Mapping[str, Gradient]
Rule = Callable[[nn.Module, Tensor, Tensor], Gradients]
_RULES: dict[type | str, Rule] = {}
_COMPUTE = {"forward", "_conv_forward"}  # what a subclass or an instance may have put its own in place of


def register(*types: type | str) -> Callable[[Rule], Rule]:
    """Declare the rule of layer types, as classes or as "package.module.Class" (a name imports nothing).

    The rule, which runs without autograd, gets the layer in eval mode, its first argument x [N, ...] and
    dy/d(output) [N, ...], the first axis being the layer's batch, and returns {local tensor name: gradient over
    that axis}. A tensor left out contributes 0.
    """

    def add(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(types, rule))
        return rule

    return add


def rule_for(layer: nn.Module) -> Rule | None:
    """The rule of the nearest registered base class, if `layer` still computes what that class computes."""
    for base in type(layer).__mro__:
        rule = _RULES.get(base) or _RULES.get(f"{base.__module__}.{base.__qualname__}")
        if rule is not None:
            same = all(getattr(type(layer), name, None) is getattr(base, name, None) for name in _COMPUTE)
            return rule if same and not vars(layer).keys() & _COMPUTE else None
    return None
