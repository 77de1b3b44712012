"""Inputs -> per-input gradients of every traced tensor, call by call, in as few passes as memory allows.

Where one pass holds all inputs, each layer's gradients meet the clients while the backward pass goes on and are gone
before the next layer's come; else gradients of several passes wait, so that clients are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tracefl.errors import TraceFLError
from tracefl.provenance.capture import Batch, Call, Explain, Hooks, Pass, backward, forward, measured
from tracefl.provenance.contraction import Ledger
from tracefl.provenance.gradients import Dense, Gradient, compact
from tracefl.provenance.state import TracedState


class InseparableError(Exception):
    """A layer's input does not show which of its entries belong to which input of the batch."""


@dataclass
class Group:
    """Gradients of inputs `first` to `last` - 1 that wait for the clients: layer -> tensor -> gradient."""

    first: int
    last: int
    layers: dict[str, dict[str, Gradient]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(gradient.nbytes for layer in self.layers.values() for gradient in layer.values())

    @property
    def form(self) -> dict[str, dict[str, tuple[object, ...]]]:
        """Equal for groups that go together: always so unless the model routes its inputs."""
        return {name: {tensor: g.form for tensor, g in layer.items()} for name, layer in self.layers.items()}


def settle(groups: list[Group], ledger: Ledger, factor: float) -> None:
    """Enter groups that follow one another as if they were one."""
    first, last = groups[0].first, groups[-1].last
    for name in list(groups[0].layers):
        layer, *others = (group.layers.pop(name) for group in groups)
        if others:
            layer = {tensor: gradient.join([other[tensor] for other in others]) for tensor, gradient in layer.items()}
            others.clear()  # the parts go before the whole is entered
        ledger.enter(name, layer, first, last, factor)


def collect(
    model: nn.Module,
    hooks: Hooks,
    inputs: Batch,
    targets: Tensor | None,
    explain: Explain,
    ledger: Ledger,
    factor: float,
    scratch: int,
) -> Tensor:
    """Enter `factor` times the shares of all inputs into `ledger`; the targets [N] that they were explained as.

    What passes leave behind and gradients that wait take at most `scratch` bytes (a single input may take more).
    """
    N, state = batch_size(inputs), hooks.state
    some = take(inputs, 0, 1), take_targets(targets, 0, 1), explain
    probe, nbytes = measured(model, lambda: forward(model, hooks, *some))
    chunk = scratch // max(1, nbytes)
    if chunk < N:
        chunk = max(1, chunk // 5)  # the other four fifths are for gradients that wait
    if alone(model, probe):
        chunk = 1
    explained: list[Tensor] = []
    waiting: list[Group] = []
    first = 0
    while first < N:
        last = min(N, first + chunk)
        batch, own = take(inputs, first, last), take_targets(targets, first, last)
        done = forward(model, hooks, batch, own, explain, keep_inputs=probe.disturbed)
        if not torch.isfinite(done.y).all():
            bad = first + int((~torch.isfinite(done.y)).nonzero()[0])
            raise TraceFLError(f"the model's output for input {bad} is not finite; check model and input")
        try:
            shared = shared_calls(done, probe, with_probed=first == 0) if last - first > 1 else set()
        except InseparableError:
            chunk = 1
            continue
        group = Group(first, last)
        ledger.open(layer_names(state, done), N)
        explained.append(done.targets)

        def arrive(layer: str, gradients: dict[str, Gradient], group: Group = group) -> None:
            if group.last - group.first == N:
                ledger.enter(layer, gradients, 0, N, factor)
            else:
                held = group.layers.setdefault(layer, {})
                held |= {name: compact(gradient) for name, gradient in gradients.items()}

        differentiate(state, done, probe, shared, arrive)
        first = last
        if not group.layers:
            continue
        full = sum(g.nbytes for g in waiting) + group.nbytes > scratch - scratch // 5
        if waiting and (full or waiting[0].form != group.form):
            settle(waiting, ledger, factor)
            waiting = []
        waiting.append(group)
    if waiting:
        settle(waiting, ledger, factor)
    return torch.cat(explained)


def alone(model: nn.Module, probe: Pass) -> bool:
    """Inputs must pass one by one: a tensor is used outside of rules, or the batch's own statistics are."""
    return bool(probe.loose) or any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
        for module in model.modules()
    )


def differentiate(
    state: TracedState,
    done: Pass,
    probe: Pass,
    shared: set[int],
    arrive: Callable[[str, dict[str, Gradient]], None],
) -> None:
    """Hand every call's gradients, by its rule, and those of loose tensors as they come to `arrive`."""
    n = len(done.targets)

    @torch.no_grad()
    def by_rule(i: int, g: Tensor) -> None:
        call = done.calls[i]
        x, g = (call.x, g) if n == 1 else _by_input(call, probe.calls[i], n, i in shared, g)
        del call.x  # it is needed no more
        local, dtype = state.local(call.module), state.constants[call.module][0].dtype
        x, g = x.to(dtype) if x.is_floating_point() else x, g.to(dtype)  # the model may use autocast
        found = state.rules[call.module](call.module, x, g)
        arrive(_layer(state, call), {local[own]: gradient.merge(n) for own, gradient in found.items() if own in local})

    for tensor, gradient in backward(done, state, by_rule, shared).items():
        arrive(_loose_layer(state, done, tensor), {tensor: Dense(gradient[None])})


def layer_names(state: TracedState, done: Pass) -> list[str]:
    """Names of the layers in execution order."""
    order = {_layer(state, call): (call.order, 0) for call in done.calls}
    for i, tensor in enumerate(done.loose):
        order.setdefault(_loose_layer(state, done, tensor), (_started(state, done, tensor), i + 1))
    return sorted(order, key=order.__getitem__)


def _layer(state: TracedState, call: Call) -> str:
    return state.names[call.module] + (f"#{call.index + 1}" if call.index else "")


def _loose_layer(state: TracedState, done: Pass, tensor: str) -> str:
    """The owner's name, unless a rule speaks for the owner's other tensors."""
    owner = state.owners[tensor]
    ruled = any(call.module is owner for call in done.calls)
    return tensor if ruled else state.names[owner] or tensor


def shared_calls(done: Pass, probe: Pass, with_probed: bool) -> set[int]:
    """Of n inputs in one pass, the calls that all of them use alike, as with position embeddings.

    Raises InseparableError unless every call shows by its growth since the probe which entries are whose. If the first
    input is the one probed, it must look in every call as it did alone: neither changed by the others nor moved.
    """
    n = len(done.targets)
    if done.loose or [_which(c) for c in done.calls] != [_which(c) for c in probe.calls]:
        raise InseparableError
    shared = set()
    for i, (call, probed) in enumerate(zip(done.calls, probe.calls, strict=True)):
        alike = (call.shape, call.x.shape) == (probed.shape, probed.x.shape)
        if alike and call.sum is not None and probed.sum is not None and call.x.ndim:
            shared.add(i)
            _grown(call.sum.shape, probed.sum.shape, n)
        else:
            axis = _grown(call.x.shape, probed.x.shape, n)
            _grown(call.shape, probed.shape, n)
            if with_probed and not _alike(call.x.select(axis, 0), probed.x.select(axis, 0)):
                raise InseparableError
    return shared


def _alike(now: Tensor, before: Tensor) -> bool:
    """Up to rounding, which in low precision may be as much as a hundredth."""
    if not before.is_floating_point() or not before.numel():
        return torch.equal(now, before)
    return bool((now - before).abs().max() <= 0.01 * before.abs().max())


def _which(call: Call) -> tuple[nn.Module, int]:
    return call.module, call.index


def _by_input(call: Call, probed: Call, n: int, shared: bool, g: Tensor) -> tuple[Tensor, Tensor]:
    """x and g with the axis of the inputs in front, told by having grown from 1 to n since the probe."""
    if not shared or call.sum is None or probed.sum is None:
        of_x, of_g = _grown(call.x.shape, probed.x.shape, n), _grown(call.shape, probed.shape, n)
        return call.x.movedim(of_x, 0), g.movedim(of_g, 0)
    # every input's own dy/d(sum), summed over the axes along which z was spread
    axis = _grown(call.sum.shape, probed.sum.shape, n)
    place = axis - (g.ndim - len(call.shape))
    g = g.movedim(axis, 0) * call.sum.factor
    g = g if place < 0 else g.unsqueeze(place + 1)
    extra = g.ndim - 1 - len(call.shape)
    g = g.sum(tuple(range(1, 1 + extra))) if extra else g
    return call.x.expand(n, *call.x.shape).flatten(0, 1), g.sum_to_size(n, *call.shape).flatten(0, 1)


def _grown(now: torch.Size, before: torch.Size, n: int) -> int:
    grown = [d for d, (a, b) in enumerate(zip(now, before, strict=False)) if a != b]
    if len(now) != len(before) or len(grown) != 1 or (before[grown[0]], now[grown[0]]) != (1, n):
        raise InseparableError
    return grown[0]


def _started(state: TracedState, done: Pass, tensor: str) -> int:
    """When the tensor's owner started, or the nearest module around it that did."""
    modules = {name: module for module, name in state.names.items()}
    owner = state.names[state.owners[tensor]]
    while owner and modules[owner] not in done.started:
        owner = owner.rpartition(".")[0]
    return done.started.get(modules[owner], 0)


def batch_size(inputs: Batch) -> int:
    if not isinstance(inputs, Mapping | Tensor):
        raise TraceFLError(
            f"inputs are a {type(inputs).__name__}: pass a Tensor [N, ...] or a dict of them by argument"
        )
    tensors = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    sizes = {len(t) if t.ndim else 0 for t in tensors if isinstance(t, Tensor)}
    if len(sizes) != 1 or sizes == {0}:
        raise TraceFLError(f"inputs hold {sorted(sizes)} examples: pass tensors of one length, at least 1")
    return sizes.pop()


def take(inputs: Batch, first: int, last: int) -> Batch:
    if isinstance(inputs, Mapping):
        return {k: v[first:last] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return inputs[first:last]


def take_targets(targets: Tensor | None, first: int, last: int) -> Tensor | None:
    return None if targets is None else targets[first:last]
