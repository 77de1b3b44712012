"""One forward and one backward pass: every traced call's input x and output gradient dy/dz.

Each input's y is independent of the others in eval mode: the gradient of sum_n y_n holds every input's own.
Calls are paired with their gradients through the autograd graph, never by the order in which hooks fire.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from tracefl.errors import TraceFLError
from tracefl.provenance.state import TracedState

Batch = Mapping[str, Any] | Tensor
# (logits [N, classes], targets [N]) -> (y [N], targets [N])
Explain = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
_CACHED = (
    "the model uses a tensor again that an earlier forward pass computed from its parameters, where no gradient "
    "arrives any more; make it compute that tensor in every pass"
)

_ONE_AT_A_TIME = threading.RLock()  # flags of tensors and settings of torch are everybody's


@dataclass(frozen=True)
class Sum:
    """Where the output of a call is added to something, and nowhere else does it go: out = ... + factor * z."""

    edge: GradientEdge
    factor: float
    shape: torch.Size


@dataclass
class Call:
    """The `index`-th time that `module` ran; `order` counts events of the forward pass."""

    module: nn.Module
    index: int
    order: int
    x: Tensor
    edge: GradientEdge
    shape: torch.Size
    version: int
    sum: Sum | None = None


@dataclass
class Pass:
    """A forward pass over a batch, and what its backward pass needs."""

    calls: list[Call] = field(default_factory=list)
    counts: Counter[nn.Module] = field(default_factory=Counter)  # calls of each module so far
    clock: Iterator[int] = field(default_factory=itertools.count)
    started: dict[nn.Module, int] = field(default_factory=dict)  # module -> order of its first start
    y: Tensor = field(init=False)
    targets: Tensor = field(init=False)
    leaves: dict[int, Tensor] = field(init=False)  # id(tensor) -> tensor that y depends on, with a gradient
    loose: list[str] = field(init=False)  # traced ones of them: used outside of rules
    norms: list[Any] = field(init=False)  # PyTorch's nodes of batch and instance normalisation

    @property
    def disturbed(self) -> bool:
        """The model has overwritten some layer's input in place after the layer ran."""
        return any(call.x._version != call.version for call in self.calls)


def forward(
    model: nn.Module, hooks: Hooks, batch: Batch, targets: Tensor | None, explain: Explain,
    *, keep_inputs: bool = False,
) -> Pass:  # fmt: skip
    """Run a batch, recording every call of a layer with a rule; `keep_inputs` copies what goes into them."""
    done, state = Pass(), hooks.state
    hooks.done, hooks.keep_inputs = done, keep_inputs
    for tensor in state.tensors.values():  # a pass that failed may have left them otherwise
        tensor.requires_grad_(True)
    try:
        logits = logits_of(model, batch)
    finally:
        hooks.done = None
    done.y, done.targets = explain(logits, targets)
    done.leaves, consumers, done.norms = _graph(done.y)
    for call in done.calls:
        call.sum = _only_sum(consumers.get((call.edge.node, call.edge.output_nr), []))
    done.loose = [name for name, tensor in state.tensors.items() if id(tensor) in done.leaves]
    return done


def backward(
    done: Pass, state: TracedState, arrive: Callable[[int, Tensor], None], shared: set[int]
) -> dict[str, Tensor]:
    """Differentiate sum_n y_n, handing call i's dy/dz to `arrive(i, g)` when it is known and keeping none of them.

    Of the calls in `shared` dy/d(sum) is handed over. Returns dy/dθ of the loose tensors; `done` is used up.
    """
    handles = []
    for i, call in enumerate(done.calls):
        edge = call.sum.edge if i in shared and call.sum else call.edge

        def reach(grads: Sequence[Tensor | None], i: int = i, output: int = edge.output_nr) -> None:
            g = grads[output]
            if g is not None:
                arrive(i, g)

        handles.append(edge.node.register_prehook(reach))
    handles += [node.register_prehook(_laid_out_like_input(node)) for node in done.norms]
    y, done.y = done.y, done.y.detach()
    leaves = list(done.leaves.values())  # all, so that the gradient passes everywhere
    try:
        grads = torch.autograd.grad(y.sum(), leaves, allow_unused=True) if leaves else ()
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            raise TraceFLError(_CACHED) from error
        raise
    finally:
        for handle in handles:
            handle.remove()
    gradients = dict(zip(done.leaves, grads, strict=True))  # None where a function of the model's own returns None
    loose = {name: gradients[id(state.tensors[name])] for name in done.loose}
    return {name: g for name, g in loose.items() if g is not None}


