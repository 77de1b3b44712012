"""tracefl.trace: which clients are responsible for a global model's predictions.

A traced layer is linear in its own parameters θ given its input, so client k's total (equations 4
to 6), with c_j = dy/dz_j and z_kj = w_kj · z_in + b_kj, is

    T_k = Σ_l β_l Σ_j c_j z_kj = Σ_l β_l <θ_k, dy/dθ_l>,

one backward pass of the global model for all clients, then one product per tensor. The way of a
gradient: `passes` (forward, backward, the layer's rule), `shares` (which clients, which inputs),
`contract` (the product). `plain` has the method on one page.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tracefl.classifier import OUTPUTS, Batch, batch_size, exact, full_precision
from tracefl.errors import TraceFLError, as_sentence, require
from tracefl.provenance.clients import States
from tracefl.provenance.contract import Shares
from tracefl.provenance.integrated import FIRST_STEPS, integrate
from tracefl.provenance.passes import Tracer
from tracefl.provenance.result import Provenance
from tracefl.provenance.state import check_used, names_of_adapters, traced_state
from tracefl.states import Source, State, as_state, is_continuous

METHODS = ("neuron", "influence", "integrated", "shapley")


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
    evaluations: int | None = None,
    scratch_bytes: int = 1 << 30,
) -> Provenance:
    """Explain predictions of a global model by the states of the clients that it was fused from.

    Args:
        model: classifier that holds the global weights; its output is logits [N, classes], or has
            them as `.logits`; one logit z, [N, 1], stands for (0, z). It is traced in eval mode
            and left as it was.
        clients: of each of K clients its id and its state: a state dict, a mapping that reads its
            tensors when asked, the path of a safetensors file, of which a tensor is in memory at a
            time, Flower's ArrayRecord, or arrays in the order of the model's state dict. Names
            (PEFT's, too) and shapes are the model's; what no client has is unchanged and has no
            share.
        inputs: N inputs, as Tensor [N, ...] or as a dict of the model's keyword arguments.
        targets: classes [N] to explain; default: those that the model predicts.
        weights: client id -> weight in the fusion, such as its number of examples; scaled to p_k,
            which add up to 1. Default: shares are not weighted (the paper's default).
        reference: state of the incoming global model, in one of these forms: updates θ_k - θ_ref
            are traced instead of weights. Needed by "integrated" and "shapley".
        layer_decay: β, by which a layer counts less than the one after it, 0 < β <= 1 (equation
            6; default 0.9); 1 switches it off. Only "neuron" uses it.
        layers: "all" (default), "paper" (Linear, Conv2d, LayerNorm, Conv1D) or names of modules,
            which include their submodules and must be used.
        method: "neuron" (default), the paper's Σ_j c_j z_kj over layers; "influence", the
            first-order effect of leaving the client out, p_k <W_k - W_g, dy/dW> over the whole
            state, BatchNorm's statistics included (needs weights); "integrated", the client's
            share of the actual change of y over the round (needs weights and reference); or
            "shapley", the mean of what it adds to y when fused after others, over all orders of
            the clients (needs weights and reference; see `evaluations`).
        output: the y that is explained: "logit" of the target, or "log_odds", the logit minus the
            log-sum-exp of the others. Default: "log_odds" for "influence" and "shapley", else
            "logit".
        steps: intervals of the path of "integrated". Default: doubled from 16 until the shares of
            all layers miss the change of y by less than 1 %, up to 256.
        evaluations: how many fused models "shapley" evaluates. Default: 2 K + 2, without standard
            errors; from 2 K + 6 on, with them; 2^K (of up to 14 clients) gives exact values.
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
        >>> ann, bob = ([1.0, 2.0], [0.0, 0.0]), ([3.0, -1.0], [0.0, 0.0])
        >>> clients = {"ann": {"weight": torch.tensor(ann)}, "bob": {"weight": torch.tensor(bob)}}
        >>> found = trace(model, clients, torch.tensor([[1.0, 2.0]]), targets=[0])
        >>> found.contributions.tolist(), found.responsible
        ([[5.0, 1.0]], ['ann'])

    Reference:
        Equations 2 to 7 of the paper (arXiv 2312.13632) for "neuron".
    """
    output = output or ("log_odds" if method in ("influence", "shapley") else "logit")
    require(method in METHODS, f"method must be one of {', '.join(METHODS)}, got {method!r}")
    require(output in OUTPUTS, f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    require(
        method == "neuron" or weights is not None,
        f"method={method!r} needs weights: pass every client's number of examples",
    )
    whole_round = method in ("integrated", "shapley")
    require(not whole_round or reference is not None, f"method={method!r} needs reference, the incoming model's state")
    decays = isinstance(layer_decay, int | float) and 0 < layer_decay <= 1
    require(decays, f"layer_decay must be above 0 and at most 1 (no decay), got {layer_decay!r}")
    fine = steps is None or (isinstance(steps, int) and steps >= 1)
    require(fine, f"steps must be a whole number of at least 1, got {steps!r}")
    fine = isinstance(scratch_bytes, int | float) and scratch_bytes >= 1
    require(fine, f"scratch_bytes must be a number of at least 1, got {scratch_bytes!r}")
    require(isinstance(model, nn.Module), f"model must be a torch.nn.Module, got a {type(model).__name__}")
    found = "an empty one" if isinstance(clients, Mapping) else f"a {type(clients).__name__}"
    require(isinstance(clients, Mapping) and clients, f"clients must be a dict of states by client id, got {found}")
    model, inputs = full_precision(model, inputs)
    N, ids, entries = batch_size(inputs), list(clients), model.state_dict()
    classes = None if targets is None else as_classes(targets, N, "targets")
    p = None if weights is None else normalised(weights, ids)
    saved_as = names_of_adapters(model)
    sources = {f"client {who!r}": as_state(clients[who], f"client {who!r}", entries, saved_as) for who in ids}
    start = None if reference is None else as_state(reference, "reference", entries, saved_as)
    if method == "shapley" and p is not None and start is not None:
        from tracefl.evidence.shapley import explain  # a later room, which itself stands on this one

        playing = dict(zip(ids, sources.values(), strict=True))
        return explain(model, playing, inputs, classes, p, start, layers, output, evaluations, scratch_bytes)
    sent = frozenset[str]().union(*sources.values())
    state = traced_state(model, layers, method != "neuron", sent)
    if p is not None and method != "influence":
        sources["the model"] = entries  # a last column, to tell what the server added
    states = States(sources, entries, state.aliases)
    require(state.tensors, f"layers={layers!r} hold no floating-point tensor that a client sends: choose other layers")
    base = dict[str, State]({"the model": entries} if method == "influence" else {})
    if start is not None:
        base = base or {"reference": start}
    origin = States(base, entries, state.aliases) if base else None
    shares = Shares(states, origin, N, read_at_once=scratch_bytes // 4)
    # for passes; the rest is for tiles of the product and for clients that are read from files
    most = scratch_bytes - scratch_bytes // (16 if states.in_memory else 4)

    def add_at(at: nn.Module, factor: float) -> Tensor:
        nonlocal classes
        tracer = Tracer(at, state if at is model else traced_state(at, layers, True, sent), output)
        with exact(at, tracer.set_hooks):
            y, classes = tracer.add_shares(inputs, classes, shares, factor, most)
        return y

    change = None
    if method == "integrated" and start is not None:
        steps = steps or (None if layers == "all" else FIRST_STEPS)
        moved = {name: start[name] for name in start if name in sent}  # what nobody sends is as it was
        change = integrate(model, moved, steps, shares, add_at)
    else:
        add_at(model, 1.0)
    check_used(model, layers, shares.layers)
    if not all(torch.isfinite(account).all() for account in shares.layers.values()):
        states.check_finite()
        for other in [origin] if origin is not None else []:
            other.check_finite()
        raise TraceFLError("contributions are not finite though every client is: the gradient overflows")
    return Provenance.from_shares(method, ids, torch.as_tensor(classes), shares.layers, p, layer_decay, change)


def as_classes(targets: Tensor | Sequence[int], N: int, argument: str) -> Tensor:
    """An argument as classes, int64 [N]."""
    must = f"{argument} must be {N} integers, one per input"
    with as_sentence(must, "give the numbers of classes", ValueError, TypeError, RuntimeError):
        classes = torch.as_tensor(targets)
    whole = classes.shape == (N,) and not is_continuous(classes) and classes.dtype is not torch.bool
    require(whole, f"{must}, got {tuple(classes.shape)} {classes.dtype}")
    return classes.long()


def normalised(weights: Mapping[str, float], ids: Sequence[str]) -> Tensor:
    """p_k = w_k / Σ w, float64 [K]."""
    kind = type(weights).__name__
    require(isinstance(weights, Mapping), f"weights must be a dict of numbers by client id, got a {kind}")
    for who in ids:
        require(who in weights, f"weights must have every client, got none for {who!r}")
        must = f"weights must be finite numbers and 0 or more, got {weights[who]!r} for {who!r}"
        with as_sentence(must, "correct it", ValueError, TypeError, RuntimeError):
            fine = 0 <= float(weights[who]) < math.inf
        require(fine, must)
    p = torch.tensor([float(weights[who]) for who in ids], dtype=torch.float64)
    require(p.any(), "weights must be above 0 for at least one client, got 0 for all")
    return p / p.sum()
