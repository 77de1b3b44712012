"""The audit: which clients make the model worse, pooled over labelled examples.

A single wrong prediction may have many causes; what a client does to the loss L (mean
cross-entropy, in all or over one class) has one number. It is what the loss would gain if the round
were fused without the client,

    value_k = L(Σ_{j≠k} p_j W_j / (1 - p_k)) - L(W),    W = Σ_j p_j W_j,

exactly by K fusions, or to first order by one backward pass over the examples,

    value_k ≈ - p_k / (1 - p_k) <W_k - W, dL/dW>.

A client with a negative value makes the model worse. A batch's loss needs no gradient per input:
the gradient is asked for by class, and contracted with the clients.

Beside it stands what a client's update looks like, and what its own model has learnt (`updates`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tracefl.classifier import Batch, batch_size, copied, full_precision, whole_float32
from tracefl.errors import require
from tracefl.evidence.labelled import Labelled
from tracefl.evidence.updates import compare, lessons, products
from tracefl.provenance.clients import States
from tracefl.provenance.contract import Dense, Shares
from tracefl.provenance.spread import Spread, here
from tracefl.provenance.state import names_of_adapters, traced_state
from tracefl.provenance.trace import as_classes, normalised
from tracefl.states import Source, as_real, as_state


@dataclass(frozen=True)
class Audit:
    """What every client does to the loss over labelled examples. K clients, C classes.

    Attributes:
        client_ids: K ids.
        values: [K] float64: loss without the client minus loss; negative: it makes the model worse.
            NaN for a client that has all the weight, without whom there is no fusion.
        by_class: [C, K] the same over the examples of one class; NaN for a class without examples.
        examples: [C] how many labelled examples there are of each class.
        exact: whether values come from fusions, or are first-order.
        norms: [K] Euclidean norm of each client's update of the parameters; None without reference.
        cosines: [K] its cosine with the fusion's update; NaN for an update of norm 0.
        agreement: [K] the median of its cosines with the other clients' updates; NaN alike.
        aim: [K] from -1 to 1, whether its training raises classes on their own inputs
            (`updates.lessons`); NaN where it raises none. None unless `aims` were asked for.
        taught: [C, K] how much its training raises the (centred) logit of each class: u_c.

    Example:
        >>> import torch
        >>> from tracefl import Audit
        >>> values = torch.tensor([0.3, 0.2, 0.25, -1.0, 0.2], dtype=torch.float64)
        >>> found = Audit(list("abcde"), values, values[None], torch.tensor([9]), exact=False)
        >>> [round(z, 1) for z in found.z.tolist()]
        [-1.3, 0.0, -0.7, 16.2, 0.0]
    """

    client_ids: list[str]
    values: Tensor
    by_class: Tensor
    examples: Tensor
    exact: bool
    norms: Tensor | None = None
    cosines: Tensor | None = None
    agreement: Tensor | None = None
    aim: Tensor | None = None
    taught: Tensor | None = None

    @property
    def z(self) -> Tensor:
        """[K] robust z of -values: how far below the median client, in units of their spread.

        The spread is 1.4826 times the median absolute deviation, the standard deviation of normal
        values; where that is 0, the z of whoever differs is infinite.
        """
        off = self.values.nanquantile(0.5) - self.values
        spread = 1.4826 * off.abs().nanquantile(0.5)
        return torch.where(off == 0, off, off / spread)


@whole_float32()
def audit(
    model: nn.Module,
    clients: Mapping[str, Source],
    inputs: Batch,
    labels: Tensor,
    *,
    weights: Mapping[str, float],
    reference: Source | None = None,
    exact: bool = False,
    aims: bool = False,
    scratch_bytes: int = 1 << 30,
    spread: Spread = here,
) -> Audit:
    """What every client does to a global model's loss over labelled examples.

    Args:
        model: classifier that holds the global weights, as for `trace`; it is left as it was.
        clients: client id -> state, K of them, in any of the forms that `trace` takes.
        inputs: N inputs, as Tensor [N, ...] or as a dict of the model's keyword arguments.
        labels: their true classes, int64 [N].
        weights: client id -> weight in the fusion, such as its number of examples.
        reference: state of the incoming global model; with it, norm, cosine and agreement of the
            updates are given too.
        exact: fuse the round without each client (K + 1 fusions, each evaluated on all examples)
            instead of the first order.
        aims: evaluate every client's own model too (K + 1 forward passes over the examples); needs
            `reference`.
        scratch_bytes: memory to take beside the model (default 1 GiB).
        spread: does parts of the work elsewhere; default: all here. Fusions are all made here.

    Returns:
        The values of the clients; see `Audit`.

    Raises:
        TraceFLError: an argument or a state is unusable; the message names client and tensor, or
            the argument, and what to do.

    Example:
        The loss of a model that should say 0 would grow without ann, and fall without bob:

        >>> import torch
        >>> from tracefl import audit
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> ann, bob = ({"weight": torch.tensor(w)} for w in ([[2.0], [0.0]], [[0.0], [1.0]]))
        >>> _ = model.load_state_dict({"weight": torch.tensor([[1.0], [0.5]])})
        >>> x, labels, weights = torch.ones(3, 1), torch.tensor([0, 0, 0]), {"ann": 1, "bob": 1}
        >>> found = audit(model, {"ann": ann, "bob": bob}, x, labels, weights=weights)
        >>> [round(value, 2) for value in found.values.tolist()]
        [0.57, -0.57]
    """
    require(isinstance(model, nn.Module), f"model must be a torch.nn.Module, got a {type(model).__name__}")
    model, inputs = full_precision(model, inputs)
    ids, entries = list(clients), model.state_dict()
    p, saved_as = normalised(weights, ids), names_of_adapters(model)
    sources = {f"client {who!r}": as_state(clients[who], f"client {who!r}", entries, saved_as) for who in ids}
    traced = traced_state(model, "all", True, frozenset[str]().union(*sources.values()))
    states = States(sources, entries, traced.aliases)
    require(traced.tensors, "no client sends a floating-point tensor of the model: pass their states")
    labels = as_classes(labels, batch_size(inputs), "labels")
    examples, further = Labelled(model, inputs, labels, traced, scratch_bytes), dict[str, Tensor]()
    require(reference is not None or not aims, "aims=True needs the model that the clients received: pass reference")
    start = None
    if reference is not None:
        start = States({"reference": as_state(reference, "reference", entries, saved_as)}, entries, traced.aliases)

    def alone(some: Sequence[str]) -> dict[str, Tensor]:
        """What each of some clients gives by itself; of all tensors, clients are the last axis."""
        part = States({f"client {who!r}": sources[f"client {who!r}"] for who in some}, entries, traced.aliases)
        found = {} if exact else {"slopes": _slopes(examples, part, scratch_bytes)}
        if aims and start is not None:
            found |= lessons(_own_models(examples, part, start), examples.counts.tolist())
        return found

    parts = spread(alone, ids)
    each = {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}
    slopes = each.pop("slopes", None)
    changes = _by_fusing(examples, states, p, scratch_bytes) if slopes is None else _first_order(slopes, p)
    by_class = changes / examples.counts[:, None]  # 0 / 0 where there is no example
    values = changes.sum(0) / examples.counts.sum()
    if start is not None:
        names = [name for name, tensor in traced.tensors.items() if isinstance(tensor, nn.Parameter)]
        dots = spread(lambda some: products(states, start, some, scratch_bytes // 4), names)
        further = compare(torch.stack(dots).sum(0), p)
    return Audit(ids, values, by_class, examples.counts, exact, **further, **each)


def _first_order(slopes: Tensor, p: Tensor) -> Tensor:
    """Of each class the change of its summed loss without client k: [C, K], NaN if that is all."""
    return torch.where(p < 1, -p / (1 - p) * (slopes - slopes @ p[:, None]), torch.nan)


def _slopes(examples: Labelled, states: States, scratch_bytes: int) -> Tensor:
    """Of each class the slope of its summed loss towards client k, <W_k - W, dL/dW>: [C, K]."""
    C, K = len(examples.counts), len(states.states)
    origin = States({"the model": states.model}, states.model, states.aliases)
    shares = Shares(states, origin, C, read_at_once=scratch_bytes // 4)
    shares.open(["loss"])
    nbytes = sum(tensor.nbytes for tensor in examples.traced.tensors.values())
    some = max(1, scratch_bytes // 4 // nbytes)  # classes whose gradients are in memory together
    with_examples = torch.nonzero(examples.counts)[:, 0].split(some)
    found = torch.zeros(C, K, dtype=torch.float64)
    for classes in with_examples:
        gradients = [examples.gradients(c) for c in classes.tolist()]
        for name in examples.traced.tensors:
            G = Dense(torch.stack([g[name] for g in gradients]))
            shares.layers["loss"].zero_()
            shares.add(slice(0, len(classes)), 1.0, "loss", {name: G})
            found[classes] += shares.layers["loss"][: len(classes)].cpu()
    return found


def _by_fusing(examples: Labelled, states: States, p: Tensor, scratch_bytes: int) -> Tensor:
    """The same by evaluating the fusion without each client, and that of all."""
    of_all = dict[str, Tensor]()
    for name in states.aliases:
        for k in range(len(p)):
            share = p[k].item() * states.tensors([name], k, k + 1)[0].double()
            of_all[name] = of_all[name] + share if name in of_all else share
    trial = copied(examples.model)

    def losses(k: int | None) -> Tensor:
        with torch.no_grad():
            for name, tensor in trial.state_dict().items():
                if name in of_all:
                    fused = of_all[name]
                    if k is not None:
                        fused = (fused - p[k].item() * states.tensors([name], k, k + 1)[0].double()) / (1 - p[k].item())
                    as_real(tensor).copy_(fused)
        return examples.losses(trial)

    everyone = losses(None)
    return torch.stack([losses(k) - everyone if p[k] < 1 else everyone * torch.nan for k in range(len(p))], 1)


def _own_models(examples: Labelled, states: States, start: States) -> Iterator[Tensor]:
    """Logits of the model that the clients received, then of each one's own (`lessons`)."""
    trial = copied(examples.model)
    entries = trial.state_dict()
    for some in (start, states):
        for k in range(len(some.states)):
            with torch.no_grad():
                for name in some.aliases:
                    as_real(entries[name]).copy_(some.tensors([name], k, k + 1)[0])
            yield examples.logits(trial)
