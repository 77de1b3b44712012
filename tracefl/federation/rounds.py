"""A strategy's rounds, watched: its updates are checked and recorded, beside what it makes of them.

For the time of its `start`, a strategy's `configure_train`, `aggregate_train` and their like are
those of `Rounds`, which call its own. In a round that is recorded, nobody is asked, and the
recorded model and metrics are returned; so a run that goes on has true round numbers.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Bulyan, FedAvg, FedMedian, FedTrimmedAvg, QFedAvg, Strategy
from torch import Tensor

from tracefl.errors import TraceFLError, as_sentence, require
from tracefl.federation.again import Before
from tracefl.federation.alike import unlike
from tracefl.federation.evaluating import Evaluations
from tracefl.federation.grid import GridView
from tracefl.federation.memory import OURS, fingerprints, innermost, parts, state_of
from tracefl.federation.nodes import KnownNodes, Nodes, by_number
from tracefl.federation.privacy import Aggregated, FixedClipping, Messages
from tracefl.federation.released import Problem, apart, apart_in, failing, fused, not_finite, unusable
from tracefl.federation.replies import EXAMPLES, BadReplyError, Expected, NotFiniteError, Update, read_update
from tracefl.federation.resend import Resending
from tracefl.federation.weights import Weights, assumed, find_weights
from tracefl.runs import ClientInfo, Participant, Run
from tracefl.states import State
from tracefl.training import Evaluation

EQUAL_WEIGHTS = (FedMedian, FedTrimmedAvg, Bulyan)  # every update that they use counts the same
WATCHED = ("configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate")
Accepted = tuple[Message, Update, Participant]
MOST_UNWRITTEN = 3  # updates in memory beside the replies, until they are written
log = logging.getLogger("tracefl")


@dataclass(frozen=True)
class Options:
    """Arguments of `Recorder` that matter in a round."""

    evaluate: Callable[[State], Evaluation] | None
    accept_failures: bool
    clients_per_round: int | None
    seed: int
    excluded: Collection[str]
    arrayrecord_key: str | None
    node_timeout: float
    on_client: Callable[[int, str, Mapping[str, Any]], None]
    on_round: Callable[[Run], None]
    joining: bool  # whether a client that comes later is one of the run's


@dataclass(frozen=True)
class Made:
    """What a strategy has made of a round's updates, and what is wrong with the model."""

    used: list[Accepted]
    arrays: ArrayRecord | None
    metrics: MetricRecord | None
    released: dict[str, Tensor]
    evaluation: Evaluation | None
    problem: Problem | None
    before: Before | None


