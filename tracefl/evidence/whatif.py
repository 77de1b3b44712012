"""What would a recorded run's model predict without some of its clients?

The model is that of `without`: fused again from the recorded states, without training.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tracefl.classifier import copied, logits_of
from tracefl.data.examples import Examples
from tracefl.errors import TraceFLError, require
from tracefl.evidence.change import weights_of
from tracefl.evidence.without import known_ids, opened, rounds_of, state_without
from tracefl.models import exchanged_state
from tracefl.provenance.trace import as_classes
from tracefl.runs import Run
from tracefl.states import State
from tracefl.training import Evaluation, evaluate

if TYPE_CHECKING:
    import pandas as pd

SHOWN_CLASSES = 10


@dataclass(frozen=True, repr=False)
class WhatIf:
    """A model and its predictions with and without some clients. N examples, C classes.

    Attributes:
        without: ids of the clients that are left out.
        round: whose model it is.
        since: the first round that is fused without them; `round` itself if only that one is.
        rounds: of those rounds the ones in which they took part.
        class_names: [C] names.
        labels: true classes of the examples, int64 [N].
        before: loss, accuracy and predictions [N] of the recorded model.
        after: the same of the model without the clients.
    """

    without: list[str]
    round: int
    since: int
    rounds: list[int]
    class_names: list[str]
    labels: Tensor
    before: Evaluation
    after: Evaluation

    @property
    def righted(self) -> Tensor:
        """The examples that were predicted wrong and are right without the clients, int64."""
        return (~self._right(self.before) & self._right(self.after)).nonzero()[:, 0]

    @property
    def wronged(self) -> Tensor:
        """The examples that were predicted right and are wrong without the clients, int64."""
        return (self._right(self.before) & ~self._right(self.after)).nonzero()[:, 0]

    @property
    def mispredictions(self) -> int:
        """How many examples the recorded model predicts wrong."""
        return int((~self._right(self.before)).sum())

    @property
    def by_class_before(self) -> Tensor:
        """[C] accuracy of the recorded model; NaN for a class without examples."""
        return self._by_class(self._right(self.before)) / self._examples

    @property
    def by_class_after(self) -> Tensor:
        """[C] accuracy without the clients; NaN for a class without examples."""
        return self._by_class(self._right(self.after)) / self._examples

    def to_frame(self) -> "pd.DataFrame":
        """One row per class.

        Returns:
            Columns class, name, examples, accuracy_before, accuracy_after, righted, wronged.
        """
        import pandas as pd

        flipped = [torch.zeros(len(self.labels), dtype=torch.bool) for _ in range(2)]
        for flags, rows in zip(flipped, (self.righted, self.wronged), strict=True):
            flags[rows] = True
        columns = {
            "class": range(len(self.class_names)), "name": self.class_names, "examples": self._examples.long(),
            "accuracy_before": self.by_class_before, "accuracy_after": self.by_class_after,
            "righted": self._by_class(flipped[0]).long(), "wronged": self._by_class(flipped[1]).long(),
        }  # fmt: skip
        return pd.DataFrame(columns)

    def as_json(self) -> dict[str, Any]:
        """What verdict.json holds of it, strict JSON: a number that is not finite is null."""
        counts = {"examples": len(self.labels), "mispredictions": self.mispredictions}
        counts |= {"righted": len(self.righted), "wronged": len(self.wronged)}
        models = {"before": self.before, "after": self.after}
        scores = {
            f"{name}_{when}": value if math.isfinite(value := getattr(model, name)) else None
            for when, model in models.items()
            for name in ("accuracy", "loss")
        }
        return (
            {"without": self.without, "since": self.since, "round": self.round, "rounds": self.rounds} | scores | counts
        )

    def __repr__(self) -> str:
        loss = f"loss {self.before.loss:.3f} -> {self.after.loss:.3f}"
        pairs = zip(self.class_names, self.by_class_before.tolist(), self.by_class_after.tolist(), strict=True)
        changed = [f"{name} {was:.2f} -> {now:.2f}" for name, was, now in pairs if was == was != now]
        more = [f"and {len(changed) - SHOWN_CLASSES} more"] if len(changed) > SHOWN_CLASSES else []
        classes = f"by class: {', '.join(changed[:SHOWN_CLASSES] + more)}" if changed else "no class changes"
        return "\n".join([*removal_lines(self), f"  {loss}", f"  {classes}"])

    def _right(self, evaluation: Evaluation) -> Tensor:
        return evaluation.predictions == self.labels

    @property
    def _examples(self) -> Tensor:
        return self._by_class(torch.ones_like(self.labels, dtype=torch.bool))

    def _by_class(self, flags: Tensor) -> Tensor:
        """How many of each class, float64 [C]."""
        return torch.bincount(self.labels[flags], minlength=len(self.class_names)).double()


def whatif(
    run: Run | str | Path,
    without: Collection[str | int],
    *,
    round: int | None = None,
    since: int | None = None,
    memory: float = 1.0,
    examples: Examples | None = None,
    model: nn.Module | None = None,
) -> WhatIf:
    """What a model of a recorded run predicts, and what it would without some clients.

    Args:
        run: the run, or its folder.
        without: ids of the clients to leave out.
        round: the round whose model it is; default: the last one.
        since: the first round to fuse without them, which replays the rounds from there on;
            default: only `round` itself.
        memory: share of a change that the next round keeps in a replay, 0 to 1.
        examples: labelled examples; default: the server's.
        model: a model of the run's architecture, which is left as it is; needed by a run that
            cannot build its own. Default: `run.model(round)`.

    Returns:
        Accuracy in all and by class, loss and predictions before and after; see `WhatIf`.

    Raises:
        TraceFLError: an argument or a recorded state is unusable.

    Example:
        Client 1 says the opposite of client 0, with more weight:

        >>> import tempfile, torch
        >>> from tracefl import whatif
        >>> from tracefl.flower import ClientInfo, Evaluation, Examples, Run
        >>> good = {"weight": torch.tensor([[2.0], [-2.0]])}
        >>> bad = {"weight": torch.tensor([[-4.0], [4.0]])}
        >>> ids = [ClientInfo("0", {0: 1}), ClientInfo("1", {0: 2})]
        >>> run = Run.create(tempfile.mkdtemp(), initial=good, clients=ids, seed=0)
        >>> parts = [run.record_client(1, "0", good, 1, 1 / 3)]
        >>> parts += [run.record_client(1, "1", bad, 2, 2 / 3)]
        >>> mean = {"weight": torch.tensor([[-2.0], [2.0]])}
        >>> run.record_round(1, parts, mean, Evaluation(4.0, 0.0, torch.tensor([1, 0])), {})
        >>> examples = Examples(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]))
        >>> found = whatif(run, [1], examples=examples, model=torch.nn.Linear(1, 2, bias=False))
        >>> found.before.accuracy, found.after.accuracy, found.righted.tolist()
        (0.0, 1.0, [0, 1])
    """
    run = opened(run)
    number, first = rounds_of(run, round, since)
    left_out = known_ids(run, without)
    examples = run.server_examples() if examples is None else examples
    kind = type(examples).__name__
    require(isinstance(examples, Examples), f"examples must be Examples(inputs, labels), got a {kind}")
    require(len(examples) > 0, "examples must be at least one, got none: pass labelled examples")
    model = run.model(number) if model is None else copied(model)
    _load(model, run.global_state(number))
    C = _classes(model, examples)
    labels, before = examples.labels.cpu(), evaluate(model, examples)
    _load(model, state_without(run, left_out, round=number, since=first, memory=memory))
    after = evaluate(model, examples)
    rounds = [t.number for t in run.rounds[first - 1 : number] if any(weights_of(t, left_out))]
    return WhatIf(left_out, number, first, rounds, _class_names(run, C), labels, before, after)


def removal_lines(found: WhatIf) -> Iterator[str]:
    """What removing the clients would give, in one line for a run's end.

    Example:
        >>> labels, wrong, right = torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([0, 1])
        >>> before, after = Evaluation(1.0, 0.5, wrong), Evaluation(0.1, 1.0, right)
        >>> found = WhatIf(["3"], 5, 1, [2, 4], ["0", "1"], labels, before, after)
        >>> for part in next(removal_lines(found)).split("; "):
        ...     print(part)
        Without c3 in rounds 1 to 5: accuracy 0.50 -> 1.00
        1 of 1 mispredictions become right, 0 right ones wrong
    """
    who = ", ".join(f"c{client}" for client in found.without)
    when = f"round {found.round}" if found.since == found.round else f"rounds {found.since} to {found.round}"
    if not found.rounds:
        took = "takes" if len(found.without) == 1 else "take"
        yield f"Without {who} in {when}: nothing changes, {who} {took} no part there"
        return
    accuracy = f"accuracy {found.before.accuracy:.2f} -> {found.after.accuracy:.2f}"
    righted = f"{len(found.righted)} of {found.mispredictions} mispredictions become right"
    yield f"Without {who} in {when}: {accuracy}; {righted}, {len(found.wronged)} right ones wrong"


def _load(model: nn.Module, state: State) -> None:
    """Copy a recorded global state into a model of the run's architecture."""
    entries, remedy = model.state_dict(), "pass the model that was trained"
    lacking, extra = sorted(exchanged_state(model).keys() - state.keys()), sorted(state.keys() - entries.keys())
    require(not lacking, f"model has {lacking[:1]}, which the run's global model lacks: {remedy}")
    require(not extra, f"model lacks {extra[:1]} of the run's global model: {remedy}")
    for name in state:
        ours, theirs = tuple(entries[name].shape), tuple(state[name].shape)
        require(ours == theirs, f"model's {name!r} is {ours}, the run's global model's {theirs}: {remedy}")
    model.load_state_dict(dict(state), strict=False)


def _classes(model: nn.Module, examples: Examples) -> int:
    """C of the model, to which the labels must belong."""
    as_classes(examples.labels, len(examples), "labels")
    one = examples[torch.tensor([0])].to(next(model.parameters()).device)
    with torch.no_grad():
        C = logits_of(model.eval(), one.inputs).shape[1]
    for label in examples.labels[(examples.labels < 0) | (examples.labels >= C)].tolist():
        require(False, f"labels must be 0 to {C - 1}, got {label}: leave such examples out")
    return C


def _class_names(run: Run, C: int) -> list[str]:
    """The run's, where it has recorded C of them; otherwise numbers."""
    with suppress(TraceFLError):
        if len(names := run["class_names"]) == C:
            return [str(name) for name in names]
    return [str(label) for label in range(C)]
