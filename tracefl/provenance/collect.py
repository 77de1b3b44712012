"""Inputs -> per-input gradients of every traced tensor, call by call, in as few passes as memory allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tracefl.errors import TraceFLError
from tracefl.provenance.capture import Batch, Call, Explain, Pass, run
from tracefl.provenance.gradients import Dense, Gradient, compact
from tracefl.provenance.state import TracedState

LayerGradients = dict[str, dict[str, Gradient]]  # layer -> tensor -> gradient, layers in execution order


class InseparableError(Exception):
    """A layer's input does not show which of its entries belong to which input of the batch."""


@dataclass
class Group:
    """Gradients of inputs first to last - 1, held together so that clients are read once for all of them."""

    first: int
    targets: Tensor
    y: Tensor
    layers: LayerGradients = field(default_factory=dict)

    @property
    def last(self) -> int:
        return self.first + len(self.targets)

    @property
    def nbytes(self) -> int:
        return sum(gradient.nbytes for layer in self.layers.values() for gradient in layer.values())

    def fits(self, other: Group) -> bool:
        """The same layers with gradients of the same shapes: always so unless the model routes its inputs."""
        return self._form() == other._form()

    def _form(self) -> list[tuple[object, ...]]:
        return [(name, *((t, *g.form) for t, g in layer.items())) for name, layer in self.layers.items()]


def joined(groups: list[Group]) -> Group:
    first = groups[0]
    layers = {
        name: {
            tensor: gradient.join([group.layers[name].pop(tensor) for group in groups[1:]])
            for tensor, gradient in layer.items()
        }
        for name, layer in first.layers.items()
    }
    targets, y = torch.cat([g.targets for g in groups]), torch.cat([g.y for g in groups])
    return Group(first.first, targets, y, layers)


def collect(
    model: nn.Module,
    state: TracedState,
    inputs: Batch,
    targets: Tensor | None,
    explain: Explain,
    scratch: int,
) -> Iterator[Group]:
    """Groups of inputs whose gradients take at most `scratch` bytes (a single input may take more)."""
    N = batch_size(inputs)
    probe = run(model, state, take(inputs, 0, 1), take_targets(targets, 0, 1), explain)
    chunk = 1 if alone(model, probe) else max(1, scratch // max(1, probe.nbytes))
    waiting: list[Group] = []
    first = 0
    while first < N:
        last = min(N, first + chunk)
        done = run(
            model, state, take(inputs, first, last), take_targets(targets, first, last), explain, probe=probe
        )  # fmt: skip
        assert done.y is not None
        assert done.targets is not None
        if not torch.isfinite(done.y).all():
            bad = first + int((~torch.isfinite(done.y)).nonzero()[0])
            raise TraceFLError(f"the model's output for input {bad} is not finite; check model and input")
        try:
            group = Group(first, done.targets, done.y, gradients(state, done, probe))
        except InseparableError:
            chunk = 1
            continue
        if waiting and (sum(g.nbytes for g in waiting) + group.nbytes > scratch or not waiting[0].fits(group)):
            yield joined(waiting)
            waiting = []
        waiting.append(group)
        first = last
    yield joined(waiting)


def alone(model: nn.Module, probe: Pass) -> bool:
    """Inputs must pass one by one: a tensor is used outside of rules, or the batch's own statistics are."""
    return bool(probe.loose) or any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
        for module in model.modules()
    )


@torch.no_grad()
def gradients(state: TracedState, done: Pass, probe: Pass) -> LayerGradients:
    """Every call's gradients by its rule, and those of loose tensors as they came, in execution order."""
    assert done.targets is not None
    n = len(done.targets)
    found: list[tuple[tuple[int, int], str, dict[str, Gradient]]] = []
    if n > 1 and (done.loose or [_which(c) for c in done.calls] != [_which(c) for c in probe.calls]):
        raise InseparableError
    for i, call in enumerate(done.calls):
        rule, local = state.rules[call.module], state.local(call.module)
        name = state.names[call.module] + (f"#{call.index + 1}" if call.index else "")
        layer: dict[str, Gradient] = {}
        if call.g is not None:
            x, g = (call.x, call.g) if n == 1 else _by_input(call, probe.calls[i], n)
            for own, gradient in rule(call.module, x, g).items():
                if own in local:
                    layer[local[own]] = compact(gradient.merge(n))
            call.g = None
        found.append(((call.order, 0), name, layer))
    ruled = {state.names[call.module] for call in done.calls}
    loose: dict[str, tuple[tuple[int, int], dict[str, Gradient]]] = {}
    for i, (tensor, by_tensor) in enumerate(done.loose.items()):
        owner = state.names[state.owners[tensor]]
        name = owner if owner and owner not in ruled else tensor
        key = (_started(state, done, owner), i + 1)
        if by_tensor is not None:
            loose.setdefault(name, (key, {}))[1][tensor] = Dense(by_tensor[None])
    found += [(key, name, layer) for name, (key, layer) in loose.items()]
    return {name: layer for _, name, layer in sorted(found, key=lambda entry: entry[0])}


def _which(call: Call) -> tuple[nn.Module, int]:
    return call.module, call.index


def _by_input(call: Call, probed: Call, n: int) -> tuple[Tensor, Tensor]:
    """x and g with the axis of the inputs in front, told by having grown from 1 to n since the probe."""
    assert call.g is not None
    if not call.shared or call.sum is None or probed.sum is None:
        of_x, of_g = _grown(call.x.shape, probed.x.shape, n), _grown(call.shape, probed.shape, n)
        return call.x.movedim(of_x, 0), call.g.movedim(of_g, 0)
    if not call.x.ndim:
        raise InseparableError
    # every input's own dy/d(sum), summed over the axes along which z was spread
    axis = _grown(call.sum.shape, probed.sum.shape, n)
    place = axis - (call.g.ndim - len(call.shape))
    g = call.g.movedim(axis, 0) * call.sum.factor
    g = g if place < 0 else g.unsqueeze(place + 1)
    extra = g.ndim - 1 - len(call.shape)
    g = g.sum(tuple(range(1, 1 + extra))) if extra else g
    return call.x.expand(n, *call.x.shape).flatten(0, 1), g.sum_to_size(n, *call.shape).flatten(0, 1)


def _grown(now: torch.Size, before: torch.Size, n: int) -> int:
    grown = [d for d, (a, b) in enumerate(zip(now, before, strict=False)) if a != b]
    if len(now) != len(before) or len(grown) != 1 or (before[grown[0]], now[grown[0]]) != (1, n):
        raise InseparableError
    return grown[0]


def _started(state: TracedState, done: Pass, owner: str) -> int:
    modules = {name: module for module, name in state.names.items()}
    while owner and modules[owner] not in done.started:
        owner = owner.rpartition(".")[0]
    return done.started.get(modules[owner], 0)


def batch_size(inputs: Batch) -> int:
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