class Rounds(Evaluations):
    """One loop of a strategy over its rounds.

    Args:
        strategy: Flower's, or the app's own.
        run: rounds are added to it.
        nodes: which node is which client.
        options: as of the recorder.
        wanted: how many rounds the loop has.
        order: names of the model's entries, which early runs do not hold.
        reads_all: whether the loop looks at the model of every recorded round.

    Attributes:
        index: the round that the loop is in, from 1; 0 before.
    """

    def __init__(
        self,
        strategy: Strategy,
        run: Run,
        nodes: Nodes | KnownNodes,
        options: Options,
        *,
        wanted: int,
        order: list[str],
        reads_all: bool,
    ) -> None:
        self.strategy, self.run, self.nodes, self.options = strategy, run, nodes, options
        self.wanted, self.order, self.reads_all, self.index = wanted, order, reads_all, 0
        self._own = {name: getattr(strategy, name) for name in WATCHED}
        self._used: dict[int, float] = {}  # id() of a content -> its weight
        self._first_values: dict[str, bytes] | None = None
        self._away: list[str] = []  # clients without a node
        self._sampling_since: float | None = None
        self._client_of: dict[int, str] = {}  # node that is asked in this round -> client
        self._held: dict[str, int] = {}  # client -> how many examples it holds, where that is known
        self._unknown: set[str] = set()  # clients of which it was said that it is not

    def view(self, grid: Grid) -> GridView:
        """The grid for the strategy: it shows nodes whose clients are known; replies are read."""
        watched = Resending(grid, lambda node: f"round {self.index}, client {self._client_of.get(node, node)}")
        self._view = GridView(cast(Grid, watched), nodes=self._shown, on_reply=self._receive)
        return self._view

    def watch(self, undo: ExitStack) -> None:
        """Put these methods in place of the strategy's, until `undo` is closed."""
        self._writer = undo.enter_context(ThreadPoolExecutor(1, "tracefl-writer"))  # while others train
        for name in WATCHED:
            _replace(undo, self.strategy, name, getattr(self, name))
        for part in parts(self.strategy):
            if callable(average := getattr(part, "train_metrics_aggr_fn", None)):
                _replace(undo, part, "train_metrics_aggr_fn", self._watched_average(part, average))

    def _watched_average(self, part: Strategy, average: Callable[[list[RecordDict], str], MetricRecord]) -> Any:
        """Learn which replies the strategy uses, and how it weighs them, as it averages metrics."""

        def watched(contents: list[RecordDict], weight_key: str) -> MetricRecord:
            n_k = [float(next(iter(content.metric_records.values()))[weight_key]) for content in contents]  # type: ignore[arg-type]
            equal = isinstance(part, EQUAL_WEIGHTS)
            self._used = {id(content): 1.0 if equal else n for content, n in zip(contents, n_k, strict=True)}
            return average(contents, weight_key)

        return watched

    @property
    def _recorded(self) -> bool:
        """Whether the round that the strategy's loop is in is recorded: it is not run again."""
        return self.index <= len(self.run.rounds)

    def _shown(self) -> list[int]:
        """The nodes that the strategy may ask: those whose client is known."""
        nodes = list(self.nodes.refresh())
        if self._sampling_since is not None and monotonic() - self._sampling_since > self.options.node_timeout:
            reasons = "".join(f"; {why}" for why, _ in self.nodes.refused.values())
            told = f"round {self.index}: the strategy waits for more than {len(nodes)} nodes, the known ones"
            raise TraceFLError(
                f"{told} after {self.options.node_timeout:g} s{reasons}: start more, or lower its minimum"
            )
        return nodes

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Messages:
        """The strategy's messages to nodes whose clients are known; none in a recorded round."""
        self.index += 1
        if self._recorded:
            return []
        if self._first_values is None:
            self._first_values = fingerprints(self.strategy)
        self._updates: dict[str, tuple[str, Update, Participant]] = {}  # client -> message id, ...
        self._unwritten: list[tuple[str, str, Update, Future[Participant]]] = []
        self._failures: dict[str, str] = {}  # client -> why
        self._used = {}
        self._not_finite: dict[str, str] = {}  # client -> which values
        self._expected: dict[str, Tensor] = dict(arrays.to_torch_state_dict())
        self._check_sent()
        self._wanted = self._expect()
        self._view.asked.clear()  # what comes late is no reply of this round
        self._look_for_nodes()
        absent: dict[int, str] = {}
        if self.options.clients_per_round is not None:
            drawn = draw(self.nodes, self.run, self.index, self.options)
            shown = [self.nodes.node_of(client) for client in drawn]
            absent = {-1 - i: drawn[i] for i, node in enumerate(shown) if node is None}
            grid = cast(Grid, GridView(grid, nodes=[-1 - i if n is None else n for i, n in enumerate(shown)]))
        self._sampling_since = monotonic()
        messages = list(self._own["configure_train"](server_round, arrays, config, grid))
        self._sampling_since = None
        asked = [message.metadata.dst_node_id for message in messages]
        before = self.nodes.clients | absent
        for node in asked:
            unknown = f"round {self.index}: the strategy asks node {node}, which has not said which client it is"
            require(node in before, f"{unknown}: let it ask nodes that grid.get_node_ids() shows")
        twice = [before[node] for node, count in Counter(asked).items() if count > 1]
        require(not twice, f"round {self.index}: the strategy sends client '{''.join(twice[:1])}' several messages")
        now = self.nodes.refresh(again=asked)
        self._client_of = {node: now[node] for node in asked if node in now and node not in absent}
        self._join(self._client_of.values())
        self._chosen = sorted([*self._client_of.values()], key=by_number)
        for node in asked:
            if node not in self._client_of:
                self._chosen.append(before[node])
                gone = "none of the connected nodes says that it is this client"
                self._fail(before[node], self.nodes.refused.get(node, (gone,))[0])
        self._look_for_counts()
        messages = [message for message in messages if message.metadata.dst_node_id in self._client_of]
        return sorted(messages, key=lambda m: self._chosen.index(self._client_of[m.metadata.dst_node_id]))

    def _check_sent(self) -> None:
        """Send no model that cannot be trained on: clients would be blamed for it."""
        before, last = self.index - 1, self.run.rounds[-1] if self.run.rounds else None
        problem = not_finite(self._expected) or (unusable(self._expected, self.run.global_state(0)) if last else None)
        if problem is None and last is not None and last.loss is not None:
            problem = failing(last)
        if problem is not None:
            found = apart_in(self.run, before, problem.entry)
            whose = f", client {found.client}'s update of round {before} stands apart: {found}" if found else ""
            told = f"{f'the model of round {before}' if before else 'the initial model'} {problem.text}{whose}"
            remedy = "train from another one, in another folder"
            raise TraceFLError(f"round {self.index}: {told}; clients are not asked to train it: {remedy}.")

    def _expect(self) -> Expected:
        """What a reply of this round must be."""
        ours = any(type(part).__module__.startswith("tracefl.") for part in parts(self.strategy))
        key, record = self._weight_key(), self.options.arrayrecord_key
        return Expected(self._expected, key, record, several=not self._flowers(), counted=ours)

    def _look_for_counts(self) -> None:
        """How many examples a client holds, where it is known; say where it is not, once."""
        self._held = {
            client.id: sum(client.label_counts.values()) for client in self.run.clients if client.label_counts
        }
        key, equal = self._weight_key() or EXAMPLES, isinstance(innermost(self.strategy), EQUAL_WEIGHTS)
        known = self._held.keys() | self._unknown if key == EXAMPLES else self._unknown
        unknown = [client for client in self._chosen if client not in known]
        if unknown and not equal and not any(isinstance(part, FixedClipping) for part in parts(self.strategy)):
            self._unknown |= set(unknown)
            some = ", ".join(unknown[:5]) + f" and {len(unknown) - 5} more" * (len(unknown) > 5)
            remedy = "; clients=[ClientInfo(id, label_counts), ...] lets it be checked" if key == EXAMPLES else ""
            log.warning("the share of client %s in the mean is what it says itself (%s)%s", some, key, remedy)

    def _look_for_nodes(self) -> None:
        """Ask the nodes that have come, and say which clients have none."""
        there = set(self.nodes.refresh(retry=True).values())
        away = [client.id for client in self.run.clients if client.id not in there]
        if away != self._away and away:
            log.warning("round %d: no node is there for client %s: not asked", self.index, ", ".join(away))
        self._away = away

    def _join(self, clients: Iterable[str]) -> None:
        """A client that came later is one of the run's from now on."""
        known = {client.id for client in self.run.clients}
        for client in clients if self.options.joining else []:
            if client not in known:
                log.warning("round %d: client '%s' has joined the run", self.index, client)
                self.run.add_client(ClientInfo(client))

    def _receive(self, reply: Message) -> None:
        """Check one reply and record it. It is of the node that was asked, whoever answers."""
        asked = self._view.asked.get(reply.metadata.reply_to_message_id)
        if asked is None or asked.message_type.split(".")[0] != MessageType.TRAIN or self._recorded:
            return
        client = self._client_of.get(asked.dst_node_id)
        if client is None:  # the strategy has sent something of its own
            return
        try:
            update = read_update(reply, self._wanted, self._held.get(client))
        except NotFiniteError as problem:
            self._not_finite[client] = str(problem)  # perhaps for the model that was sent
            return
        except BadReplyError as problem:
            self._fail(client, str(problem))
            return
        while len(self._unwritten) >= MOST_UNWRITTEN:
            self._write_one()
        written = self._writer.submit(self.run.record_client, self.index, client, update.state, update.num_examples)
        self._unwritten.append((client, reply.metadata.reply_to_message_id, update, written))
        self.options.on_client(self.index, client, update.metrics)

    def _write_one(self) -> None:
        """Wait until the next update is written, and keep its file in its place."""
        client, sent, update, written = self._unwritten.pop(0)
        participant = written.result()
        if self.run.storing.exact:  # otherwise the weights could not be found from it
            update = replace(update, state=self.run.received(self.index, participant))
        self._updates[client] = sent, update, participant

    def aggregate_train(self, server_round: int, replies: Messages) -> Aggregated:
        """Aggregate the updates that were accepted, and record the released model."""
        number = self.index
        if self._recorded:
            return self._again(number)
        while self._unwritten:
            self._write_one()
        for client in self._chosen:
            if client not in self._updates and client not in self._failures and client not in self._not_finite:
                self._fail(client, "it sent no reply in time (timeout, round_timeout)")
        self._judge_not_finite()
        self._check_alike()
        given = {reply.metadata.reply_to_message_id: reply for reply in replies}
        made = self._release(server_round, given)
        while made.problem is not None:
            self._leave_out(made)
            made = self._release(server_round, given)
        arrays, used = made.arrays, made.used
        weights = self._weights(made.released if arrays is not None else None, used)
        share = dict(zip([participant.id for _, _, participant in used], weights.shares, strict=True))
        accepted = [self._updates[client][2] for client in self._chosen if client in self._updates]
        participants = [replace(participant, weight=share.get(participant.id, 0.0)) for participant in accepted]
        state, source, metrics = state_of(self.strategy), weights.source, made.metrics
        self._note_changes()
        evaluation = made.evaluation
        self.run.record_round(number, participants, made.released, evaluation, self._failures, state, metrics, source)
        self.options.on_round(self.run)
        return (None if arrays is None else ArrayRecord(made.released)), metrics

    def _release(self, server_round: int, given: dict[str, Message]) -> Made:
        """What the strategy makes of the accepted updates, and what is wrong with it."""
        number, name = self.index, type(innermost(self.strategy)).__name__
        accepted = [self._updates[client] for client in self._chosen if client in self._updates]
        used = [(given[sent], update, participant) for sent, update, participant in accepted if sent in given]
        first = next(iter(self._failures), "")
        everyone_failed = f"every client failed; the first said: client {first}: {self._failures.get(first)}."
        require(accepted or not self._chosen, f"round {number}: {everyone_failed}")
        self._used = {}
        before = Before(self.strategy, [reply for reply, _, _ in used]) if self.options.accept_failures else None
        odd = unlike({participant.id: update for _, update, participant in used}, everything=True)
        hint = "".join(f"; client {client}: {why}" for client, why in odd.items())
        with as_sentence(
            f"round {number}: {name} cannot aggregate {len(used)} updates{hint}",
            "correct the strategy, or let clients send what it expects",
            Exception,
        ), np.errstate(all="ignore"):  # what overflows is found below  # fmt: skip
            arrays, metrics = self._own["aggregate_train"](server_round, [reply for reply, _, _ in used])
        returned = f"round {number}: {name}.aggregate_train must return an ArrayRecord or None, and metrics"
        require(arrays is None or isinstance(arrays, ArrayRecord), f"{returned}; got a {type(arrays).__name__}")
        released = dict(self._expected)  # what no client sends is as it was
        if arrays is None:
            log.warning("round %d: %s released no model, it stays as it was", number, name)
        else:
            released |= fused(arrays, self._expected, f"round {number}")
        problem, evaluation = unusable(released, self._expected), None
        if problem is None and self.options.evaluate:
            evaluation = self.options.evaluate(released)
            what = "evaluate must return a tracefl.flower.Evaluation"
            require(isinstance(evaluation, Evaluation), f"{what}, got {evaluation!r}")
            problem = failing(evaluation)
        return Made(used, arrays, metrics, released, evaluation, problem, before)

    def _leave_out(self, made: Made) -> None:
        """The client whose update stands apart has failed; give the strategy back what it had."""
        assert made.problem is not None
        about = f"the released model {made.problem.text}"
        updates = {participant.id: update.state for _, update, participant in made.used}
        found = apart(updates, self._expected, made.problem.entry)
        if found is None:
            remedy = "no client's update stands apart, so training itself diverges: lower the clients' learning rate"
            raise TraceFLError(f"round {self.index}: {about}; {remedy}. {self._kept()}.")
        changed = made.before.restore() if made.before is not None else None
        self._fail(found.client, f"{about}, and its update stands apart: {found}")
        again = f"{changed} has changed, so the round cannot be aggregated without it"
        remedy = "give the strategy state_dict() and load_state_dict(state), or exclude the client"
        require(not changed, f"round {self.index}, client {found.client}: {about}; {again}: {remedy}. {self._kept()}.")

    def _judge_not_finite(self) -> None:
        """Clients whose values are not finite have failed; of most, the model sent is the cause."""
        bad, before = self._not_finite, self.index - 1
        answers = len(bad) + len(self._updates)
        most = len(bad) > 1 and 2 * len(bad) > answers
        if most and (len(bad) == answers or not self.options.accept_failures):
            found = apart_in(self.run, before)
            whose = f" (client {found.client}'s update stands apart there: {found})" if found and found.others else ""
            sent = f"the model of round {before}{whose}" if before else "the initial model"
            told = f"round {self.index}: {len(bad)} of {answers} clients answer with non-finite values"
            raise TraceFLError(
                f"{told}: training on {sent} diverges, lower the clients' learning rate. {self._kept()}."
            )
        for client in [client for client in self._chosen if client in bad]:
            others = f", as have those of {len(bad) - 1} others: the model that was sent may be the cause" * most
            self._fail(client, bad[client] + others)

    def _weights(self, released: State | None, used: list[Accepted]) -> Weights:
        """p_k of the updates that the strategy was given."""
        if released is None or not used:
            return Weights([0.0] * len(used), "strategy")
        told = [self._used.get(id(reply.content), 0.0) for reply, _, _ in used]
        if self._flowers() and any(told):
            return Weights([weight / sum(told) for weight in told], "strategy")
        known = {"told": told, "weight": [update.weight for _, update, _ in used]}
        known["examples"] = [float(update.num_examples) for _, update, _ in used]
        states = [update.state for _, update, _ in used]
        if found := find_weights(released, self._expected, states, known | {"equal": [1.0] * len(used)}):
            return found
        name = type(innermost(self.strategy)).__name__
        return assumed(known["examples"], f"round {self.index}: what weights {name} gave the updates")

    def _flowers(self) -> bool:
        """Whether Flower's own code averages, by the weight that it is seen to use for metrics."""
        kinds = [next(k for k in type(p).__mro__ if "aggregate_train" in vars(k)) for p in parts(self.strategy)]
        plain = isinstance(innermost(self.strategy), FedAvg) and not isinstance(innermost(self.strategy), QFedAvg)
        return plain and all(kind.__module__.startswith(OURS) for kind in kinds)

    def _weight_key(self) -> str | None:
        return getattr(innermost(self.strategy), "weighted_by_key", None)

    def _check_alike(self) -> None:
        """Leave out who sends something else than most clients."""
        updates = {client: self._updates[client][1] for client in self._chosen if client in self._updates}
        for client, why in unlike(updates, everything=self._flowers()).items():
            self._fail(client, why)

    def _kept(self) -> str:
        return f"Rounds 1 to {len(self.run.rounds)} are kept; the same command goes on from there"

    def _fail(self, client: str, reason: str) -> None:
        """This client has failed: its update does not count, if there is one."""
        sent = self._updates.pop(client, None)
        others_can = self._updates or self._unwritten or self.run.rounds
        tolerate = ", accept_failures=true goes on without such a client" if others_can else ""
        require(
            self.options.accept_failures, f"round {self.index}, client {client}: {reason}. {self._kept()}{tolerate}."
        )
        self._failures[client] = reason
        if sent is not None:
            self.run.forget_client(self.index, sent[2])

    def _note_changes(self) -> None:
        """Record which values the strategy keeps, but cannot give: those that have changed."""
        if self._first_values is not None:
            now = fingerprints(self.strategy)
            changed = {name for name in now if now[name] != self._first_values.get(name)}
            self.run.note_unsaved(sorted({*self.run.unsaved, *changed}))

    def _again(self, number: int) -> Aggregated:
        """Model and metrics of a recorded round; only a loop that looks at all reads all."""
        metrics = self.run.round(number).metrics.get("train")
        record = None if metrics is None else MetricRecord(metrics)
        if number < min(self.wanted, len(self.run.rounds)) and not self.reads_all:
            return None, record
        state = self.run.global_state(number)
        order = dict.fromkeys([name for name in self.order if name in state])  # early runs do not hold it
        return ArrayRecord({name: state[name] for name in order | dict.fromkeys(state)}), record


def draw(nodes: Nodes | KnownNodes, run: Run, number: int, options: Options) -> list[str]:
    """The clients drawn for round `number`, in the order of their ids."""
    known = nodes.clients.values() if isinstance(nodes, KnownNodes) else [client.id for client in run.clients]
    ids, count = sorted(known, key=by_number), options.clients_per_round or 0
    rng = np.random.default_rng([options.seed, number])
    drawn = [index for index in rng.choice(len(ids), count, replace=False) if ids[index] not in options.excluded]
    if count > len(drawn):
        others = [k for k, who in enumerate(ids) if k not in drawn and who not in options.excluded]
        drawn += rng.choice(others, count - len(drawn), replace=False).tolist()
    return [ids[index] for index in sorted(drawn)]


def _replace(undo: ExitStack, thing: Any, name: str, value: Any) -> None:
    """Give one object another method, until `undo` is closed."""
    if name in vars(thing):
        undo.callback(setattr, thing, name, vars(thing)[name])
    else:
        undo.callback(delattr, thing, name)
    setattr(thing, name, value)
