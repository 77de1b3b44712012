"""The recorder: wraps any Flower strategy from outside and records its rounds into a run.

It draws the participants by client id, names clients by what the server knows of a node, checks
every update before it counts, and records it as received. Of the inner strategy it records the
model that it releases, the weights p_k with which it took the updates, and the moments that it
keeps from round to round.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Bulyan, FedMedian, FedTrimmedAvg, Result, Strategy
from torch import Tensor

from tracefl.errors import TraceFLError
from tracefl.federation.aggregation import Aggregated, Messages, Wrapper
from tracefl.federation.grid import GridView
from tracefl.runs import Participant, Run, client_file
from tracefl.states import State
from tracefl.training import Evaluation

EQUAL_WEIGHTS = (FedMedian, FedTrimmedAvg, Bulyan)  # every update that they use counts the same


class Recorder(Wrapper):
    """Any Flower strategy, recorded into a run.

    Args:
        strategy: the strategy that aggregates; every node that it is shown must take part, as with
            `FedAvg(min_train_nodes=clients_per_round, min_available_nodes=clients_per_round)`.
        run: the run that rounds are added to; those that it holds are not run again.
        nodes: Flower's node id -> client id, for every client (`identify_nodes`).
        clients_per_round: participants drawn for a round, at most `len(nodes)`.
        seed: of the draw; the participants of round t depend only on (seed, t).
        evaluate: called with the state dict of every released model; returns its evaluation on the
            server's data.
        accept_failures: record why a client failed and go on without it, instead of stopping the
            run.
        on_client: called with (round, client id, metrics) after every accepted update.
        on_round: called with the run after every complete round.

    Example:
        In a ServerApp's main function::

            nodes = identify_nodes(grid, num_clients=4)
            run = Run.create("logs/mine", initial=model.state_dict(), clients=clients, seed=0)
            recorder = Recorder(
                FedAvg(...), run, nodes, clients_per_round=4, seed=0, evaluate=score
            )
            recorder.start(grid, ArrayRecord(model.state_dict()), num_rounds=3)
    """

    def __init__(
        self,
        strategy: Strategy,
        run: Run,
        nodes: Mapping[int, str],
        *,
        clients_per_round: int,
        seed: int,
        evaluate: Callable[[State], Evaluation],
        accept_failures: bool = False,
        on_client: Callable[[int, str, Mapping[str, Any]], None] = lambda *_: None,
        on_round: Callable[[Run], None] = lambda _: None,
    ) -> None:
        self.strategy, self.run, self.nodes = strategy, run, dict(nodes)
        self.clients_per_round, self.seed, self.evaluate = clients_per_round, seed, evaluate
        self.accept_failures, self.on_client, self.on_round = accept_failures, on_client, on_round
        self._offset = len(run.rounds)  # Flower counts rounds from 1 in every process
        self._expected: dict[str, Tensor] = {}
        self._waiting: set[str] = set()
        self._accepted: dict[str, tuple[Message, Participant]] = {}
        self._failures: dict[str, str] = {}
        self._used: dict[int, float] = {}  # id() of a content -> its weight
        self._watch_weights(_innermost(strategy))
        load_optimizer_state(strategy, run.strategy_state(self._offset))

    def _watch_weights(self, inner: Any) -> None:
        """Learn which replies the strategy uses, and how it weighs them, as it averages metrics."""
        average = inner.train_metrics_aggr_fn

        def watched(contents: list[RecordDict], weight_key: str) -> MetricRecord:
            n_k = [float(next(iter(content.metric_records.values()))[weight_key]) for content in contents]  # type: ignore[arg-type]
            equal = isinstance(inner, EQUAL_WEIGHTS)
            self._used = {id(content): 1.0 if equal else n for content, n in zip(contents, n_k, strict=True)}
            return average(contents, weight_key)

        inner.train_metrics_aggr_fn = watched

    def start(self, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int = 3, *args: Any, **kwargs: Any) -> Result:
        """Run rounds until the run holds `num_rounds`.

        Args:
            grid: Flower's.
            initial_arrays: the model that the next round starts from.
            num_rounds: how many rounds the run holds in the end.
            *args: as of Flower's `Strategy.start`.
            **kwargs: as of Flower's, such as timeout (seconds per round) and train_config.

        Raises:
            TraceFLError: a client failed (unless `accept_failures`), or the released model is
                broken. The rounds before are kept.
        """
        watched = cast(Grid, GridView(grid, on_reply=self._receive))
        return super().start(watched, initial_arrays, max(num_rounds - self._offset, 0), *args, **kwargs)

    def participants(self, number: int) -> list[str]:
        """The clients of round `number`, in the order of the run's clients."""
        ids = sorted(self.nodes.values(), key=_natural)
        drawn = np.random.default_rng([self.seed, number]).choice(len(ids), self.clients_per_round, replace=False)
        return [ids[index] for index in sorted(drawn)]

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Messages:
        """The inner strategy's messages, to this round's participants."""
        number = server_round + self._offset
        chosen = self.participants(number)
        self._expected = dict(arrays.to_torch_state_dict())
        self._waiting, self._accepted, self._failures = set(chosen), {}, {}
        node_of = {client: node for node, client in self.nodes.items()}
        only = cast(Grid, GridView(grid, nodes=[node_of[client] for client in chosen]))
        messages = self.strategy.configure_train(number, arrays, config, only)
        return sorted(messages, key=lambda message: _natural(self.nodes[message.metadata.dst_node_id]))

    def aggregate_train(self, server_round: int, replies: Messages) -> Aggregated:
        """Check and record the updates, aggregate them, and record the released model."""
        number = server_round + self._offset
        for reply in replies:
            if self.nodes[reply.metadata.src_node_id] in self._waiting:
                self._receive(reply, number)
        for client in sorted(self._waiting, key=_natural):
            self._fail(number, client, "it sent no reply in time (round_timeout)")
        accepted = [self._accepted[client] for client in sorted(self._accepted, key=_natural)]
        if not accepted:
            client, reason = min(self._failures.items(), key=lambda failure: _natural(failure[0]))
            raise TraceFLError(f"round {number}: every client failed; the first said: client {client}: {reason}.")
        arrays, metrics = self.strategy.aggregate_train(number, [reply for reply, _ in accepted])
        if arrays is None:
            raise TraceFLError(f"round {number}: the strategy released no model from {len(accepted)} updates")
        released = {name: value.to(self._expected[name].dtype) for name, value in arrays.to_torch_state_dict().items()}
        if broken := [name for name, value in released.items() if not torch.isfinite(value).all()]:
            raise TraceFLError(f"round {number}: the released model has non-finite values in '{broken[0]}'.")
        evaluation = self.evaluate(released)
        self.run.record_round(
            number,
            self._weighted(accepted),
            released,
            evaluation.predictions,
            evaluation.loss,
            evaluation.accuracy,
            self._failures,
            optimizer_state(self.strategy),
        )
        self.on_round(self.run)
        return ArrayRecord(released), metrics

    def _receive(self, reply: Message, number: int | None = None) -> None:
        """Check one reply and record it.

        Its client is the one that the server knows for its node.
        """
        number = len(self.run.rounds) + 1 if number is None else number
        client = self.nodes[reply.metadata.src_node_id]
        self._waiting.discard(client)
        if complaint := _complaint(reply, self._expected):
            self._fail(number, client, complaint)
            return
        (arrays,), (metrics,) = reply.content.array_records.values(), reply.content.metric_records.values()
        sha256 = self.run.record_client(number, client, arrays.to_torch_state_dict())
        examples = int(metrics["num-examples"])  # type: ignore[arg-type]
        self._accepted[client] = reply, Participant(client, examples, 0.0, client_file(client), sha256)
        self.on_client(number, client, metrics)

    def _fail(self, number: int, client: str, reason: str) -> None:
        if not self.accept_failures:
            raise TraceFLError(
                f"round {number}, client {client}: {reason}. Rounds 1 to {number - 1} are kept; the same command "
                "goes on from there, accept_failures=true goes on without such a client."
            )
        self._waiting.discard(client)
        self._failures[client] = reason

    def _weighted(self, accepted: list[tuple[Message, Participant]]) -> list[Participant]:
        """The participants with the p_k that the strategy has just used."""
        weights = [(participant, self._used.get(id(reply.content), 0.0)) for reply, participant in accepted]
        total = sum(weight for _, weight in weights)
        return [replace(participant, weight=weight / total) for participant, weight in weights]


