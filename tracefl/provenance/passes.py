"""Passes: inputs go forward, the gradient comes back, and rules turn it into G_n, layer by layer.

    forward     a hook at every layer with a rule notes the call: its input x, its output's shape
    backward    autograd hands dy/dz to the call; the layer's rule makes G = dy/dθ of x and dy/dz

Inputs do not see each other in eval mode, so the gradient of Σ_n y_n holds every dy_n. Of tensors
that no rule covers ("loose" ones) autograd gives dy/dθ itself, but for one input at a time.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tracefl.classifier import (
    Batch,
    batch_size,
    explained,
    kept_bytes,
    output_of,
    register_hook,
    take,
    uses_batch_statistics,
)
from tracefl.errors import TraceFLError, require
from tracefl.provenance.clients import States
from tracefl.provenance.contract import Dense, Gradient, Shares
from tracefl.provenance.derivative import check_derivative, is_own, own_functions, random_step
from tracefl.provenance.layers.batchnorm import WithStatistics, laid_out_like_input
from tracefl.provenance.layers.embedding import whole_gradient
from tracefl.provenance.state import TracedState
from tracefl.states import as_real

PUT_RIGHT = ("NativeBatchNormBackward0", "EmbeddingBackward0", "EmbeddingBagBackward0")
_KEPT = "the model uses a tensor again that an earlier forward pass computed; make it compute that in every pass"


@dataclass
class Call:
    """One call of a layer with a rule."""

    module: nn.Module
    x: Tensor  # input
    version: int  # of x, which changes when the model overwrites x
    shape: torch.Size  # of the output z
    shared: bool  # all inputs shared z, until each was given a copy
    axes: tuple[int, int] = (0, 0)  # along which the inputs of the batch lie in x and z


@dataclass
class Pass:
    """A forward pass of n inputs, ready to be differentiated."""

    logits: Tensor  # [n, classes], or one logit [n, 1]
    y: Tensor  # [n]
    targets: Tensor  # [n]
    calls: dict[str, Call]  # layer -> call; a module's second call is the layer "name#2"
    loose: dict[str, str]  # tensor -> the layer for which it counts: its module, or itself if that has a rule
    leaves: dict[int, Tensor]  # id -> tensor with a gradient that y depends on
    nodes: list[Any]  # of autograd's, those whose gradient is put right or checked


class Tracer:
    """Hooks on a model's modules that note every call of a layer with a rule.

    While such a layer runs, its own tensors want no gradient, since the rule gives it. A traced
    tensor that autograd meets all the same is used elsewhere too: it is loose. What gradient
    checkpointing runs again in the backward pass finds things as they were, but is not noted again.
    """

    def __init__(self, model: nn.Module, state: TracedState, output: str):
        self.model, self.state, self.output = model, state, output
        self.noting, self.looking = False, False  # calls; without a backward pass
        self.copy_inputs, self.n = False, 1  # n: inputs of the pass
        self.seen: dict[str, list[Tensor]] = {}  # layer -> dy/dz of the first input, as passes hand it over
        self.calls: dict[str, Call] = {}
        by_rule = {name for module in state.rules for name in state.hidden.get(module, {}).values()}
        loose = {name for name in state.tensors if name not in by_rule}
        self.spelt = any(not isinstance(state.tensors[name], nn.Parameter) for name in loose)  # statistics
        self.started: dict[str, int] = {}  # module or layer -> when it first started

    def add_shares(
        self, inputs: Batch, targets: Tensor | None, shares: Shares, factor: float, most: int
    ) -> tuple[Tensor, Tensor]:
        """Add `factor` times the shares of all inputs, in as few passes as `most` bytes allow.

        Returns:
            y [N], float64, and the targets [N], the predicted classes unless others are given.
        """
        ys, classes, first = list[Tensor](), list[Tensor](), 0
        before = {layer: account.clone() for layer, account in shares.layers.items()}
        looked_at = {0, shares.N // 2, shares.N - 1}  # inputs for which functions of the model's own are checked

        def run(some: slice | list[int]) -> Pass:
            return self.forward(take(inputs, some), None if targets is None else targets[some])

        generators = _random_state()
        alone, nbytes = kept_bytes(self.model, lambda: run(slice(0, 1)), lambda p: [c.x for c in p.calls.values()])
        drawn = not torch.equal(generators, _random_state())
        self.copy_inputs = any(call.x._version != call.version for call in alone.calls.values())
        # one less than there is room for, since `alone` is kept too
        one_by_one = alone.loose or drawn or uses_batch_statistics(self.model)
        at_once = 1 if one_by_one else max(1, most // max(1, nbytes) - 1)
        while first < shares.N:
            last = min(shares.N, first + at_once)
            try:
                done = run(slice(first, last))
                apart = last - first == 1 or (
                    _tell_apart(done, alone, last - first, holds_first=first == 0)
                    and self._each_by_itself(done, lambda rows: run([first + row for row in rows]))  # noqa: B023
                )
            except Exception:  # a model may take one input where it takes no batch, and say so as it likes
                if last - first == 1:
                    raise
                apart = False
            if not apart:  # from the start, an input at a time
                shares.layers = {layer: account.clone() for layer, account in before.items()}
                ys, classes, first, at_once = [], [], 0, 1
                continue
            if last == 1:
                check_same(done.logits, alone.logits)
            for n in torch.nonzero(~torch.isfinite(done.y)).flatten().tolist():
                raise TraceFLError(f"the model's output for input {first + n} is not finite; check model and input")
            for row in looked_at & {*range(first, last)} if (own := own_functions(done.nodes)) else ():
                self._check_derivative(own, take(inputs, [row]), done.targets[[row - first]], shares)
            shares.open(sorted({**dict.fromkeys(done.loose.values()), **done.calls}, key=self._when))
            self.seen = {layer: [] for layer, call in done.calls.items() if call.shared and first == 0}
            if self.seen:  # is dy/dz of the first input what it is alone?
                self.backward(alone, lambda layer, gradients: None)
            self.backward(done, partial(shares.add, slice(first, last), factor))
            if not all(_alike(pair) for pair in self.seen.values()):  # no: others use its copy of z
                shares.layers, at_once = {layer: account.clone() for layer, account in before.items()}, 1
                continue
            ys.append(done.y.detach().double().cpu())
            classes.append(done.targets)
            first = last
        return torch.cat(ys), torch.cat(classes)

    def _each_by_itself(self, done: Pass, run: Callable[[list[int]], Pass]) -> bool:
        """Whether some inputs look the same to every layer in other company and order."""
        n = len(done.logits)
        rows = sorted({n - 1, 2 * n // 3, n // 3} - {0}, reverse=True)
        self.looking = True
        try:
            with torch.no_grad():
                again = run(rows)
        finally:
            self.looking = False
        pairs = [(again.logits, done.logits[rows])]
        for layer, call in done.calls.items():
            if layer not in again.calls:
                return False
            pairs.append((again.calls[layer].x, call.x[(slice(None),) * call.axes[0] + (rows,)]))
        return all(a.shape == b.shape and _alike((a, b)) for a, b in pairs)

    def _check_derivative(self, own: list[str], one: Batch, target: Tensor, shares: Shares) -> None:
        """Raise TraceFLError if functions of the model's own make the gradient another one."""
        steps, clients = random_step(self.state.tensors), shares.clients
        probe = Shares(States({"a step": steps}, clients.model, clients.aliases), None, 1, shares.read_at_once)
        done = self.forward(one, target)
        probe.open([*{**dict.fromkeys(done.loose.values()), **done.calls}])
        self.backward(done, partial(probe.add, slice(0, 1), 1.0))
        share = sum(account.item() for account in probe.layers.values())
        check_derivative(own, share, steps, self.state.tensors, lambda: self.forward(one, target).y)

    def set_hooks(self) -> list[RemovableHandle]:
        """Set the hooks, before hooks of the user's, which may change an output; their handles."""
        handles = [module.register_forward_pre_hook(self._start) for module in self.state.names]
        return handles + [m.register_forward_hook(self._end, prepend=True, with_kwargs=True) for m in self.state.hidden]

    def forward(self, batch: Batch, targets: Tensor | None) -> Pass:
        """Run a batch."""
        self.n, self.noting, self.calls, self.started = batch_size(batch), True, {}, {}
        for tensor in self.state.tensors.values():  # a pass that failed may have left them otherwise
            tensor.requires_grad_(True)
        versions = [tensor._version for tensor in self.state.tensors.values()]
        with WithStatistics() if self.spelt else nullcontext():
            logits = output_of(self.model, batch)
        self.noting = False
        y, targets = explained(logits, targets, self.output)
        self.calls = self.calls if y.requires_grad or self.looking else {}
        leaves, nodes = graph(y)
        for (name, tensor), version in zip(self.state.tensors.items(), versions, strict=True):
            same = tensor._version == version or id(tensor) not in leaves
            require(same, f"the model changes its own tensor {name!r} while it runs (by max_norm?): leave that out")
        owners = {name: name.rpartition(".")[0] for name, t in self.state.tensors.items() if id(t) in leaves}
        loose = {name: name if owner in self.calls else owner or name for name, owner in owners.items()}
        return Pass(logits.detach(), y, targets, self.calls, loose, leaves, nodes)

    def _by_rule(self, module: nn.Module) -> bool:
        """Whether a rule gives a call's gradient: the layer has its own tensors, none for them."""
        own = self.state.hidden.get(module, {})
        return module in self.state.rules and all(
            getattr(module, local, None) is self.state.tensors[name] for local, name in own.items()
        )

    def _want_gradient(self, module: nn.Module, wanted: bool) -> None:
        for name in self.state.hidden.get(module, {}).values():
            self.state.tensors[name].requires_grad_(wanted)

    def _start(self, module: nn.Module, args: Any) -> None:
        if module not in self.state.rules or self._by_rule(module):
            self._want_gradient(module, False)
        if self.noting:
            self.started.setdefault(self.state.names[module], len(self.started))

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], z: Tensor) -> Tensor | None:
        self._want_gradient(module, True)
        # under no_grad nothing of it reaches y
        if not self._by_rule(module) or not (torch.is_grad_enabled() or self.looking):
            return None
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        shared = self.n > 1 and x.ndim > 0 and z.ndim > 1 and len(z) == len(x) == 1
        if shared:  # as position embeddings: each input gets a z and a gradient of its own
            x, z = x.expand(self.n, *x.shape[1:]), z.repeat(self.n, *[1] * (z.ndim - 1))
        if self.looking:
            pass
        elif not z.requires_grad:  # nothing traced before it: the gradient needs a place to arrive
            z = z.detach().requires_grad_().clone()
        elif z._is_view():  # its history would be rewritten if it were changed in place
            z = z.clone()
        if self.noting:
            name, count = self.state.names[module], 1 + sum(call.module is module for call in self.calls.values())
            layer = name if count == 1 else f"{name}#{count}"
            self.started.setdefault(layer, len(self.started))
            self.calls[layer] = Call(module, x.clone() if self.copy_inputs else x, x._version, z.shape, shared)
            if z.requires_grad:
                register_hook(z, partial(self._arrive, layer, self.calls[layer]))
        return z

    @torch.no_grad()
    def _arrive(self, layer: str, call: Call, g: Tensor) -> None:
        """dy/dz of a call is here: the layer's rule makes dy/dθ of it and the input."""
        if self.calls.get(layer) is not call:
            raise TraceFLError(_KEPT)
        own = self.state.hidden[call.module]
        dtype = self.state.tensors[next(iter(own.values()))].dtype  # the model may use autocast
        x, g = call.x.movedim(call.axes[0], 0) if call.x.ndim else call.x, g.movedim(call.axes[1], 0)
        call.x = call.x if self.n == 1 else call.x.new_empty(0)  # let go; `alone` is looked at again
        self.seen.get(layer, []).append(g[0])
        found = self.state.rules[call.module](call.module, x.to(dtype) if x.is_floating_point() else x, g.to(dtype))
        self.receive(layer, {own[name]: G for name, G in found.items() if name in own})

    def backward(self, done: Pass, receive: Callable[[str, dict[str, Gradient]], None]) -> None:
        """Differentiate Σ_n y_n; `receive` gets each layer's gradients as they come."""
        self.receive, self.n, self.calls = receive, len(done.logits), done.calls
        try:  # asking for all leaves, the gradient passes everywhere
            found = true_gradients(done.y.sum(), list(done.leaves.values()), done.nodes)
        except (RuntimeError, TypeError) as error:
            if "backward through the graph a second time" in str(error) or "unpack_hook" in str(error):
                raise TraceFLError(_KEPT) from error
            raise
        for name, layer in done.loose.items():
            g = dict(zip(done.leaves, found, strict=True))[id(self.state.tensors[name])]
            if g is not None:  # a function of the model's own may give none
                receive(layer, {name: Dense(g[None])})

    def _when(self, layer: str) -> int:
        """When a layer, or the nearest module around it, started."""
        return self.started[layer] if layer in self.started else self._when(layer.rpartition(".")[0])


