"""A strategy's rounds, watched: its updates are checked and recorded, beside what it makes of them.

For the time of its `start`, a strategy's `configure_train`, `aggregate_train` and their like are
those of `Rounds`, which call its own. In a round that is recorded, nobody is asked, and the
recorded model and metrics are returned; so a run that goes on has true round numbers.
"""

import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from time import monotonic
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from tracefl.errors import TraceFLError, require
from tracefl.federation.beginning import Beginnings
from tracefl.federation.evaluating import Evaluations
from tracefl.federation.grid import GridView
from tracefl.federation.loop import EQUAL_WEIGHTS
from tracefl.federation.loop import Options as Options
from tracefl.federation.memory import parts
from tracefl.federation.nodes import KnownNodes, Nodes, by_number
from tracefl.federation.privacy import Aggregated, Messages
from tracefl.federation.releasing import Releases
from tracefl.federation.replies import BadReplyError, NotFiniteError, put_in_order, read_update
from tracefl.federation.resend import Resending
from tracefl.runs import Run

WATCHED = ("configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate")
MOST_UNWRITTEN = 3  # updates in memory beside the replies, until they are written
log = logging.getLogger("tracefl")


class Rounds(Beginnings, Releases, Evaluations):
    """One loop of a strategy over its rounds: whom it asks, and what comes back."""

    def view(self, grid: Grid) -> GridView:
        """The grid for the strategy: it shows nodes whose clients are known; replies are read."""
        self._tasks = Resending(grid, lambda node: f"round {self.index}, client {self._client_of.get(node, node)}")
        self._view = GridView(cast(Grid, self._tasks), nodes=self._shown, on_reply=self._receive)
        return self._view

    def watch(self, undo: ExitStack) -> None:
        """Put these methods in place of the strategy's, until `undo` is closed."""
        self._own = {name: getattr(self.strategy, name) for name in WATCHED}
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
        self._begin(arrays)
        grid, absent = self._drawn(grid)
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

    def _drawn(self, grid: Grid) -> tuple[Grid, dict[int, str]]:
        """The grid that shows the round's participants; those without a node under negative ids."""
        absent: dict[int, str] = {}
        if self.options.clients_per_round is not None:
            drawn = draw(self.nodes, self.run, self.index, self.options)
            shown = [self.nodes.node_of(client) for client in drawn]
            absent = {-1 - i: drawn[i] for i, node in enumerate(shown) if node is None}
            grid = cast(Grid, GridView(grid, nodes=[-1 - i if n is None else n for i, n in enumerate(shown)]))
        return grid, absent

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
        put_in_order(reply, self._expected)
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
        state, source, metrics = made.state, weights.source, made.metrics
        self._note_changes()
        evaluation = made.evaluation
        self.run.record_round(number, participants, made.released, evaluation, self._failures, state, metrics, source)
        self.options.on_round(self.run)
        return (None if arrays is None else ArrayRecord(made.released)), metrics

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
