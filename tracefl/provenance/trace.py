"""tracefl.trace: which clients are responsible for a global model's predictions.

A traced layer is linear in its own parameters θ given its input, so client k's total (equations 4 to 6) is

    T_k = Σ_l β_l Σ_j c_j z_kj = Σ_l β_l <θ_k, dy/dθ_l>,    c_j = dy/dz_j,  z_kj = w_kj · z_in + b_kj,

one backward pass of the global model for all clients, then one contraction per tensor. "influence" contracts
p_k (W_k - W_g) with dy/dW over the whole state, BatchNorm's statistics included, y being the log-odds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tracefl.errors import TraceFLError
from tracefl.provenance.capture import Batch, Explain, tracing
from tracefl.provenance.clients import Clients, State, check_names
from tracefl.provenance.collect import batch_size, collect
from tracefl.provenance.contraction import Ledger
from tracefl.provenance.path import along_path, between, change_of_output
from tracefl.provenance.result import Provenance
from tracefl.provenance.state import traced_state

METHODS = ("neuron", "influence", "integrated")
OUTPUTS = ("logit", "log_odds")
TOLERANCE, MOST_STEPS = 0.01, 256  # of method "integrated"


def trace(
    model: nn.Module,
    clients: Mapping[str, State],
    inputs: Batch,
    *,
    targets: Tensor | Sequence[int] | None = None,
    weights: Mapping[str, float] | None = None,
    reference: State | None = None,
    layer_decay: float = 0.9,
    layers: str | Sequence[str] = "all",
    method: str = "neuron",
    output: str | None = None,
    steps: int | None = None,
    scratch_bytes: int = 1 << 30,
) -> Provenance:
    """Explain the predictions of `model`, which holds the global weights, by the clients' states.

    inputs: Tensor [N, ...] or keyword arguments with such. targets: [N] classes; default: as predicted.
    weights: p_k, scaled to add up to 1. reference: the incoming global model, to trace updates, not weights.
    layers: "all", "paper" (Linear, Conv2d, LayerNorm, Conv1D) or module names, submodules included.
    output: "logit", or "log_odds" (default for "influence"). steps: intervals of the path of
    "integrated"; None doubles 16 until the shares of all layers miss the change of y by less than 1 %, up to 256.
    scratch_bytes bounds the memory taken beside the model, except that one input always has to fit.

    Every tensor used counts as a layer of its own where no rule covers its module (attention's in_proj, class tokens),
    at the place where that module starts, in `layers` and in the decay. What cannot change a share (unused layers, rows
    of tokens that do not occur, kernel taps that see only padding) is not read and so not checked to be finite.

    Raises: TraceFLError, naming client and tensor, or the argument, and what to do.
    """
    output = output or ("log_odds" if method == "influence" else "logit")
    _check_settings(method, output, weights, reference, layer_decay)
    for name, number in (("steps", steps), ("scratch_bytes", scratch_bytes)):
        if number is not None and number < 1:
            raise TraceFLError(f"{name}={number!r} must be 1 or more")
    model, inputs = _full_precision(model, inputs)
    state = traced_state(model, layers, statistics=method != "neuron")
    if not state.tensors:
        raise TraceFLError(f"layers={layers!r}: no floating-point tensor is there; choose other layers")
    entries = model.state_dict()
    who = Clients(clients, entries, state.aliases)
    p = None if weights is None else _shares(weights, who.ids)
    if reference is not None:
        check_names(None, reference, entries, state.aliases)
    N = batch_size(inputs)
    classes, explain = _checked(targets, N), _explain(output)
    ledger = Ledger(
        who,
        entries,
        base=entries if method == "influence" else reference,
        with_global=method != "influence" and p is not None,
        scratch=scratch_bytes // 4,
    )
    change = None
    if method == "integrated" and reference is not None:
        change, classes = change_of_output(model, reference, inputs, classes, explain)

    # what passes and their gradients may take; the rest is for tiles, and for clients where they load lazily
    held = scratch_bytes - scratch_bytes // 16 if who.resident else scratch_bytes // 2

    def enter(points: Iterable[tuple[float, nn.Module]]) -> Tensor:
        for factor, at in points:
            there = state if at is model else traced_state(at, layers, statistics=True)
            with tracing(at, there) as hooks:
                explained = collect(at, hooks, inputs, classes, explain, ledger, factor, held)
        return explained

    if change is None or reference is None:
        explained_as = enter([(1.0, model)])
    else:
        count = steps or 16
        explained_as = enter(along_path(model, reference, count))
        while steps is None and layers == "all" and count < MOST_STEPS and ledger.misses(change) > TOLERANCE:
            ledger.halve()
            enter(between(model, reference, count))
            count *= 2
    by_layer = torch.stack(list(ledger.layers.values())).cpu()
    if method == "neuron":
        age = torch.arange(len(by_layer) - 1, -1, -1, dtype=torch.float64)  # L - 1 - l
        by_layer *= (layer_decay**age)[:, None, None]
    if not torch.isfinite(by_layer).all():
        who.blame()
        raise TraceFLError("contributions are not finite though every client is: the gradient overflows")
    shares, residual = by_layer[:, :, : len(who.ids)], None
    if p is not None:
        shares = shares * p
        residual = (by_layer[:, :, -1] if ledger.with_global else 0) - shares.sum(2)
    return Provenance(method, who.ids, explained_as.cpu(), shares, list(ledger.layers), residual, change)


def _explain(output: str) -> Explain:
    def explain(logits: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = logits.argmax(1) if targets is None else targets.to(logits.device)
        classes = logits.shape[1]
        if targets.min() < 0 or targets.max() >= classes:
            bad = targets[(targets < 0) | (targets >= classes)][0].item()
            raise TraceFLError(f"target {bad} is out of range: the model has classes 0 to {classes - 1}")
        y = logits.gather(1, targets[:, None])[:, 0]
        if output == "log_odds":
            y = y - logits.scatter(1, targets[:, None], -math.inf).logsumexp(1)
        return y, targets

    return explain


def _check_settings(
    method: str, output: str, weights: Mapping[str, float] | None, reference: State | None, layer_decay: float
) -> None:
    if method not in METHODS:
        raise TraceFLError(f"method={method!r} is unknown: choose one of {', '.join(METHODS)}")
    if output not in OUTPUTS:
        raise TraceFLError(f"output={output!r} is unknown: choose one of {', '.join(OUTPUTS)}")
    if method != "neuron" and weights is None:
        raise TraceFLError(f"method={method!r} needs weights: pass every client's number of examples")
    if method == "integrated" and reference is None:
        raise TraceFLError("method='integrated' needs reference: pass the state of the incoming global model")
    if not 0 < layer_decay <= 1:
        raise TraceFLError(f"layer_decay={layer_decay!r} must lie in (0, 1]; 1 switches the decay off")


def _shares(weights: Mapping[str, float], ids: Sequence[str]) -> Tensor:
    """p_k = w_k / Σ w, float64 [K]."""
    missing = [who for who in ids if who not in weights]
    if missing:
        raise TraceFLError(f"weights miss client {missing[0]!r}: give every client a weight")
    p = torch.tensor([float(weights[who]) for who in ids], dtype=torch.float64)
    bad = (p < 0) | ~torch.isfinite(p)
    if bad.any():
        k = int(bad.nonzero()[0])
        raise TraceFLError(f"weights: client {ids[k]!r} has {p[k].item()}; pass finite values of 0 or more")
    if not p.any():
        raise TraceFLError("weights are all zero: at least one client must have a positive weight")
    return p / p.sum()


def _checked(targets: Tensor | Sequence[int] | None, N: int) -> Tensor | None:
    targets = None if targets is None else torch.as_tensor(targets)
    if targets is not None and (targets.shape != (N,) or targets.is_floating_point()):
        raise TraceFLError(f"targets are {tuple(targets.shape)} of {targets.dtype}: pass {N} integers, one per input")
    return targets


def _full_precision(model: nn.Module, inputs: Batch) -> tuple[nn.Module, Batch]:
    """A float32 copy of a half-precision model; inputs on the model's device, half-precision as float32."""
    tensors = [t for t in model.state_dict().values() if isinstance(t, Tensor)]
    if not tensors:
        raise TraceFLError("the model has no parameters to trace")
    if tensors[0].device.type == "mps":
        raise TraceFLError("Apple's MPS has no float64, in which contributions are added up: pass model.cpu()")
    half = (torch.float16, torch.bfloat16)
    if any(t.dtype in half for t in tensors):
        model = copy.deepcopy(model).float()

    def full(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        # detached: gradients end at the model's tensors
        return value.detach().to(tensors[0].device, torch.float32 if value.dtype in half else value.dtype)

    if isinstance(inputs, Mapping):
        return model, {name: full(value) for name, value in inputs.items()}
    return model, full(inputs)  # type: ignore[return-value]
