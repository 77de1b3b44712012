"""What is traced: which tensors of the model's state, under which names, and which modules have a rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tracefl.errors import TraceFLError
from tracefl.provenance.layers import Rule, rule_for

PAPER = frozenset({"Linear", "Conv2d", "LayerNorm", "Conv1D"})


@dataclass(frozen=True)
class TracedState:
    """`tensors`: by first name. `aliases`: all names under which a tied tensor stands in a state dict."""

    tensors: dict[str, Tensor]
    first: dict[int, str]  # id(tensor) -> first name
    aliases: dict[str, list[str]]
    owners: dict[str, nn.Module]  # module that holds the tensor under its first name
    names: dict[nn.Module, str]
    rules: dict[nn.Module, Rule]
    constants: dict[nn.Module, list[Tensor]]  # tensors that take no gradient while their module runs

    def local(self, module: nn.Module) -> dict[str, str]:
        """Local name -> first name of the module's own traced tensors."""
        own = {**module._parameters, **module._buffers}
        return {name: self.first[id(t)] for name, t in own.items() if t is not None and id(t) in self.first}


def traced_state(model: nn.Module, layers: str | Sequence[str], statistics: bool) -> TracedState:
    """`statistics` adds the state's floating-point buffers (BatchNorm's running mean and variance)."""
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = _chosen(modules, layers)
    entries = model.state_dict(keep_vars=True)
    tensors: dict[str, Tensor] = {}
    names: dict[int, list[str]] = {}
    owners: dict[str, nn.Module] = {}
    first: dict[int, str] = {}
    for name, tensor in entries.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        if not isinstance(tensor, nn.Parameter) and not statistics:
            continue
        names.setdefault(id(tensor), []).append(name)
        owner = modules[name.rpartition(".")[0]]
        if owner in chosen and id(tensor) not in first:
            first[id(tensor)] = name
            tensors[name], owners[name] = tensor, owner
    aliases = {name: names[id(tensor)] for name, tensor in tensors.items()}
    rules: dict[nn.Module, Rule] = {}
    constants: dict[nn.Module, list[Tensor]] = {}
    paths: dict[nn.Module, str] = {}
    for path, module in modules.items():
        paths.setdefault(module, path)
    for module in paths:
        own = [*module._parameters.values(), *module._buffers.values()]
        held = [t for t in own if t is not None and id(t) in first]
        rule = rule_for(module)
        if not held or (rule is None and module in chosen):
            continue
        constants[module] = held
        if rule is not None and module in chosen:
            rules[module] = rule
    return TracedState(tensors, first, aliases, owners, paths, rules, constants)


def _chosen(modules: Mapping[str, nn.Module], layers: str | Sequence[str]) -> set[nn.Module]:
    if layers == "all":
        return set(modules.values())
    if layers == "paper":
        return {m for m in modules.values() if PAPER & {base.__name__ for base in type(m).__mro__}}
    wanted = [layers] if isinstance(layers, str) else list(layers)
    unknown = [name for name in wanted if name not in modules]
    if unknown or not wanted:
        raise TraceFLError(
            f"layers={layers!r}: {unknown or 'nothing'} is no module of the model; "
            f'choose "all", "paper" or names such as {list(modules)[1:4]}'
        )
    return {m for name in wanted for m in modules[name].modules()}
