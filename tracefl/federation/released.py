"""Whether a released model can be computed with, and whose update made it one that cannot.

    d_k = |W_k - W_in|

The update of client k stands apart if d_k is a hundred times the (lower) median of all d; only then
is a client named. Where none stands apart, training itself diverges.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from tracefl.errors import require
from tracefl.federation.memory import MOMENTS
from tracefl.record import Round
from tracefl.runs import Run
from tracefl.states import State, is_continuous, is_finite
from tracefl.training import Evaluation

APART = 100.0


@dataclass(frozen=True)
class Problem:
    """What is wrong with a model, in words that go on `whose`; in which entry, what raised it."""

    text: str
    entry: str | None = None
    whose: str = "the released model"
    cause: Exception | None = None


@dataclass(frozen=True)
class Apart:
    """A client whose update stands apart: its d_k, and the largest of the others."""

    client: str
    distance: float
    others: float | None

    def __str__(self) -> str:
        others = "the only one" if self.others is None else f"the others at most {self.others:.2g}"
        return f"it is {self.distance:.2g} from the model that was sent, {others}"


def unusable(model: State, sent: State) -> Problem | None:
    """What is wrong with a model's values: they are not finite, or too large to compute with.

    A number is too large if its square overflows, as a layer's variance or a step of training
    would. An entry that was so large in the model that was sent stays as it is.

    Example:
        >>> sent = {"w": torch.zeros(2)}
        >>> unusable({"w": torch.ones(2)}, sent)
        >>> unusable({"w": torch.tensor([1.0, 1e30])}, sent).text
        "has values up to 1e+30 in 'w', whose squares overflow"
    """
    if (problem := not_finite(model)) is not None:
        return problem
    for name, value in model.items():
        limit = _limit(value)
        if limit is None or (most := _largest(value)) <= limit:
            continue
        if name not in sent or _largest(sent[name]) <= limit:
            return Problem(f"has values up to {most:.0e} in '{name}', whose squares overflow", name)
    return None


def not_finite(model: State) -> Problem | None:
    """The first entry that has values that are not finite."""
    name = next((name for name, value in model.items() if not is_finite(value)), None)
    return None if name is None else Problem(f"has non-finite values in '{name}'", name)


def grown(model: State, sent: State) -> Problem | None:
    """The first entry whose values are a hundred times what any was in the model that was sent.

    Values below 1 count as 1. That may be right; it is a reason to see whose update stands apart.

    Example:
        >>> sent = {"w": torch.tensor([3.0])}
        >>> grown({"w": torch.tensor([299.0])}, sent)
        >>> grown({"w": torch.tensor([-2e14])}, sent).text
        "has values up to 2e+14 in 'w'"
    """
    for name, value in model.items():
        if name in sent and is_continuous(value) and (most := _largest(value)) > APART * max(1, _largest(sent[name])):
            return Problem(f"has values up to {most:.0e} in '{name}'", name)
    return None


def spoilt(kept: State) -> Problem | None:
    """What is wrong with a strategy's moments: if they are not finite, later rounds stand still."""
    for name, value in kept.items():
        if name.partition("/")[0] in (*MOMENTS, "clipping_norm") and not is_finite(value):
            return Problem(f"has non-finite values in '{name}'", whose="what the strategy keeps")
    return None


def failing(evaluation: Evaluation | Round) -> Problem | None:
    """What is wrong with how a model does: loss, accuracy or predictions are not finite."""
    for name, told in (("loss", "a loss"), ("accuracy", "an accuracy")):
        found = getattr(evaluation, name)
        if found is not None and not math.isfinite(found):
            return Problem(f"has {told} of {found} on the server's examples")
    if isinstance(evaluation, Evaluation) and not is_finite(torch.as_tensor(evaluation.predictions)):
        return Problem("has predictions that are not finite on the server's examples")
    return None


def apart(updates: Mapping[str, State], sent: State, entry: str | None = None) -> Apart | None:
    """The client whose update stands apart from the others; None if none does.

    Args:
        updates: client -> W_k.
        sent: W_in.
        entry: the only one to compare; None: all of real numbers.

    Example:
        >>> sent = {"w": torch.zeros(2)}
        >>> updates = {"a": {"w": torch.ones(2)}, "b": {"w": torch.full((2,), 1e30)}}
        >>> str(apart(updates, sent))
        'it is 1.4e+30 from the model that was sent, the others at most 1.4'
    """
    names = [entry] if entry is not None else [name for name, value in sent.items() if is_continuous(value)]
    d = {client: _distance(state, sent, names) for client, state in updates.items()}
    if not d:
        return None
    furthest = max(d, key=lambda client: d[client])
    others = sorted(distance for client, distance in d.items() if client != furthest)
    median = sorted(d.values())[(len(d) - 1) // 2]
    if others and not d[furthest] > APART * median:
        return None
    return Apart(furthest, d[furthest], others[-1] if others else None)


def apart_in(run: Run, number: int, entry: str | None = None) -> Apart | None:
    """The same for a recorded round, where its clients' states are kept."""
    record = run.round(number) if number else None
    if record is None or not record.kept:
        return None
    states = {client.id: record.client_state(client.id) for client in record.clients}
    return apart(states, run.global_state(number - 1), entry)


def fused(arrays: ArrayRecord, sent: State, where: str) -> dict[str, Tensor]:
    """What a strategy released, in the types of the model: whole numbers are rounded.

    Raises:
        TraceFLError: an entry has another shape than in the model that was sent.
    """
    released = dict(arrays.to_torch_state_dict())
    for name, value in released.items():
        if (was := sent.get(name)) is not None:
            shapes = f"must have the shape {tuple(was.shape)} of the model sent, got {tuple(value.shape)}"
            require(value.shape == was.shape, f"{where}: the released '{name}' {shapes}")
            whole = value.is_floating_point() and not was.is_floating_point()
            released[name] = (value.round() if whole else value).to(was.dtype)
    return released


def _distance(state: State, sent: State, names: list[str]) -> float:
    """|W_k - W_in| over these entries, in double precision."""
    squares = 0.0
    for name in names:
        if name in state:
            kind = torch.complex128 if sent[name].is_complex() else torch.float64
            squares += float(torch.linalg.vector_norm(state[name].to(kind) - sent[name].to(kind))) ** 2
    return math.inf if math.isnan(squares) else math.sqrt(squares)


def _limit(value: Tensor) -> float | None:
    """The largest number whose square is one of the type; None where none is asked for.

    Half precision is left out: it is what is sent, not what is computed with.
    """
    if not is_continuous(value) or value.dtype.itemsize < 4:
        return None
    return math.sqrt(torch.finfo(value.dtype).max)


def _largest(value: Tensor) -> float:
    if not value.numel():
        return 0.0
    if value.is_complex():
        return float(value.abs().max())
    least, most = value.aminmax()  # without a copy of the absolute values
    return max(-float(least), float(most))
