"""The part of a strategy's loop in which models are evaluated, by clients and by the app itself."""

import logging
from collections.abc import Callable
from time import monotonic
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from tracefl.errors import as_sentence, require
from tracefl.federation.alike import unlike
from tracefl.federation.loop import Loop
from tracefl.federation.memory import innermost
from tracefl.federation.privacy import Messages
from tracefl.federation.replies import BadReplyError, Update, as_line, read_evaluation

log = logging.getLogger("tracefl")


class Evaluations(Loop):
    """What `Rounds` makes of evaluations: recorded ones are not asked for again."""

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
        replies = self._usable(list(replies))
        name = type(innermost(self.strategy)).__name__
        problem = f"round {self.index}: {name} cannot aggregate the metrics of {len(replies)} evaluations"
        with as_sentence(problem, "let clients send what it expects", Exception):
            found = self._own["aggregate_evaluate"](server_round, replies)
        if found is not None or replies:
            self.run.record_metrics(self.index, "evaluate", found)
        return found

    def _usable(self, replies: list[Message]) -> list[Message]:
        """The evaluations that can be averaged, and errors; any other is its client's failure."""
        key, sent, found = self._weight_key() if self._flowers() else None, dict[str, Message](), dict[str, Update]()
        errors = []
        for reply in replies:
            asked = self._view.asked.get(reply.metadata.reply_to_message_id, reply.metadata)
            client = self.nodes.clients.get(asked.dst_node_id, f"at node {asked.dst_node_id}")
            if reply.has_error():
                why = as_line(reply.error.reason)
                log.warning("round %d: client %s did not evaluate the model: %s", self.index, client, why)
                errors.append(reply)
                continue
            try:
                found[client] = read_evaluation(reply, key)
                sent[client] = reply
            except BadReplyError as problem:
                self._leave_out_evaluation(client, str(problem))
        for client, why in unlike(found, everything=True).items() if key else ():
            self._leave_out_evaluation(client, why)
            del sent[client]
        return [*sent.values(), *errors]

    def _leave_out_evaluation(self, client: str, why: str) -> None:
        told = f"round {self.index}, client {client}: evaluating, {why}"
        require(self.options.accept_failures, f"{told}: accept_failures=true goes on without it.")
        log.warning("%s: it is left out", told)

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
