"""The recorder: wraps any Flower strategy from outside and records its rounds into a run.

It draws the participants by client id, names clients by what the server knows of a node, checks
every update before it counts, and records it as received. Of the inner strategy it records the
model that it releases, the weights p_k with which it took the updates, and the moments that it
keeps from round to round.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Bulyan, FedMedian, FedTrimmedAvg, Result, Strategy
from torch import Tensor

from tracefl.errors import TraceFLError, as_sentence, require
from tracefl.federation.aggregation import Aggregated, Messages, Wrapper
from tracefl.federation.grid import GridView
from tracefl.runs import Participant, Run
from tracefl.states import State
from tracefl.training import Evaluation

EQUAL_WEIGHTS = (FedMedian, FedTrimmedAvg, Bulyan)  # every update that they use counts the same
MOMENTS = ("m_t", "v_t", "momentum_vector")  # by name, by name, a list


@dataclass(eq=False, repr=False)
class Recorder(Wrapper):
    """Any Flower strategy, recorded into a run.

    Args:
        strategy: the strategy that aggregates; every node that it is shown must take part, as with
            `FedAvg(min_train_nodes=clients_per_round, min_available_nodes=clients_per_round)`.
        run: the run that rounds are added to; those that it holds are not run again.
        nodes: Flower's node id -> client id, for every client (`identify_nodes`).
        clients_per_round: participants drawn for a round, at most as many as are not excluded.
        seed: of the draw; the participants of round t depend only on (seed, t).
        evaluate: called with the state dict of every released model; returns its evaluation on the
            server's data.
        accept_failures: record why a client failed and go on without it, instead of stopping the
            run.
        excluded: ids of clients that never take part. Another is drawn in the place of one; the
            others take part in the same rounds as without it.
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

    strategy: Strategy
    run: Run
    nodes: Mapping[int, str]
    _: KW_ONLY
    clients_per_round: int
    seed: int
    evaluate: Callable[[State], Evaluation]
    accept_failures: bool = False
    excluded: Collection[str] = ()
    on_client: Callable[[int, str, Mapping[str, Any]], None] = lambda *_: None
    on_round: Callable[[Run], None] = lambda _: None

    def __post_init__(self) -> None:
        self._used: dict[int, float] = {}  # id() of a content -> its weight
        self._watch_weights(_innermost(self.strategy))
        load_optimizer_state(self.strategy, self.run.strategy_state(len(self.run.rounds)))

    @property
    def _number(self) -> int:
        """Of the round in progress. Flower counts rounds from 1 in every process."""
        return len(self.run.rounds) + 1

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
        return super().start(watched, initial_arrays, max(num_rounds - len(self.run.rounds), 0), *args, **kwargs)

    def participants(self, number: int) -> list[str]:
        """The clients of round `number`, in the order of the run's clients."""
        ids = sorted(self.nodes.values(), key=lambda client: (len(client), client))  # numbers by value
        rng, count = np.random.default_rng([self.seed, number]), self.clients_per_round
        drawn = [index for index in rng.choice(len(ids), count, replace=False) if ids[index] not in self.excluded]
        if count > len(drawn):
            others = [k for k, who in enumerate(ids) if k not in drawn and who not in self.excluded]
            drawn += rng.choice(others, count - len(drawn), replace=False).tolist()
        return [ids[index] for index in sorted(drawn)]

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Messages:
        """The inner strategy's messages, to this round's participants."""
        self._chosen = self.participants(self._number)
        self._accepted: dict[str, tuple[Message, Participant]] = {}
        self._failures: dict[str, str] = {}  # client -> why
        self._expected: dict[str, Tensor] = dict(arrays.to_torch_state_dict())
        node_of = {client: node for node, client in self.nodes.items()}
        only = cast(Grid, GridView(grid, nodes=[node_of[client] for client in self._chosen]))
        messages = self.strategy.configure_train(self._number, arrays, config, only)
        return sorted(messages, key=lambda message: self._chosen.index(self.nodes[message.metadata.dst_node_id]))

    def aggregate_train(self, server_round: int, replies: Messages) -> Aggregated:
        """Aggregate the updates that `start` has accepted, and record the released model."""
        number = self._number
        for client in self._chosen:
            if client not in self._accepted and client not in self._failures:
                self._fail(client, "it sent no reply in time (round_timeout)")
        self._check_same_entries()
        accepted = [self._accepted[client] for client in self._chosen if client in self._accepted]
        first = self._chosen[0]
        everyone_failed = f"every client failed; the first said: client {first}: {self._failures.get(first)}."
        require(accepted, f"round {number}: {everyone_failed}")
        problem = f"round {number}: {type(_innermost(self.strategy)).__name__} cannot aggregate {len(accepted)} updates"
        with as_sentence(problem, "correct the strategy, or let clients send what it expects", Exception):
            arrays, metrics = self.strategy.aggregate_train(number, [reply for reply, _ in accepted])
        if arrays is None:
            raise TraceFLError(f"round {number}: the strategy released no model from {len(accepted)} updates")
        fused = {name: value.to(self._expected[name].dtype) for name, value in arrays.to_torch_state_dict().items()}
        released = {**self._expected, **fused}  # what no client sends is as it was
        for name, value in released.items():
            finite = bool(torch.isfinite(value).all())
            require(finite, f"round {number}: the released model has non-finite values in '{name}'.")
        used = [(participant, self._used.get(id(reply.content), 0.0)) for reply, participant in accepted]
        total = sum(weight for _, weight in used)
        participants = [replace(participant, weight=weight / total) for participant, weight in used]  # p_k
        moments = optimizer_state(self.strategy)
        self.run.record_round(number, participants, released, self.evaluate(released), self._failures, moments)
        self.on_round(self.run)
        return ArrayRecord(released), metrics

    def _receive(self, reply: Message) -> None:
        """Check one reply and record it.

        Its client is the one that the server knows for its node.
        """
        client = self.nodes[reply.metadata.src_node_id]
        if complaint := _complaint(reply, self._expected):
            self._fail(client, complaint)
            return
        (arrays,), (metrics,) = reply.content.array_records.values(), reply.content.metric_records.values()
        examples = int(metrics["num-examples"])  # type: ignore[arg-type]
        participant = self.run.record_client(self._number, client, arrays.to_torch_state_dict(), examples)
        self._accepted[client] = reply, participant
        self.on_client(self._number, client, metrics)

    def _check_same_entries(self) -> None:
        """Clients may send part of the model, but all the same: that of most, or the larger."""
        accepted = {client: self._accepted[client][0].content for client in self._chosen if client in self._accepted}
        names = {client: frozenset(next(iter(content.array_records.values()))) for client, content in accepted.items()}
        parts = Counter(names.values())
        usual = max(parts, key=lambda part: (parts[part], len(part)), default=frozenset[str]())
        for client, sent in names.items():
            if odd := sorted(sent ^ usual):
                verb = "lacks" if odd[0] in usual else "has"
                self._fail(client, f"its model {verb} '{odd[0]}', unlike those of most clients")
                del self._accepted[client]

    def _fail(self, client: str, reason: str) -> None:
        kept = f"Rounds 1 to {len(self.run.rounds)} are kept; the same command goes on from there"
        others_can = self._accepted or self.run.rounds
        tolerate = ", accept_failures=true goes on without such a client" if others_can else ""
        require(self.accept_failures, f"round {self._number}, client {client}: {reason}. {kept}{tolerate}.")
        self._failures[client] = reason