def _tell_apart(done: Pass, alone: Pass, n: int, holds_first: bool) -> bool:
    """Find the axes along which n inputs lie in each call of a pass: those of n now, of 1 `alone`.

    If the pass `holds_first`, every call must see the first input as it was `alone`, neither
    changed by the others nor moved, up to rounding, which in low precision may be a hundredth.
    Returns whether all that holds.
    """
    pairs = [(done.logits[0], alone.logits[0])]
    if done.loose or list(done.calls) != list(alone.calls):
        return False
    for call, single in zip(done.calls.values(), alone.calls.values(), strict=True):
        call.axes = _axis(call.x.shape, single.x.shape, n), _axis(call.shape, single.shape, n)
        if -1 in call.axes:
            return False
        pairs.append((call.x.select(call.axes[0], 0), single.x.select(call.axes[0], 0)))
    return not holds_first or all(_alike(pair) for pair in pairs)


def check_same(again: Tensor, before: Tensor) -> None:
    """Raise TraceFLError if the logits of one input differ by more than rounding may do."""
    differ = (again - before).abs().max() > 1e-4 * before.abs().max()
    shown = " and ".join(str([round(z, 4) for z in logits[0, :3].tolist()]) for logits in (before, again))
    said = f"the model answers differently each time in eval mode (input 0: logits {shown})"
    require(not differ, f"{said}; let dropout and other noise depend on self.training")


