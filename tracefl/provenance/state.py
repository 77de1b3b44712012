"""What is traced: which tensors of the state, under which names, and which layers have a rule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tracefl.errors import require
from tracefl.provenance.layers import LayerRule, rule_for

PAPER = frozenset({"Linear", "Conv2d", "LayerNorm", "Conv1D"})


@dataclass(frozen=True)
class TracedState:
    """The traced part of one model. A tied tensor has several names; its first stands for it."""

    tensors: dict[str, Tensor]  # first name -> tensor
    aliases: dict[str, list[str]]  # first name -> all names
    names: dict[nn.Module, str]  # of every module
    rules: dict[nn.Module, LayerRule]  # of the layers whose gradients a rule gives
    # Module -> its traced tensors, local name -> first name, that autograd must not see while it
    # runs: a rule gives their gradient, or the module was not chosen.
    hidden: dict[nn.Module, dict[str, str]]


def traced_state(model: nn.Module, layers: str | Sequence[str], statistics: bool) -> TracedState:
    """`statistics` adds the floating-point buffers (BatchNorm's running mean and variance)."""
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen, names, first = _chosen(modules, layers), dict[int, list[str]](), dict[int, str]()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor if statistics else nn.Parameter) and tensor.is_floating_point():
            names.setdefault(id(tensor), []).append(name)
            if modules[name.rpartition(".")[0]] in chosen and id(tensor) not in first:
                first[id(tensor)], tensors[name] = name, tensor
    paths, rules, hidden = {m: name for name, m in reversed(modules.items())}, dict[nn.Module, LayerRule](), {}
    for module in paths:
        own = {**module._parameters, **module._buffers}
        held = {local: first[id(tensor)] for local, tensor in own.items() if id(tensor) in first}
        rule = rule_for(module) if held and module in chosen else None
        if rule:
            rules[module] = rule
        if held and (rule or module not in chosen):
            hidden[module] = held
    return TracedState(tensors, {name: names[id(t)] for name, t in tensors.items()}, paths, rules, hidden)


def _chosen(modules: Mapping[str, nn.Module], layers: str | Sequence[str]) -> set[nn.Module]:
    if layers == "all":
        return set(modules.values())
    if layers == "paper":
        return {m for m in modules.values() if PAPER & {base.__name__ for base in type(m).__mro__}}
    wanted = [layers] if isinstance(layers, str) else list(layers)
    expected = f'layers must be "all", "paper" or names of modules such as {list(modules)[1:4]}, got {layers!r}'
    require(wanted, expected)
    for name in wanted:
        require(name in modules, f"{expected}: the model has no {name!r}")
    return {m for name in wanted for m in modules[name].modules()}
