"""tracefl.trace: which clients are responsible for a global model's predictions.

A traced layer is linear in its own parameters θ given its input, so client k's total (equations 4 to 6) is

    T_k = Σ_l β_l Σ_j c_j z_kj = Σ_l β_l <θ_k, dy/dθ_l>,    c_j = dy/dz_j,  z_kj = w_kj · z_in + b_kj,

one backward pass of the global model for all clients, then one product per tensor. The way of a
gradient: `passes` (forward, backward, the layer's rule), `shares` (which clients, which inputs),
`contract` (the product). `plain` has the method on one page.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tracefl.errors import TraceFLError
from tracefl.outputs import log_odds
from tracefl.provenance.clients import Source, States
from tracefl.provenance.integrated import FIRST_STEPS, integrate
from tracefl.provenance.passes import Batch, Explain, batch_size, exact, take, uses_batch_statistics
from tracefl.provenance.result import Provenance
from tracefl.provenance.shares import Shares
from tracefl.provenance.state import TracedState, traced_state

METHODS = ("neuron", "influence", "integrated")
OUTPUTS = ("logit", "log_odds")


def trace(
    model: nn.Module,
    clients: Mapping[str, Source],
    inputs: Batch,
    *,
    targets: Tensor | Sequence[int] | None = None,
    weights: Mapping[str, float] | None = None,
    reference: Source | None = None,
    layer_decay: float = 0.9,
    layers: str | Sequence[str] = "all",
    method: str = "neuron",
    output: str | None = None,
    steps: int | None = None,
    scratch_bytes: int = 1 << 30,
) -> Provenance:
    """Explain predictions of a global model by the states of the clients that it was fused from.

    Args:
        model: classifier that holds the global weights; its output is logits [N, classes], or has
            them as `.logits`. It is traced in eval mode and left as it was.
        clients: of each of K clients its id and its state: a state dict, a mapping that reads its
            tensors when asked, or the path of a safetensors file, of which a tensor is in memory
            at a time. Names and shapes are the model's; entries that are not floating-point may
            be left out.
        inputs: N inputs, as Tensor [N, ...] or as a dict of the model's keyword arguments.
        targets: classes [N] to explain; default: those that the model predicts.
        weights: client id -> weight in the fusion, such as its number of examples; scaled to p_k,
            which add up to 1. Default: shares are not weighted (the paper's default).
        reference: state, or its path, of the incoming global model: updates θ_k - θ_ref are traced
            instead of weights. Needed by "integrated".
        layer_decay: β, by which a layer counts less than the one after it, 0 < β <= 1 (equation
            6; default 0.9); 1 switches it off. Only "neuron" uses it.
        layers: "all" (default), "paper" (Linear, Conv2d, LayerNorm, Conv1D) or names of modules,
            which include their submodules.
        method: "neuron" (default), the paper's Σ_j c_j z_kj over layers; "influence", the first-order
            effect of leaving the client out, p_k <W_k - W_g, dy/dW> over the whole state, BatchNorm's
            statistics included (needs weights); or "integrated", the client's share of the actual
            change of y over the round (needs weights and reference).
        output: the y that is explained: "logit" of the target, or "log_odds", the logit minus the
            log-sum-exp of the others. Default: "log_odds" for "influence", else "logit".
        steps: intervals of the path of "integrated". Default: doubled from 16 until the shares of
            all layers miss the change of y by less than 1 %, up to 256.
        scratch_bytes: memory to take beside the model (default 1 GiB); one input always has to fit.

    Returns:
        The contributions [N, K] with everything that follows from them; see `Provenance`. A tensor
        that no rule covers (attention's in_proj, class tokens) counts as a layer of its own, where
        its module starts. What cannot change a share (unused layers, rows of tokens that do not
        occur, kernel taps that see only padding, layers under `no_grad`) is not read.

    Raises:
        TraceFLError: an argument or a state is unusable; the message names client and tensor, or
            the argument, and what to do.

    Example:
        Class 0 of y = W x: ann's row of W for it is (1, 2), bob's (3, -1).

        >>> import torch
        >>> from tracefl import trace
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> ann, bob = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, -1.0], [0.0, 0.0]])
        >>> clients = {"ann": {"weight": ann}, "bob": {"weight": bob}}
        >>> found = trace(model, clients, torch.tensor([[1.0, 2.0]]), targets=[0])
        >>> found.contributions.tolist(), found.responsible
        ([[5.0, 1.0]], ['ann'])

    Reference:
        Equations 2 to 7 of the paper (arXiv 2312.13632) for "neuron".
    """
    output = output or ("log_odds" if method == "influence" else "logit")
    _check_settings(method, output, weights, reference, layer_decay, steps, scratch_bytes)
    model, inputs = _full_precision(model, inputs)
    statistics, N, explain = method != "neuron", batch_size(inputs), _explain(output)
    state, classes = traced_state(model, layers, statistics), _checked(targets, N)
    if not isinstance(clients, Mapping) or not clients:
        found = "an empty one" if isinstance(clients, Mapping) else f"a {type(clients).__name__}"
        raise TraceFLError(f"clients must be a dict from client id to state dict, got {found}")
    entries, ids = model.state_dict(), list(clients)
    who = States({f"client {name!r}": client for name, client in clients.items()}, entries, state.aliases)
    p = None if weights is None else _normalised(weights, ids)
    base = {"the model": entries} if method == "influence" else {} if reference is None else {"reference": reference}
    origin = States(base, entries, state.aliases) if base else None
    with_model = method != "influence" and p is not None
    shares = Shares(who, origin, with_model, N, read_at_once=scratch_bytes // 4)
    # what passes may take; clients that are read from files, and tiles of the product, take the rest
    most = scratch_bytes - scratch_bytes // 16 if who.in_memory else scratch_bytes // 2

    def add_at(moved: nn.Module, factor: float) -> Tensor:
        nonlocal classes
        there = state if moved is model else traced_state(moved, layers, statistics)
        y, classes = _add_shares(moved, there, inputs, classes, explain, shares, factor, most)
        return y

    if method == "integrated":
        steps = steps or (None if layers == "all" else FIRST_STEPS)
        change = integrate(model, origin.states["reference"], steps, shares, add_at)
    else:
        change = None
        add_at(model, 1.0)
    by_layer = torch.stack(list(shares.layers.values())).cpu()
    if method == "neuron":
        age = torch.arange(len(by_layer) - 1, -1, -1, dtype=torch.float64)  # L - 1 - l
        by_layer *= (layer_decay**age)[:, None, None]
    if not torch.isfinite(by_layer).all():
        who.check_finite()
        raise TraceFLError("contributions are not finite though every client is: the gradient overflows")
    contributions, residual = by_layer[:, :, : len(ids)], None
    if p is not None:
        contributions = contributions * p
        residual = (by_layer[:, :, -1] if with_model else 0) - contributions.sum(2)
    return Provenance(method, ids, classes.cpu(), contributions, list(shares.layers), residual, change)


def _add_shares(
    model: nn.Module, state: TracedState, inputs: Batch, targets: Tensor | None,
    explain: Explain, shares: Shares, factor: float, most: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add `factor` times the shares of all inputs, in as few passes as `most` bytes allow; y and targets [N]."""
    parts: list[tuple[Tensor, Tensor]] = []
    with exact(model, state) as tracer:

        def arguments(some: slice) -> tuple[Batch, Tensor | None, Explain]:
            return take(inputs, some), None if targets is None else targets[some], explain

        alone, nbytes = tracer.measured(*arguments(slice(0, 1)))
        tracer.copy_inputs = any(call.x._version != call.version for call in alone.calls.values())
        at_once = 1 if alone.loose or uses_batch_statistics(model) else max(1, most // max(1, nbytes))
        first = 0
        while first < shares.N:
            some = slice(first, min(shares.N, first + at_once))
            try:
                done = tracer.forward(*arguments(some))
                apart = done.n == 1 or done.tell_apart(alone, holds_first=first == 0)
            except RuntimeError:
                if at_once == 1:
                    raise
                apart = False
            if not apart:
                at_once = 1
                continue
            if not torch.isfinite(done.y).all():
                bad = first + int((~torch.isfinite(done.y)).nonzero()[0])
                raise TraceFLError(f"the model's output for input {bad} is not finite; check model and input")
            shares.open(done.layers)
            tracer.backward(done, partial(shares.add, some, factor))
            parts.append((done.y.detach().double().cpu(), done.targets))
            first = some.stop
    y, explained = (torch.cat(part) for part in zip(*parts, strict=True))
    return y, explained


def _explain(output: str) -> Explain:
    def explain(logits: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = logits.argmax(1) if targets is None else targets.to(logits.device)
        outside = (targets < 0) | (targets >= logits.shape[1])
        if outside.any():
            raise TraceFLError(f"targets must be 0 to {logits.shape[1] - 1}, got {targets[outside][0].item()}")
        y = log_odds(logits, targets) if output == "log_odds" else logits.gather(1, targets[:, None])[:, 0]
        return y, targets

    return explain


def _check_settings(
    method: str,
    output: str,
    weights: Mapping[str, float] | None,
    reference: object,
    layer_decay: float,
    steps: int | None,
    scratch_bytes: int,
) -> None:
    for name, value, known in (("method", method, METHODS), ("output", output, OUTPUTS)):
        if value not in known:
            raise TraceFLError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if method != "neuron" and weights is None:
        raise TraceFLError(f"method={method!r} needs weights: pass every client's number of examples")
    if method == "integrated" and reference is None:
        raise TraceFLError("method='integrated' needs reference: pass the state of the incoming global model")
    if not 0 < layer_decay <= 1:
        raise TraceFLError(f"layer_decay must be above 0 and at most 1 (no decay), got {layer_decay!r}")
    for name, number in (("steps", steps), ("scratch_bytes", scratch_bytes)):
        if number is not None and number < 1:
            raise TraceFLError(f"{name} must be at least 1, got {number!r}")


def _normalised(weights: Mapping[str, float], ids: Sequence[str]) -> Tensor:
    """p_k = w_k / Σ w, float64 [K]."""
    if missing := [who for who in ids if who not in weights]:
        raise TraceFLError(f"weights must have every client, got none for {missing[0]!r}")
    p = torch.tensor([float(weights[who]) for who in ids], dtype=torch.float64)
    if (bad := (p < 0) | ~torch.isfinite(p)).any():
        k = int(bad.nonzero()[0])
        raise TraceFLError(f"weights must be finite and at least 0, got {p[k].item()} for client {ids[k]!r}")
    if not p.any():
        raise TraceFLError("weights must be above 0 for at least one client, got 0 for all")
    return p / p.sum()


def _checked(targets: Tensor | Sequence[int] | None, N: int) -> Tensor | None:
    if targets is None:
        return None
    targets = torch.as_tensor(targets)
    if targets.shape != (N,) or targets.is_floating_point():
        raise TraceFLError(f"targets must be {N} integers, one per input, got {tuple(targets.shape)} {targets.dtype}")
    return targets


def _full_precision(model: nn.Module, inputs: Batch) -> tuple[nn.Module, Batch]:
    """The model, a float32 copy of it if it is in half precision, and the inputs as it takes them."""
    tensors = [t for t in model.state_dict().values() if isinstance(t, Tensor)]
    if not tensors:
        raise TraceFLError("the model has no parameters to trace")
    if tensors[0].device.type == "mps":
        raise TraceFLError("Apple's MPS has no float64, in which contributions are added up: pass model.cpu()")
    half = (torch.float16, torch.bfloat16)
    if any(t.dtype in half for t in tensors):
        model = copy.deepcopy(model).float()

    def full(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # detached: gradients end at the model's tensors
        return value.detach().to(tensors[0].device, torch.float32 if value.dtype in half else value.dtype)

    if isinstance(inputs, Mapping):
        return model, {name: full(value) for name, value in inputs.items()}
    return model, full(inputs)
