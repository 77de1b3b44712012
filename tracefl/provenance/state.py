"""What is traced: which tensors of the model's state, under which names, and which layers have a rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tracefl.errors import TraceFLError
from tracefl.provenance.layers import Rule, rule_for

PAPER = frozenset({"Linear", "Conv2d", "LayerNorm", "Conv1D"})


@dataclass(frozen=True)
class TracedState:
    """The traced part of one model. A tied tensor has several names; its first stands for it."""

    tensors: dict[str, Tensor]  # first name -> tensor
    aliases: dict[str, list[str]]  # first name -> all names
    names: dict[nn.Module, str]  # of every module
    rules: dict[nn.Module, Rule]  # of the layers whose gradients come from a rule
    # Module -> its tensors, local name -> first name, that autograd must not see while it runs:
    # a rule gives their gradient, or the module was not chosen.
    hidden: dict[nn.Module, dict[str, str]]


def traced_state(model: nn.Module, layers: str | Sequence[str], statistics: bool) -> TracedState:
    """`statistics` adds the state's floating-point buffers (BatchNorm's running mean and variance)."""
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = _chosen(modules, layers)
    tensors: dict[str, Tensor] = {}
    names: dict[int, list[str]] = {}  # id(tensor) -> all names
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        if not isinstance(tensor, nn.Parameter) and not statistics:
            continue
        names.setdefault(id(tensor), []).append(name)
        if modules[name.rpartition(".")[0]] in chosen and id(tensor) not in first:
            first[id(tensor)] = name
            tensors[name] = tensor
    paths: dict[nn.Module, str] = {}
    rules: dict[nn.Module, Rule] = {}
    hidden: dict[nn.Module, dict[str, str]] = {}
    for path, module in modules.items():
        if paths.setdefault(module, path) != path:
            continue
        own = {**module._parameters, **module._buffers}
        held = {local: first[id(t)] for local, t in own.items() if id(t) in first}
        rule = rule_for(module)
        if held and (rule is not None or module not in chosen):
            hidden[module] = held
        if held and rule is not None and module in chosen:
            rules[module] = rule
    return TracedState(tensors, {name: names[id(t)] for name, t in tensors.items()}, paths, rules, hidden)


def _chosen(modules: Mapping[str, nn.Module], layers: str | Sequence[str]) -> set[nn.Module]:
    if layers == "all":
        return set(modules.values())
    if layers == "paper":
        return {m for m in modules.values() if PAPER & {base.__name__ for base in type(m).__mro__}}
    wanted = [layers] if isinstance(layers, str) else list(layers)
    unknown = [name for name in wanted if name not in modules]
    if unknown or not wanted:
        raise TraceFLError(
            f'layers must be "all", "paper" or names of modules such as {list(modules)[1:4]}, got {layers!r}: '
            f"the model has no {unknown[0] if unknown else 'module without a name'!r}"
        )
    return {m for name in wanted for m in modules[name].modules()}