def measured(model: nn.Module, work: Callable[[], Pass]) -> tuple[Pass, int]:
    """`work()`, a forward pass, and the bytes that its backward pass would need, the model's own apart.

    They are let go: the pass cannot be differentiated any more.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage

    def gone(nothing: None) -> Tensor:
        raise TraceFLError(_CACHED)

    with torch.autograd.graph.saved_tensors_hooks(keep, gone):
        done = work()
    for call in done.calls:
        keep(call.x)
    return done, sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)


class Hooks:
    """Hooks that write every call of a layer with a rule into `done`, the pass that runs.

    Inside a layer with a rule its own tensors are constants: whatever traced tensor turns up in the graph of y all the
    same is used outside of rules. What gradient checkpointing runs again has to find it so too.
    """

    def __init__(self, state: TracedState):
        self.state = state
        self.done: Pass | None = None
        self.keep_inputs = False

    def register(self) -> list[RemovableHandle]:
        handles = [module.register_forward_pre_hook(self._start) for module in self.state.names]
        handles += [
            module.register_forward_hook(self._end, prepend=True, with_kwargs=True) for module in self.state.constants
        ]  # before hooks of the user's, which may change the output
        return handles

    def _start(self, module: nn.Module, args: Any) -> None:
        if self.done:
            self.done.started.setdefault(module, next(self.done.clock))
        for tensor in self.state.constants.get(module, ()):
            tensor.requires_grad_(False)

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        for tensor in self.state.constants[module]:
            tensor.requires_grad_(True)
        if module not in self.state.rules or not torch.is_grad_enabled():  # under no_grad nothing of it reaches y
            return None
        replaced = None
        if not out.requires_grad:  # nothing traced before it: the gradient needs a place to arrive
            out = replaced = out.detach().requires_grad_().clone()
        if self.done:
            done, x = self.done, (args[0] if args else next(iter(kwargs.values()))).detach()
            x = x.clone() if self.keep_inputs else x
            edge, version, index = get_gradient_edge(out), x._version, done.counts[module]
            done.counts[module] += 1
            done.calls.append(Call(module, index, next(done.clock), x, edge, out.shape, version))
        return replaced


@contextmanager
def tracing(model: nn.Module, state: TracedState) -> Iterator[Hooks]:
    """Eval mode, full precision, gradients for traced tensors alone, nothing fused or compiled that skips hooks;
    restored on exit. Threads wait for one another: much of this is not the model's own.
    """
    with _ONE_AT_A_TIME:
        yield from _tracing(model, state)


def _tracing(model: nn.Module, state: TracedState) -> Iterator[Hooks]:
    training = [module for module in model.modules() if module.training]
    tensors = {id(t): t for t in [*model.parameters(), *state.tensors.values()] if t.is_floating_point()}
    flags = [(t, t.requires_grad) for t in tensors.values()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    device = next(iter(state.tensors.values())).device.type
    hooks = Hooks(state)
    handles: list[RemovableHandle] = []
    # without torch's compiler nothing is compiled; to load it takes seconds
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    try:
        if training:
            model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        for tensor, _ in flags:
            tensor.requires_grad_(False)
        handles = hooks.register()
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False), eager:
            yield hooks
    finally:
        for handle in handles:
            handle.remove()
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for tensor, flag in flags:
            tensor.requires_grad_(flag)
        for module in training:
            module.training = True


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise TraceFLError(
            f"the model's output is {found}, not logits [N, classes]: pass a classifier that returns them "
            "or an object with .logits"
        )
    return logits


def _laid_out_like_input(node: Any) -> Callable[[Sequence[Tensor | None]], tuple[Tensor | None, ...]]:
    """On the CPU, PyTorch 2.15 differentiates batch normalisation wrongly, and says nothing, where one of input and
    gradient lies channels last and the other does not but has an axis of length 1.
    """

    def hook(grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        g, x = grads[0], node._saved_input
        if g is not None and g.stride() != x.stride():
            g = torch.empty_like(x).copy_(g)
        return g, *grads[1:]

    return hook


Consumers = dict[tuple[Any, int], list[tuple[Any, int]]]


def _graph(y: Tensor) -> tuple[dict[int, Tensor], Consumers, list[Any]]:
    """The leaf tensors y depends on by id, who takes each node's output as which argument, and normalisations."""
    leaves: dict[int, Tensor] = {}
    consumers: Consumers = {}
    norms = []
    seen, stack = set(), [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves[id(variable)] = variable
        if node.name().startswith("CheckpointFunction"):
            raise TraceFLError(
                "the model computes parts of itself again by checkpoint(..., use_reentrant=True), which "
                "gives gradients to nobody but .backward(); set use_reentrant=False"
            )
        if node.name() == "NativeBatchNormBackward0":
            norms.append(node)
        for position, (following, output) in enumerate(node.next_functions):
            consumers.setdefault((following, output), []).append((node, position))
            stack.append(following)
    return leaves, consumers, norms


def _only_sum(consumers: list[tuple[Any, int]]) -> Sum | None:
    if len(consumers) != 1 or consumers[0][0].name() != "AddBackward0":
        return None
    node, position = consumers[0]
    return Sum(GradientEdge(node, 0), node._saved_alpha if position else 1, node._input_metadata[0].shape)
