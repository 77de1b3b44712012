"""One pass: a batch goes forward, its gradient comes back, and rules turn it into G_n, layer by layer.

    forward     a hook at every layer with a rule notes the call: its input x, the shape of its output z
    backward    autograd hands dy/dz to the call, and the layer's rule makes G = dy/dθ of x and dy/dz

Inputs do not see each other in eval mode, so the gradient of Σ_n y_n holds every dy_n. Of tensors
that no rule covers ("loose" ones) autograd gives dy/dθ itself, but for one input at a time.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tracefl.errors import TraceFLError
from tracefl.outputs import logits_of
from tracefl.provenance.contract import Dense, Gradient
from tracefl.provenance.state import TracedState

Batch = Mapping[str, Any] | Tensor
# (logits [N, classes], targets [N] or None) -> (y [N], targets [N])
Explain = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
Receive = Callable[[str, dict[str, Gradient]], None]  # (layer, tensor -> gradient)

_LOCK = threading.RLock()  # flags of tensors and settings of torch are everybody's
_KEPT = (
    "the model uses a tensor again that an earlier forward pass computed from its parameters, where no gradient "
    "arrives any more; make it compute that tensor in every pass"
)


@dataclass
class Call:
    """One call of a layer with a rule."""

    module: nn.Module
    x: Tensor  # input
    shape: torch.Size  # of the output z
    version: int  # of x, which changes when the model overwrites x
    axes: tuple[int, int] = (0, 0)  # along which the inputs of the batch lie in x and z


@dataclass
class Pass:
    """A forward pass of n inputs, ready to be differentiated."""

    n: int
    calls: dict[str, Call]  # layer -> call; a module's second call is the layer "name#2"
    layers: list[str]  # in execution order
    logits: Tensor  # [n, classes]
    y: Tensor  # [n]
    targets: Tensor  # [n]
    leaves: list[Tensor]  # all tensors with a gradient that y depends on
    norms: list[Any]  # autograd's nodes of batch and instance normalisation
    loose: dict[str, str]  # tensor that is used where no rule gives its gradient -> its layer

    def tell_apart(self, alone: Pass, holds_first: bool) -> bool:
        """Find the axis along which the inputs lie in each call: the one that grew to n since `alone`.

        If this pass `holds_first`, every call must see the first input as it was `alone`, up to
        rounding, which in low precision may be a hundredth: neither changed by others nor moved.
        """
        pairs = [(self.logits[0], alone.logits[0])]
        if self.loose or list(self.calls) != list(alone.calls):
            return False
        for call, single in zip(self.calls.values(), alone.calls.values(), strict=True):
            axes = [_grown(*shapes, self.n) for shapes in ((call.x.shape, single.x.shape), (call.shape, single.shape))]
            if None in axes:
                return False
            call.axes = axes[0], axes[1]
            pairs.append((call.x.select(axes[0], 0), single.x.select(axes[0], 0)))
        return not holds_first or all(_alike(now, before) for now, before in pairs)


def _grown(now: torch.Size, before: torch.Size, n: int) -> int | None:
    """The only axis in which two shapes differ, 1 before and n now."""
    grown = [d for d, sizes in enumerate(zip(before, now, strict=False)) if sizes[0] != sizes[1]]
    single = len(now) == len(before) and len(grown) == 1 and (before[grown[0]], now[grown[0]]) == (1, n)
    return grown[0] if single else None


def _alike(now: Tensor, before: Tensor) -> bool:
    return not before.numel() or bool((now - before).abs().max() <= 0.01 * before.abs().max())


class Tracer:
    """Hooks on a model's modules that note every call of a layer with a rule.

    While such a layer runs, its own tensors want no gradient, since the rule gives it. A traced
    tensor that autograd meets all the same is used elsewhere too. What gradient checkpointing runs
    again in the backward pass has to find things as they were, but is not noted again.
    """

    def __init__(self, model: nn.Module, state: TracedState):
        self.model, self.state = model, state
        self.n = 1  # inputs of the pass
        self.noting = False
        self.copy_inputs = False  # where the model overwrites them after the layer ran
        self.calls: dict[str, Call] = {}
        self.started: dict[str, int] = {}  # module or layer -> when it first started
        self.receive: Receive = lambda layer, gradients: None

    def hooks(self) -> list[Any]:
        """Set them; the handles to remove them."""
        state, before = self.state, nn.Module.register_forward_pre_hook
        # `prepend`: before hooks of the user's, which may change the output
        after = partial(nn.Module.register_forward_hook, hook=self._end, prepend=True, with_kwargs=True)
        return [before(module, self._start) for module in state.names] + [after(module) for module in state.hidden]

    def _start(self, module: nn.Module, args: Any) -> None:
        if self.noting:
            self.started.setdefault(self.state.names[module], len(self.started))
        for name in self.state.hidden.get(module, {}).values():
            self.state.tensors[name].requires_grad_(False)

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], z: Tensor) -> Tensor | None:
        for name in self.state.hidden[module].values():
            self.state.tensors[name].requires_grad_(True)
        if module not in self.state.rules or not torch.is_grad_enabled():  # under no_grad nothing of it reaches y
            return None
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        if self.n > 1 and x.ndim and z.ndim > 1 and len(z) == len(x) == 1:
            # all inputs share it, as position embeddings: each gets a z, and so a gradient, of its own
            x, z = x.expand(self.n, *x.shape[1:]), z.repeat(self.n, *[1] * (z.ndim - 1))
        if not z.requires_grad:  # nothing traced before it: the gradient needs a place to arrive
            z = z.detach().requires_grad_().clone()
        elif z._is_view():  # its history would be rewritten if it were changed in place
            z = z.clone()
        if self.noting:
            name = layer = self.state.names[module]
            while layer in self.calls:
                layer = f"{name}#{int(layer.rpartition('#')[2]) + 1 if layer != name else 2}"
            self.started.setdefault(layer, len(self.started))
            self.calls[layer] = Call(module, x.clone() if self.copy_inputs else x, z.shape, x._version)
            z.register_hook(partial(self._arrive, layer, self.calls[layer]))
        return z

    @torch.no_grad()
    def _arrive(self, layer: str, call: Call, g: Tensor) -> None:
        """dy/dz of a call is here: the layer's rule makes dy/dθ of it and the input."""
        own = self.state.hidden[call.module]
        x = call.x.movedim(call.axes[0], 0) if call.x.ndim else call.x
        del call.x  # it is needed no more
        dtype = self.state.tensors[next(iter(own.values()))].dtype  # the model may use autocast
        x, g = x.to(dtype) if x.is_floating_point() else x, g.movedim(call.axes[1], 0).to(dtype)
        found = self.state.rules[call.module](call.module, x, g)
        self.receive(layer, {own[name]: G for name, G in found.items() if name in own})

    def forward(self, batch: Batch, targets: Tensor | None, explain: Explain) -> Pass:
        """Run a batch, to be explained as `targets` [n], or as predicted."""
        self.n, self.noting, self.calls, self.started = batch_size(batch), True, {}, {}
        for tensor in self.state.tensors.values():  # a pass that failed may have left them otherwise
            tensor.requires_grad_(True)
        try:
            logits = logits_of(self.model, batch)
        finally:
            self.noting = False
        y, targets = explain(logits, targets)
        leaves, norms = _graph(y)
        loose = {}
        for name, tensor in self.state.tensors.items():
            if id(tensor) in leaves:
                owner = name.rpartition(".")[0]
                loose[name] = name if owner in self.calls or not owner else owner
        layers = sorted({**self.calls, **dict.fromkeys(loose.values())}, key=self._place)
        return Pass(self.n, self.calls, layers, logits.detach(), y, targets, list(leaves.values()), norms, loose)

    def _place(self, layer: str) -> int:
        """When the layer, or the nearest module around it, started."""
        while layer not in self.started:
            layer = layer.rpartition(".")[0]
        return self.started[layer]

    def backward(self, done: Pass, receive: Receive) -> None:
        """Differentiate Σ_n y_n; `receive` gets every layer's gradients as they come, and none is kept."""
        self.receive = receive
        handles = [node.register_prehook(_laid_out_like_input(node)) for node in done.norms]
        try:  # asking for all leaves, the gradient passes everywhere
            found = torch.autograd.grad(done.y.sum(), done.leaves, allow_unused=True) if done.leaves else ()
        except RuntimeError as error:
            if "backward through the graph a second time" in str(error):
                raise TraceFLError(_KEPT) from error
            raise
        finally:
            for handle in handles:
                handle.remove()
        gradients = {id(leaf): g for leaf, g in zip(done.leaves, found, strict=True)}
        for name, layer in done.loose.items():
            g = gradients[id(self.state.tensors[name])]
            if g is not None:  # a function of the model's own may give none
                receive(layer, {name: Dense(g[None])})

    def measured(self, *arguments: Any) -> tuple[Pass, int]:
        """A forward pass that is not differentiated, and the bytes that its backward pass would need."""
        own = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> None:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

        def gone(nothing: None) -> Tensor:
            raise TraceFLError(_KEPT)

        with torch.autograd.graph.saved_tensors_hooks(keep, gone):
            done = self.forward(*arguments)
        for call in done.calls.values():
            keep(call.x)
        return done, sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)


