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

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracefl import classifier
from tracefl.classifier import (
    Batch,
    batch_size,
    copied,
    explained,
    full_precision,
    kept_bytes,
    logits_of,
    of_two_classes,
    output_of,
    take,
)
from tracefl.errors import require
from tracefl.evidence.updates import compare, lessons
from tracefl.provenance.clients import States
from tracefl.provenance.contract import Dense, Shares
from tracefl.provenance.derivative import check_derivative, own_functions, random_step
from tracefl.provenance.layers.batchnorm import WithStatistics
from tracefl.provenance.passes import check_same, graph, true_gradients
from tracefl.provenance.state import TracedState, names_of_adapters, traced_state
from tracefl.provenance.trace import as_classes, normalised
from tracefl.states import Source, as_real, as_state

MOST_INPUTS = 256  # of a batch


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


@classifier.whole_float32()
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

    Returns:
        The values of the clients; see `Audit`.

    Raises:
        TraceFLError: an argument or a state is unusable; the message names client and tensor, or
            the argument, and what to do.

    Example:
        The loss of a model that should say 0 would grow without ann, and fall without bob:

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
    examples = _Examples(model, inputs, labels, traced, scratch_bytes)
    changes = (_by_fusing if exact else _first_order)(examples, states, p, scratch_bytes)
    alone = (1 - p) <= 0
    by_class = torch.where(alone, torch.nan, changes / examples.counts[:, None])  # 0 / 0 where there is no example
    values = torch.where(alone, torch.nan, changes.sum(0) / examples.counts.sum())
    further: dict[str, Tensor] = {}
    require(reference is not None or not aims, "aims=True needs the model that the clients received: pass reference")
    if reference is not None:
        start = States({"reference": as_state(reference, "reference", entries, saved_as)}, entries, traced.aliases)
        parameters = [name for name, tensor in traced.tensors.items() if isinstance(tensor, nn.Parameter)]
        further = compare(states, start, parameters, p, scratch_bytes // 4)
        further |= lessons(_own_models(examples, states, start), examples.counts.tolist()) if aims else {}
    return Audit(ids, values, by_class, examples.counts, exact, **further)


class _Examples:
    """A model's loss over labelled examples, class by class.

    Attributes:
        counts: int64 [C], examples of each class.
    """

    def __init__(self, model: nn.Module, inputs: Batch, labels: Tensor, traced: TracedState, scratch_bytes: int):
        self.model, self.inputs, self.traced, self.checked = model, inputs, traced, False
        with _every_gradient(model, traced):
            one = take(inputs, slice(0, 1))
            alone, nbytes = kept_bytes(model, lambda: output_of(model, one), lambda _: [])
            explained(alone, None, "log_odds")  # refuses probabilities
            check_same(output_of(model, one), alone)
        alone = of_two_classes(alone)
        C, alike = alone.shape[1], not classifier.uses_batch_statistics(model)
        for label in labels[(labels < 0) | (labels >= C)].tolist():
            require(False, f"labels must be 0 to {C - 1}, got {label}: leave such examples out")
        self.at_once = max(1, min(MOST_INPUTS, scratch_bytes // 2 // max(1, nbytes))) if alike else 1
        self.rows = [torch.nonzero(labels == c)[:, 0] for c in range(C)]
        self.counts = torch.tensor([len(rows) for rows in self.rows])

    def losses(self, model: nn.Module) -> Tensor:
        """Of a model of the same kind the sum of the loss over each class, float64 [C]."""
        found = torch.zeros(len(self.rows), dtype=torch.float64)
        with classifier.exact(model), torch.no_grad():
            for c in range(len(self.rows)):
                for rows in self._batches(c):
                    found[c] += self._loss(model, c, rows).double().cpu()
        return _finite(found)

    def logits(self, model: nn.Module) -> Tensor:
        """Of a model of the same kind, class after class, the centred logits: float64 [N, C]."""
        with classifier.exact(model), torch.no_grad():
            some = [rows for c in range(len(self.rows)) for rows in self._batches(c)]
            found = [of_two_classes(logits_of(model, take(self.inputs, rows.tolist()))).double().cpu() for rows in some]
        logits = torch.cat(found)
        return logits - logits.mean(1, keepdim=True)

    def gradients(self, c: int) -> dict[str, Tensor]:
        """dΣL/dW of one class: traced tensor -> its gradient, complex numbers as pairs."""
        total = {name: torch.zeros_like(as_real(w.detach())) for name, w in self.traced.tensors.items()}
        with _every_gradient(self.model, self.traced):
            for rows in self._batches(c):
                loss = self._loss(self.model, c, rows)
                _finite(loss)
                leaves, nodes = graph(loss)
                own = own_functions(nodes)
                found = dict(zip(leaves, true_gradients(loss, list(leaves.values()), nodes), strict=True))
                for name, w in self.traced.tensors.items():
                    if (g := found.get(id(w))) is not None:
                        total[name] += g
                if own and not self.checked:
                    steps, self.checked = random_step(self.traced.tensors), True
                    share = sum(float((as_real(step) * total[name]).sum()) for name, step in steps.items())
                    again = partial(self._loss, self.model, c, rows)
                    check_derivative(own, share, steps, self.traced.tensors, again)
        return total

    def _batches(self, c: int) -> tuple[Tensor, ...]:
        return self.rows[c].split(self.at_once) if len(self.rows[c]) else ()

    def _loss(self, model: nn.Module, c: int, rows: Tensor) -> Tensor:
        logits = logits_of(model, take(self.inputs, rows.tolist()))
        labels = torch.full((len(rows),), c, device=logits.device)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


def _first_order(examples: _Examples, states: States, p: Tensor, scratch_bytes: int) -> Tensor:
    """Of each class the change of its summed loss without client k, to first order: [C, K]."""
    C, K = len(examples.counts), len(p)
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
    return -p / (1 - p) * (found - found @ p[:, None])


def _by_fusing(examples: _Examples, states: States, p: Tensor, scratch_bytes: int) -> Tensor:
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


def _own_models(examples: _Examples, states: States, start: States) -> Iterator[Tensor]:
    """Logits of the model that the clients received, then of each one's own (`lessons`)."""
    trial = copied(examples.model)
    entries = trial.state_dict()
    for some in (start, states):
        for k in range(len(some.states)):
            with torch.no_grad():
                for name in some.aliases:
                    as_real(entries[name]).copy_(some.tensors([name], k, k + 1)[0])
            yield examples.logits(trial)


@contextmanager
def _every_gradient(model: nn.Module, traced: TracedState) -> Iterator[None]:
    """Run a model so that autograd sees every traced tensor, running statistics too."""
    with classifier.exact(model):
        for tensor in traced.tensors.values():
            tensor.requires_grad_(True)
        with WithStatistics():
            yield


def _finite(losses: Tensor) -> Tensor:
    finite = bool(torch.isfinite(losses).all())
    require(finite, "the loss over the labelled examples is not finite: check model, states and inputs")
    return losses