def _random_state() -> Tensor:
    """Of torch's generators, which a model that draws numbers moves."""
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]
    return torch.cat(states)


def _alike(pair: Sequence[Tensor]) -> bool:
    """Whether two tensors are equal up to what low precision rounds off; or there are none."""
    if len(pair) < 2:
        return not pair
    return not pair[1].numel() or bool((pair[0] - pair[1]).abs().max() <= 0.01 * pair[1].abs().max())


def _axis(now: torch.Size, before: torch.Size, n: int) -> int:
    """The only axis in which two shapes differ, 1 before and n now; -1 if there is none."""
    return next((d for d, was in enumerate(before) if was == 1 and now == (*before[:d], n, *before[d + 1 :])), -1)


def true_gradients(y: Tensor, leaves: Sequence[Tensor], nodes: Sequence[Any]) -> list[Tensor | None]:
    """dy/dleaf of each leaf, dense and real, with the `nodes` that `graph` found put right."""
    norms = [node for node in nodes if "BatchNorm" in node.name()]
    handles = [node.register_prehook(laid_out_like_input(node)) for node in norms]
    tables = [node for node in nodes if node.name().startswith("Embedding")]
    handles += [node.register_hook(whole_gradient(node)) for node in tables]
    try:
        found = torch.autograd.grad(y, leaves, allow_unused=True) if leaves else ()
    finally:
        for handle in handles:
            handle.remove()
    return [None if g is None else as_real(g.to_dense() if g.is_sparse else g) for g in found]


def graph(y: Tensor) -> tuple[dict[int, Tensor], list[Any]]:
    """The tensors with a gradient that y depends on, by id, and the nodes to look at."""
    leaves, nodes, seen, stack = dict[int, Tensor](), list[Any](), set[Any](), [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves[id(leaf)] = leaf
        elif node.name().startswith("CheckpointFunction"):
            raise TraceFLError("checkpoint(use_reentrant=True) hides gradients from trace: set use_reentrant=False")
        elif node.name() in PUT_RIGHT or is_own(node):
            nodes.append(node)
    return leaves, nodes