@contextmanager
def exact(model: nn.Module, state: TracedState) -> Iterator[Tracer]:
    """Eval mode, full precision, nothing fused or compiled that skips hooks; all as it was on exit.

    Threads wait for one another: flags of tensors and settings of torch are everybody's.
    """
    with _LOCK, ExitStack() as undo:
        for module in [module for module in model.modules() if module.training]:
            undo.callback(setattr, module, "training", True)
            module.training = False
        for tensor in {id(t): t for t in [*model.parameters(), *state.tensors.values()]}.values():
            if tensor.is_floating_point():
                undo.callback(tensor.requires_grad_, tensor.requires_grad)
                tensor.requires_grad_(False)
        undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and to load it takes seconds
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        tracer = Tracer(model, state)
        for handle in tracer.hooks():
            undo.callback(handle.remove)
        device = next(iter(state.tensors.values())).device.type
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            yield tracer


def _graph(y: Tensor) -> tuple[dict[int, Tensor], list[Any]]:
    """The leaves that y depends on, by id, and autograd's nodes of batch and instance normalisation."""
    leaves, norms = dict[int, Tensor](), list[Any]()
    seen, stack = {None}, [y.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves[id(leaf)] = leaf
        elif node.name().startswith("CheckpointFunction"):
            raise TraceFLError(
                "the model computes parts of itself again by checkpoint(..., use_reentrant=True), which "
                "gives gradients to nobody but .backward(); set use_reentrant=False"
            )
        elif node.name() == "NativeBatchNormBackward0":
            norms.append(node)
    return leaves, norms


def _laid_out_like_input(node: Any) -> Callable[[Sequence[Tensor | None]], tuple[Tensor | None, ...]]:
    """On the CPU, PyTorch 2.15 differentiates batch normalisation wrongly, and says nothing, where one
    of input and gradient lies channels last and the other does not but has an axis of length 1.
    """

    def hook(grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        g, x = grads[0], node._saved_input
        if g is not None and g.stride() != x.stride():
            g = torch.empty_like(x).copy_(g)
        return g, *grads[1:]

    return hook


def batch_size(inputs: Batch) -> int:
    """N, the length of every tensor."""
    if not isinstance(inputs, Mapping | Tensor):
        kind = type(inputs).__name__
        raise TraceFLError(f"inputs must be a Tensor [N, ...] or a dict of them by argument, got a {kind}")
    tensors = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    sizes = {len(t) if t.ndim else 0 for t in tensors if isinstance(t, Tensor)}
    if len(sizes) != 1 or sizes == {0}:
        raise TraceFLError(f"inputs must be tensors of one length of at least 1, got {sorted(sizes)}")
    return sizes.pop()


def take(inputs: Batch, some: slice) -> Batch:
    """Some of the inputs."""
    if isinstance(inputs, Mapping):
        return {name: value[some] if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return inputs[some]


def uses_batch_statistics(model: nn.Module) -> bool:
    """A BatchNorm without running statistics lets the inputs of a batch see each other."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None for m in model.modules())