def _complaint(reply: Message, expected: State) -> str | None:
    """What is wrong with a reply.

    Its model must have entries of the one sent, of the same shapes and types.
    """
    if reply.has_error():
        verb = "it raised" if reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION else "its process died"
        lines = (reply.error.reason or "no reason given").strip("'> \n").splitlines()
        return f"{verb}: {lines[-1].strip()}"
    models, metrics = list(reply.content.array_records.values()), list(reply.content.metric_records.values())
    if len(models) != 1 or len(metrics) != 1:
        return f"it must send one model and one metric record, got {len(models)} and {len(metrics)}"
    count = metrics[0].get("num-examples")
    if not isinstance(count, (int, float)) or not 1 <= count < float("inf"):
        return f"its num-examples must be a number of at least 1, got {count}"
    state = models[0].to_torch_state_dict()
    if extra := sorted(state.keys() - expected.keys()):
        return f"its model has extra entry '{extra[0]}'"
    if not state:
        return "its model has no entry"
    for name, value in state.items():
        wanted, sent = ((tuple(t.shape), str(t.dtype)) for t in (expected[name], value))
        if sent != wanted:
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
    for moment in MOMENTS:
        values = getattr(inner, moment, None) or {}
        named = values.items() if isinstance(values, dict) else enumerate(values)
        state |= {f"{moment}/{name}": torch.from_numpy(np.array(value)) for name, value in named}
    return state


def load_optimizer_state(wrapped: Strategy, state: Mapping[str, Tensor]) -> None:
    """Give a strategy what `optimizer_state` read from it."""
    for moment in MOMENTS:
        kept = {name.split("/", 1)[1]: state[name].numpy() for name in state if name.startswith(f"{moment}/")}
        if kept:
            listed = moment == "momentum_vector"
            setattr(_innermost(wrapped), moment, [kept[str(i)] for i in range(len(kept))] if listed else kept)
