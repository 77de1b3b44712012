"""A model's loss, its gradients and its logits over labelled examples, class by class."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracefl import classifier
from tracefl.classifier import Batch, explained, kept_bytes, logits_of, of_two_classes, output_of, take
from tracefl.errors import require
from tracefl.provenance.derivative import check_derivative, own_functions, random_step
from tracefl.provenance.layers.batchnorm import WithStatistics
from tracefl.provenance.passes import check_same, graph, true_gradients
from tracefl.provenance.state import TracedState
from tracefl.states import as_real

MOST_INPUTS = 256  # of a batch


class Labelled:
    """A model's loss over labelled examples, class by class.

    Attributes:
        counts: int64 [C], examples of each class.
    """

    def __init__(self, model: nn.Module, inputs: Batch, labels: Tensor, traced: TracedState, scratch_bytes: int):
        self.model, self.inputs, self.traced, self.checked = model, inputs, traced, False
        with every_gradient(model, traced):
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
        with every_gradient(self.model, self.traced):
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


@contextmanager
def every_gradient(model: nn.Module, traced: TracedState) -> Iterator[None]:
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