def _complaint(reply: Message, expected: State) -> str | None:
    """What is wrong with a reply.

    Its model must have the keys, shapes and types of the one sent.
    """
    if reply.has_error():
        verb = "it raised" if reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION else "its process died"
        return f"{verb}: {_last_line(reply.error.reason or 'no reason given')}"
    models, metrics = list(reply.content.array_records.values()), list(reply.content.metric_records.values())
    if len(models) != 1 or len(metrics) != 1:
        return f"it must send one model and one metric record, got {len(models)} and {len(metrics)}"
    count = metrics[0].get("num-examples")
    if not isinstance(count, (int, float)) or not 1 <= count < float("inf"):
        return f"its num-examples must be a number of at least 1, got {count}"
    state = models[0].to_torch_state_dict()
    if odd := sorted(state.keys() ^ expected.keys()):
        return f"its model has {'extra' if odd[0] in state else 'missing'} entry '{odd[0]}'"
    for name, value in state.items():
        if value.shape != expected[name].shape or value.dtype != expected[name].dtype:
            wanted, sent = ((tuple(t.shape), str(t.dtype)) for t in (expected[name], value))
            return f"its '{name}' must be {wanted}, got {sent}"
        if not torch.isfinite(value).all():
            return f"its '{name}' has non-finite values"
    return None


def _innermost(wrapped: Strategy) -> Strategy:
    """The strategy that aggregates, inside of its wrappers."""
    while (inner := getattr(wrapped, "strategy", None)) is not None:
        wrapped = inner
    return wrapped


def optimizer_state(wrapped: Strategy) -> dict[str, Tensor]:
    """Moments that a server optimizer keeps from round to round, by name; otherwise empty."""
    inner, state = _innermost(wrapped), dict[str, Tensor]()
    for moment in ("m_t", "v_t", "momentum_vector"):
        values = getattr(inner, moment, None) or {}
        named = values.items() if isinstance(values, dict) else enumerate(values)
        state |= {f"{moment}/{name}": torch.from_numpy(np.array(value)) for name, value in named}
    return state


def load_optimizer_state(wrapped: Strategy, state: Mapping[str, Tensor]) -> None:
    """Give a strategy what `optimizer_state` read from it."""
    inner, moments = _innermost(wrapped), dict[str, dict[str, np.ndarray]]()
    for name, value in state.items():
        moment, key = name.split("/", 1)
        moments.setdefault(moment, {})[key] = value.numpy()
    for moment, values in moments.items():
        kept = [values[str(index)] for index in range(len(values))] if moment == "momentum_vector" else values
        setattr(inner, moment, kept)


def _natural(client: str) -> tuple[int, str]:
    """Order of client ids: numbers by value, before names."""
    return (int(client), "") if client.isdecimal() else (2**63, client)


def _last_line(reason: str) -> str:
    lines = [line.strip() for line in reason.strip().strip("'>").splitlines() if line.strip()]
    return lines[-1]
