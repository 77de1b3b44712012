"""What is traced: which tensors of the state, under which names, and which layers have a rule."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tracefl.errors import require
from tracefl.provenance.layers import LayerRule, rule_for
from tracefl.states import is_continuous

_DEQUANTISE = "pass the model as it was before quantisation"
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


def traced_state(model: nn.Module, layers: str | Sequence[str], statistics: bool, sent: Collection[str]) -> TracedState:
    """What is traced of a model.

    Args:
        model: the global model.
        layers: "all", "paper" or names of modules.
        statistics: whether floating-point buffers (BatchNorm's running mean and variance) are.
        sent: the names that any client has: what none sends is as it was, and left out.

    Raises:
        TraceFLError: the model has no such module, or parts that no gradient passes.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    _check_differentiable(modules)
    chosen, names, first = _chosen(modules, layers), dict[int, list[str]](), dict[int, str]()
    tensors, entries = dict[str, Tensor](), model.state_dict(keep_vars=True)
    for name, tensor in entries.items():
        owner = name.rpartition(".")[0]
        known = owner in modules or not isinstance(tensor, Tensor)
        require(
            known, f"the model's state dict names {name!r}, but it has no module {owner!r}: leave names as they are"
        )
        if isinstance(tensor, Tensor if statistics else nn.Parameter) and is_continuous(tensor):
            names.setdefault(id(tensor), []).append(name)
            if modules[owner] in chosen and id(tensor) not in first:
                first[id(tensor)], tensors[name] = name, tensor
        whole = isinstance(tensor, nn.Parameter) and not is_continuous(tensor) and name in sent
        require(not whole, f"tensor {name!r} of the model holds whole numbers, which have no gradient: {_DEQUANTISE}")
    for name in [name for name, tensor in tensors.items() if not any(n in sent for n in names[id(tensor)])]:
        del first[id(tensors.pop(name))]
    paths, rules, hidden = {m: name for name, m in reversed(modules.items())}, dict[nn.Module, LayerRule](), {}
    for module in paths:
        own = {local: t for local, t in {**module._parameters, **module._buffers}.items() if t is not None}
        held = {local: first[id(tensor)] for local, tensor in own.items() if id(tensor) in first}
        rule = rule_for(module) if held and module in chosen else None
        # rules know real numbers, and outputs that nobody changes before they are noted
        if rule and not any(tensor.is_complex() for tensor in own.values()) and not _hooks_of_all_modules():
            rules[module] = rule
        if held and (module in rules or module not in chosen):
            hidden[module] = held
    aliases = {name: names[id(tensor)] for name, tensor in tensors.items()}
    return TracedState(tensors, aliases, paths, rules, hidden)


def check_used(model: nn.Module, layers: str | Sequence[str], found: Iterable[str]) -> None:
    """Raise TraceFLError if a layer was named that none of those `found` in a pass belongs to."""
    modules = dict(model.named_modules(remove_duplicate=False))
    paths = [layer.partition("#")[0] for layer in found]  # a module's, or a tensor's of one
    used = {modules.get(path, modules.get(path.rpartition(".")[0])) for path in paths}
    named = [] if layers in ("all", "paper") else [layers] if isinstance(layers, str) else layers
    idle = "no tensor that clients send and the output depends on in eval mode (and outside of no_grad)"
    for name in named:
        require(used & {*modules[name].modules()}, f"layers={layers!r}: {name!r} has {idle}; leave it out")
    require(used, f"layers={layers!r} have {idle}; choose other layers")


def _hooks_of_all_modules() -> bool:
    return bool(nn.modules.module._global_forward_hooks)


def _check_differentiable(modules: Mapping[str, nn.Module]) -> None:
    """Raise TraceFLError for modules whose layers cannot be seen or have no gradient."""
    for name, module in modules.items():
        what = f"module {name!r}" if name else "the model"
        scripted = isinstance(module, torch.jit.ScriptModule)
        require(not scripted, f"{what} is TorchScript, which hides its layers: pass the Python model it was made from")
        kind = type(module)
        quantised = kind.__module__.startswith("torch.") and "quantized" in kind.__module__.split(".")
        require(not quantised, f"{what} is a quantised {kind.__name__}, which has no gradient: {_DEQUANTISE}")


def names_of_adapters(model: nn.Module) -> dict[str, str]:
    """Names by which PEFT saves entries of a model, without that of the only adapter -> entry.

    "lora_A.weight" is "lora_A.default.weight", and "head.weight" is
    "head.modules_to_save.default.weight".
    """
    only, entries = set[str](), model.state_dict()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.ModuleDict | nn.ParameterDict) and len(module) == 1:
            only.add(f"{path}.{next(iter(module))}")
    found = dict[str, str]()
    for name in entries:
        parts = name.split(".")
        left_out = {i for i in range(len(parts)) if ".".join(parts[: i + 1]) in only}
        left_out |= {i for i, part in enumerate(parts) if part == "modules_to_save"}
        saved_as = ".".join(part for i, part in enumerate(parts) if i not in left_out)
        if left_out and saved_as not in entries:
            found[saved_as] = name
    return found


def _chosen(modules: Mapping[str, nn.Module], layers: str | Sequence[str]) -> set[nn.Module]:
    if layers == "all":
        return set(modules.values())
    if layers == "paper":
        return {m for m in modules.values() if PAPER & {base.__name__ for base in type(m).__mro__}}
    wanted = [layers] if isinstance(layers, str) else list(layers) if isinstance(layers, Sequence) else []
    expected = f'layers must be "all", "paper" or names of modules such as {list(modules)[1:4]}, got {layers!r}'
    require(wanted, expected)
    for name in wanted:
        require(name in modules, f"{expected}: the model has no {name!r}")
    return {m for name in wanted for m in modules[name].modules()}
