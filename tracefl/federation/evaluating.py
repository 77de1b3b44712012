"""The part of a strategy's loop in which models are evaluated, by clients and by the app itself."""

from collections.abc import Callable
from time import monotonic
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from tracefl.errors import as_sentence
from tracefl.federation.memory import innermost
from tracefl.federation.privacy import Messages
from tracefl.runs import Run


class Evaluations:
    """What `Rounds` makes of evaluations: recorded ones are not asked for again."""

    strategy: Strategy
    run: Run
    index: int
    _own: dict[str, Callable[..., Any]]
    _sampling_since: float | None

    def _note_changes(self) -> None:
        raise NotImplementedError

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Messages:
        """The strategy's messages; none if the clients' evaluation is recorded."""
        if self._evaluated():
            return []
        self._sampling_since = monotonic()
        messages = self._own["configure_evaluate"](server_round, arrays, config, grid)
        self._sampling_since = None
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Messages) -> MetricRecord | None:
        """The strategy's metrics, which are recorded; those recorded if there are."""
        if self._evaluated():
            metrics = self.run.round(self.index).metrics.get("evaluate")
            return None if metrics is None else MetricRecord(metrics)
        replies = list(replies)
        name = type(innermost(self.strategy)).__name__
        problem = f"round {self.index}: {name} cannot aggregate the metrics of {len(replies)} evaluations"
        with as_sentence(problem, "let clients send what it expects", Exception):
            found = self._own["aggregate_evaluate"](server_round, replies)
        if found is not None or replies:
            self.run.record_metrics(self.index, "evaluate", found)
        return found

    def _evaluated(self) -> bool:
        """Whether nobody is to evaluate: that is recorded, or a later round is."""
        known = self.index == len(self.run.rounds) > 0 and "evaluate" in self.run.round(self.index).metrics
        return known or self.index < len(self.run.rounds)

    def watched_evaluate_fn(self, evaluate_fn: Callable[..., MetricRecord | None]) -> Callable[..., Any]:
        """The app's evaluate_fn, its metrics recorded; those recorded of a round that has them."""

        def watched(*args: Any, **kwargs: Any) -> MetricRecord | None:
            server_round = args[0] if args else kwargs.get("server_round", -1)
            if not 0 <= server_round <= len(self.run.rounds):
                return evaluate_fn(*args, **kwargs)
            known = self.run.metrics(server_round)
            if "server" in known:
                return None if known["server"] is None else MetricRecord(known["server"])
            found = evaluate_fn(*args, **kwargs)
            self._note_changes()
            self.run.record_metrics(server_round, "server", found)
            return found

        return watched
