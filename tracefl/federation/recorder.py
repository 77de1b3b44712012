"""The recorder: runs any Flower strategy as it is and records its rounds into a run.

For the time of `start`, the strategy's own `configure_train`, `aggregate_train` and their like are
watched, and its own `start` is called. So whatever it does is done: how it samples, aggregates,
evaluates and saves. Every update is checked before it counts and is recorded as received, beside
the model that the strategy releases, the weights p_k with which it took the updates, its metrics,
and what it carries from round to round.

A run that goes on starts its loop at round 1 again: of recorded rounds, nobody is asked, and the
recorded model and metrics are returned. So the rounds' numbers are true, and the result is whole.
"""

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Bulyan, FedAvg, FedMedian, FedTrimmedAvg, QFedAvg, Result, Strategy
from torch import Tensor

from tracefl.errors import TraceFLError, as_sentence, require
from tracefl.federation.grid import GridView
from tracefl.federation.identity import KEY
from tracefl.federation.memory import OURS, fingerprints, innermost, load_state, parts, settings_of, state_of
from tracefl.federation.nodes import Nodes, by_number
from tracefl.federation.privacy import Aggregated, Messages
from tracefl.federation.replies import EXAMPLES, BadReplyError, Update, read_update
from tracefl.federation.weights import Weights, find_weights
from tracefl.runs import ClientInfo, Participant, Run, locked, same_state, writing
from tracefl.states import State
from tracefl.training import Evaluation

EQUAL_WEIGHTS = (FedMedian, FedTrimmedAvg, Bulyan)  # every update that they use counts the same
WATCHED = ("configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate")
log = logging.getLogger("tracefl")


class Recorder:
    """Any Flower strategy, recorded into a run.

    Args:
        strategy: Flower's, or the app's own.
        run: a folder: the run that it holds is gone on with, or else one is made, and no other
            process may write there meanwhile. Or a run whose folder the caller holds.
        nodes: the grid, whose nodes are asked who they are, at once and before every round that
            they train in; or Flower's node id -> client id, if that is known and does not change.
        node_key: of the nodes' configuration; its value is a client's id.
        clients: all clients, by id or `ClientInfo`; none: those whose nodes are there. Nodes of
            others take no part.
        settings: the app's settings, plain JSON; a run that goes on must have the same.
        evaluate: called with the state dict of every released model; returns its evaluation on the
            server's data. None: the run is recorded without predictions.
        accept_failures: record why a client failed and go on without it, instead of stopping the
            run.
        clients_per_round: participants to draw for a round; None: the strategy samples. With it,
            the strategy must take every node that it is shown, as with
            `FedAvg(min_train_nodes=n, min_available_nodes=n)`.
        seed: of the draw; the participants of round t depend only on (seed, t).
        arrayrecord_key: which ArrayRecord of a reply is the model, where there are several and the
            strategy does not say.
        node_timeout: how many seconds nodes are waited for.
        on_client: called with (round, client id, metrics) after every accepted update.
        on_round: called with the run after every complete round.

    Raises:
        TraceFLError: another process writes to the folder, or it holds something else.

    Example:
        In a ServerApp's main function, where the app had `strategy.start(grid, arrays, ...)`::

            recorder = Recorder(strategy, "/data/runs/mine", grid)
            result = recorder.start(grid, arrays, num_rounds=3, evaluate_fn=evaluate_fn)
    """

    def __init__(
        self,
        strategy: Strategy,
        run: Run | str | Path,
        nodes: Grid | Mapping[int, str],
        *,
        node_key: str = KEY,
        clients: Iterable[ClientInfo | str] | None = None,
        settings: Mapping[str, Any] | None = None,
        evaluate: Callable[[State], Evaluation] | None = None,
        accept_failures: bool = False,
        clients_per_round: int | None = None,
        seed: int = 0,
        arrayrecord_key: str | None = None,
        node_timeout: float = 300,
        on_client: Callable[[int, str, Mapping[str, Any]], None] = lambda *_: None,
        on_round: Callable[[Run], None] = lambda _: None,
    ) -> None:
        self.strategy, self.evaluate, self.accept_failures = strategy, evaluate, accept_failures
        self.clients_per_round, self.seed, self.node_timeout = clients_per_round, seed, node_timeout
        self.arrayrecord_key = arrayrecord_key or getattr(innermost(strategy), "arrayrecord_key", None)
        self.on_client, self.on_round, self.settings = on_client, on_round, settings
        self._given = None if clients is None else [c if isinstance(c, ClientInfo) else ClientInfo(c) for c in clients]
        self._held, self._holds = ExitStack(), False
        self._sampling_since: float | None = None
        self._away: list[str] = []  # clients without a node
        self._run: Run | None
        self._run, self.folder = (run, run.path) if isinstance(run, Run) else (None, Path(run))
        self._owned = self._run is None  # whether this recorder makes the run and checks its settings
        with ExitStack() as failed:
            failed.callback(self._held.close)
            if self._owned:
                self._hold()
                self._run = Run.open(self.folder) if (self.folder / "run.json").exists() else None
            expected = self._given if self._owned else self.run.clients
            ids = [client.id for client in expected] if expected else None
            if isinstance(nodes, Mapping):
                self.nodes: Nodes | dict[int, str] = dict(nodes)
            else:
                self.nodes = Nodes(nodes, node_key, ids, node_timeout)
                self.nodes.refresh()
            failed.pop_all()

    @property
    def run(self) -> Run:
        """The run. A new one exists from `start` on, which knows its initial model."""
        if self._run is None:
            raise TraceFLError(f"{self.folder} holds no run yet: it is made by start, which is given the initial model")
        return self._run

    def start(self, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int = 3, *args: Any, **kwargs: Any) -> Result:
        """Run the strategy's own `start` until the run holds `num_rounds`.

        Args:
            grid: Flower's.
            initial_arrays: the model that round 1 starts from; a run that goes on must have started
                from the same. Its last model is taken for it, too.
            num_rounds: how many rounds the run holds in the end.
            *args: as of the strategy's `start`.
            **kwargs: as of the strategy's, such as timeout (seconds per round), train_config and
                evaluate_fn.

        Returns:
            What the strategy's `start` returns, of recorded rounds too.

        Raises:
            TraceFLError: the recorded run is another one, a client failed (unless
                `accept_failures`), or the released model is broken. The rounds before are kept.
        """
        with self._held, ExitStack() as undo:
            if self._owned:
                self._hold()
                undo.callback(setattr, self, "_holds", False)
            else:
                undo.enter_context(writing(self.folder))
            self._view = GridView(grid, nodes=self._shown, on_reply=self._receive)
            call = f"{type(self.strategy).__name__}.start"
            with as_sentence(f"{call} does not take these arguments", "give those that it takes", TypeError):
                bound = inspect.signature(self.strategy.start).bind(
                    self._view, initial_arrays, num_rounds, *args, **kwargs
                )
            given, train_config = bound.arguments, bound.arguments.get("train_config")
            self._open(initial_arrays, num_rounds, train_config)
            given[list(given)[1]] = self._initial(initial_arrays)
            if train_config is not None:  # strategies write the round's number into it
                given["train_config"] = ConfigRecord(dict(train_config))
            if evaluate_fn := given.get("evaluate_fn"):
                given["evaluate_fn"] = self._watched_evaluate_fn(evaluate_fn)
            unknown = evaluate_fn and any("server" not in record.metrics for record in self.run.rounds)
            self._reads_all = type(self.strategy).start is not Strategy.start or unknown
            self._watch(undo)
            before, self._index, self._wanted = len(self.run.rounds), 0, num_rounds
            result = self.strategy.start(*bound.args, **bound.kwargs)
            went = self._index >= min(num_rounds, before + 1)  # no round, or no new one
            require(went, f"{call} went through no round: it must call its configure_train and aggregate_train")
            return result

    def _hold(self) -> None:
        """Take the folder's lock; it is given back when `start` ends."""
        if not self._holds:
            self._held.enter_context(locked(self.folder))
            self._holds = True

    # --- before the first round ---------------------------------------------------------------

    def _open(self, initial: ArrayRecord, num_rounds: int, train_config: ConfigRecord | None) -> None:
        """Create the run, or see that the recorded one is this one."""
        header = {"strategy": settings_of(self.strategy), "train_config": _plain(train_config or {})}
        header |= {} if self.settings is None else {"settings": dict(self.settings)}
        if self._owned and self._run is not None and not self._run.rounds and "strategy" in self._run:
            (self.folder / "run.json").unlink()  # it failed in round 1, perhaps for its settings
            self._run = None
        if self._owned and self._run is None:
            there = self._wait() if num_rounds else {}
            clients = self._given or [ClientInfo(client) for client in sorted(there.values(), key=by_number)]
            state = initial.to_torch_state_dict()
            self._run = Run.create(self.folder, initial=state, clients=clients, seed=self.seed, **header)
            logging.getLogger("flwr").info("TraceFL records this run into %s", self.folder.resolve())
        elif self._owned:
            self.run.check_header(**header)
            if self._given is not None:
                self.run.check_clients(self._given)
        state, last = initial.to_torch_state_dict(), len(self.run.rounds)
        if not (last and same_state(state, self.run.global_state(last))):
            self.run.check_initial(state)
        if last < num_rounds and (last or not self._owned):
            self._check_known()
        load_state(self.strategy, self.run.strategy_state(last))
        self._first_values: dict[str, bytes] | None = None
        if last and last < num_rounds and self.run.unsaved:
            kept = ", ".join(self.run.unsaved)
            log.warning(
                "%s goes on with round %d; %s changed in the rounds before and is not recorded: "
                "give the strategy state_dict() and load_state_dict(state)", self.folder, last + 1, kept
            )  # fmt: skip

    def _wait(self) -> dict[int, str]:
        if isinstance(self.nodes, dict):
            return self.nodes
        least = ("min_available_nodes", "min_train_nodes")
        count = max([1, *(int(getattr(part, name, 1)) for part in parts(self.strategy) for name in least)])
        expected = self._given if self._owned else self.run.clients
        wanted = [] if expected is None or self.accept_failures else [client.id for client in expected]
        return self.nodes.wait(count, wanted, strict=not self.accept_failures)

    def _check_known(self) -> None:
        """Whoever is there when a run goes on must be one of its clients."""
        there, ids = self._wait(), {client.id for client in self.run.clients}
        if isinstance(self.nodes, dict):
            return
        for node, client in there.items():
            told = f"{self.folder}: node {node} says that it is client '{client}', which is none of the run's"
            known = ", ".join(sorted(ids, key=by_number))
            require(client in ids, f"{told} ({known}): start those, or choose another folder")

    def _initial(self, given: ArrayRecord) -> ArrayRecord:
        """The initial model, its entries in the order of the app."""
        recorded, self._order = self.run.global_state(0), list(given)
        return ArrayRecord({name: recorded[name] for name in given})

    def _watch(self, undo: ExitStack) -> None:
        """Put this recorder's methods in place of the strategy's, until `undo` is closed."""
        self._own = {name: getattr(self.strategy, name) for name in WATCHED}
        for name in WATCHED:
            _replace(undo, self.strategy, name, getattr(self, name))
        self._used: dict[int, float] = {}  # id() of a content -> its weight
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

    # --- in a round -----------------------------------------------------------------------------

    @property
    def _recorded(self) -> bool:
        """Whether the round that the strategy's loop is in is recorded: it is not run again."""
        return self._index <= len(self.run.rounds)

    def _shown(self) -> list[int]:
        """The nodes that the strategy may ask: those whose client is known."""
        if isinstance(self.nodes, dict):
            return list(self.nodes)
        nodes = list(self.nodes.refresh())
        if self._sampling_since is not None and monotonic() - self._sampling_since > self.node_timeout:
            reasons = "".join(f"; {why}" for why, _ in self.nodes.refused.values())
            told = f"round {self._index}: the strategy waits for more than {len(nodes)} nodes, the known ones"
            raise TraceFLError(f"{told} after {self.node_timeout:g} s{reasons}: start more, or lower its minimum")
        return nodes

    def participants(self, number: int) -> list[str]:
        """The clients drawn for round `number`, in the order of their ids."""
        known = self.nodes.values() if isinstance(self.nodes, dict) else [client.id for client in self.run.clients]
        ids = sorted(known, key=by_number)  # numbers by value
        drawn = np.random.default_rng([self.seed, number]).choice(len(ids), self.clients_per_round, replace=False)
        return [ids[index] for index in sorted(drawn)]

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Messages:
        """The strategy's messages to nodes whose clients are known; none in a recorded round."""
        self._index += 1
        if self._recorded:
            return []
        if self._first_values is None:
            self._first_values = fingerprints(self.strategy)
        self._updates: dict[str, tuple[str, Update, Participant]] = {}  # client -> message id, ...
        self._failures: dict[str, str] = {}  # client -> why
        self._used = {}
        self._expected: dict[str, Tensor] = dict(arrays.to_torch_state_dict())
        self._look_for_nodes()
        absent: dict[int, str] = {}
        if self.clients_per_round is not None:
            drawn = self.participants(self._index)
            shown = [self._node(client) for client in drawn]
            absent = {-1 - i: drawn[i] for i, node in enumerate(shown) if node is None}
            grid = cast(Grid, GridView(grid, nodes=[-1 - i if n is None else n for i, n in enumerate(shown)]))
        self._sampling_since = monotonic()
        messages = list(self._own["configure_train"](server_round, arrays, config, grid))
        self._sampling_since = None
        asked = [message.metadata.dst_node_id for message in messages]
        before = dict(self.nodes if isinstance(self.nodes, dict) else self.nodes.clients) | absent
        for node in asked:
            unknown = f"round {self._index}: the strategy asks node {node}, which has not said which client it is"
            require(node in before, f"{unknown}: let it ask nodes that grid.get_node_ids() shows")
        twice = [before[node] for node, count in Counter(asked).items() if count > 1]
        require(not twice, f"round {self._index}: the strategy sends client '{''.join(twice[:1])}' several messages")
        now = before
        if not isinstance(self.nodes, dict) and asked:
            now = self.nodes.refresh(again=asked)
        self._client_of = {node: now[node] for node in asked if node in now and node not in absent}
        self._join(self._client_of.values())
        self._chosen = sorted([*self._client_of.values()], key=by_number)
        for node in asked:
            if node not in self._client_of:
                self._chosen.append(before[node])
                gone = "none of the connected nodes says that it is this client"
                refused = {} if isinstance(self.nodes, dict) else self.nodes.refused
                self._fail(before[node], refused.get(node, (gone,))[0])
        messages = [message for message in messages if message.metadata.dst_node_id in self._client_of]
        return sorted(messages, key=lambda m: self._chosen.index(self._client_of[m.metadata.dst_node_id]))

    def _look_for_nodes(self) -> None:
        """Ask the nodes that have come, and say which clients have none."""
        if isinstance(self.nodes, dict):
            return
        there = set(self.nodes.refresh(retry=True).values())
        away = [client.id for client in self.run.clients if client.id not in there]
        if away != self._away and away:
            log.warning("round %d: no node is there for client %s: not asked", self._index, ", ".join(away))
        self._away = away

    def _node(self, client: str) -> int | None:
        if isinstance(self.nodes, dict):
            return next(node for node, name in self.nodes.items() if name == client)
        return self.nodes.node_of(client)

    def _join(self, clients: Iterable[str]) -> None:
        """A client that came later is one of the run's from now on."""
        known = {client.id for client in self.run.clients}
        for client in clients if self._owned else []:
            if client not in known:
                log.warning("round %d: client '%s' has joined the run", self._index, client)
                self.run.add_client(ClientInfo(client))

    def _receive(self, reply: Message) -> None:
        """Check one reply and record it. It is of the node that was asked, whoever answers."""
        asked = self._view.asked.get(reply.metadata.reply_to_message_id)
        if asked is None or asked.message_type.split(".")[0] != MessageType.TRAIN or self._recorded:
            return
        client = self._client_of[asked.dst_node_id]
        try:
            update = read_update(reply, self._expected, self._weight_key(), self.arrayrecord_key, not self._flowers())
        except BadReplyError as problem:
            self._fail(client, str(problem))
            return
        participant = self.run.record_client(self._index, client, update.state, update.num_examples)
        update = replace(update, state=self.run.received(self._index, participant))  # memory is for replies
        self._updates[client] = reply.metadata.reply_to_message_id, update, participant
        self.on_client(self._index, client, update.metrics)

    def aggregate_train(self, server_round: int, replies: Messages) -> Aggregated:
        """Aggregate the updates that were accepted, and record the released model."""
        number = self._index
        if self._recorded:
            return self._again(number)
        for client in self._chosen:
            if client not in self._updates and client not in self._failures:
                self._fail(client, "it sent no reply in time (timeout, round_timeout)")
        self._check_same_entries()
        given = {reply.metadata.reply_to_message_id: reply for reply in replies}
        accepted = [self._updates[client] for client in self._chosen if client in self._updates]
        used = [(given[sent], update, participant) for sent, update, participant in accepted if sent in given]
        first = next(iter(self._failures), "")
        everyone_failed = f"every client failed; the first said: client {first}: {self._failures.get(first)}."
        require(accepted or not self._chosen, f"round {number}: {everyone_failed}")
        name = type(innermost(self.strategy)).__name__
        with as_sentence(
            f"round {number}: {name} cannot aggregate {len(used)} updates",
            "correct the strategy, or let clients send what it expects",
            Exception,
        ):
            arrays, metrics = self._own["aggregate_train"](server_round, [reply for reply, _, _ in used])
        released = dict(self._expected)  # what no client sends is as it was
        if arrays is None:
            log.warning("round %d: %s released no model, it stays as it was", number, name)
        else:
            released |= self._fused(arrays)
        for entry, value in released.items():
            finite = bool(torch.isfinite(value).all())
            require(finite, f"round {number}: the released model has non-finite values in '{entry}'.")
        weights = self._weights(released if arrays is not None else None, used)
        share = dict(zip([participant.id for _, _, participant in used], weights.shares, strict=True))
        participants = [replace(participant, weight=share.get(participant.id, 0.0)) for _, _, participant in accepted]
        evaluation = self.evaluate(released) if self.evaluate else None
        state, source = state_of(self.strategy), weights.source
        self._note_changes()
        self.run.record_round(number, participants, released, evaluation, self._failures, state, metrics, source)
        self.on_round(self.run)
        return (None if arrays is None else ArrayRecord(released)), metrics

    def _fused(self, arrays: ArrayRecord) -> dict[str, Tensor]:
        """What the strategy released, in the types of the model: whole numbers are rounded."""
        fused = dict(arrays.to_torch_state_dict())
        for name, value in fused.items():
            if (was := self._expected.get(name)) is not None:
                shapes = f"must have the shape {tuple(was.shape)} of the model sent, got {tuple(value.shape)}"
                require(value.shape == was.shape, f"round {self._index}: the released '{name}' {shapes}")
                whole = value.is_floating_point() and not was.is_floating_point()
                fused[name] = (value.round() if whole else value).to(was.dtype)
        return fused

    def _weights(self, released: State | None, used: list[tuple[Message, Update, Participant]]) -> Weights:
        """p_k of the updates that the strategy was given."""
        nothing = [0.0] * len(used)
        if released is None or not used:
            return Weights(nothing, "strategy")
        told = [self._used.get(id(reply.content), 0.0) for reply, _, _ in used]
        if self._flowers() and any(told):
            return Weights([weight / sum(told) for weight in told], "strategy")
        examples = [float(update.num_examples) for _, update, _ in used]
        known = {"told": told, "weight": [update.weight for _, update, _ in used], "examples": examples}
        known["equal"] = [1.0] * len(used)
        states = [update.state for _, update, _ in used]
        if found := find_weights(released, self._expected, states, known):
            return found
        usual = examples if sum(examples) else [1.0] * len(used)
        what = f"{EXAMPLES} is" if sum(examples) else "equal weights are"
        told_by = f"round {self._index}: what weights {type(innermost(self.strategy)).__name__} gave the updates"
        log.warning("%s cannot be told from the model that it released: %s assumed", told_by, what)
        return Weights([n / sum(usual) for n in usual], "assumed")

    def _flowers(self) -> bool:
        """Whether Flower's own code averages, by the weight that it is seen to use for metrics."""
        kinds = [next(k for k in type(p).__mro__ if "aggregate_train" in vars(k)) for p in parts(self.strategy)]
        plain = isinstance(innermost(self.strategy), FedAvg) and not isinstance(innermost(self.strategy), QFedAvg)
        return plain and all(kind.__module__.startswith(OURS) for kind in kinds)

    def _weight_key(self) -> str | None:
        return getattr(innermost(self.strategy), "weighted_by_key", None)

    def _check_same_entries(self) -> None:
        """Clients may send part of the model, but all the same: that of most, or the larger."""
        names = {client: frozenset(update.state) for client, (_, update, _) in self._updates.items()}
        usual_of = Counter(names.values())
        usual = max(usual_of, key=lambda part: (usual_of[part], len(part)), default=frozenset[str]())
        for client in [client for client in self._chosen if client in names]:
            if odd := sorted(names[client] ^ usual):
                verb = "lacks" if odd[0] in usual else "has"
                del self._updates[client]
                self._fail(client, f"its model {verb} '{odd[0]}', unlike those of most clients")

    def _fail(self, client: str, reason: str) -> None:
        kept = f"Rounds 1 to {len(self.run.rounds)} are kept; the same command goes on from there"
        others_can = self._updates or self.run.rounds
        tolerate = ", accept_failures=true goes on without such a client" if others_can else ""
        require(self.accept_failures, f"round {self._index}, client {client}: {reason}. {kept}{tolerate}.")
        self._failures[client] = reason

    def _note_changes(self) -> None:
        """Record which values the strategy keeps, but cannot give: those that have changed."""
        if self._first_values is not None:
            now = fingerprints(self.strategy)
            changed = {name for name in now if now[name] != self._first_values.get(name)}
            self.run.note_unsaved(sorted({*self.run.unsaved, *changed}))

    # --- after a round, and of recorded ones ------------------------------------------------------

    def _again(self, number: int) -> Aggregated:
        """Model and metrics of a recorded round; only a loop that looks at all reads all."""
        metrics = self.run.round(number).metrics.get("train")
        record = None if metrics is None else MetricRecord(metrics)
        if number < min(self._wanted, len(self.run.rounds)) and not self._reads_all:
            return None, record
        state = self.run.global_state(number)
        order = dict.fromkeys([name for name in self._order if name in state])  # early runs do not hold it
        return ArrayRecord({name: state[name] for name in order | dict.fromkeys(state)}), record

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
            metrics = self.run.round(self._index).metrics.get("evaluate")
            return None if metrics is None else MetricRecord(metrics)
        replies = list(replies)
        name = type(innermost(self.strategy)).__name__
        problem = f"round {self._index}: {name} cannot aggregate the metrics of {len(replies)} evaluations"
        with as_sentence(problem, "let clients send what it expects", Exception):
            found = self._own["aggregate_evaluate"](server_round, replies)
        if found is not None or replies:
            self.run.record_metrics(self._index, "evaluate", found)
        return found

    def _evaluated(self) -> bool:
        """Whether nobody is to evaluate: that is recorded, or a later round is."""
        known = self._index == len(self.run.rounds) > 0 and "evaluate" in self.run.round(self._index).metrics
        return known or self._index < len(self.run.rounds)

    def _watched_evaluate_fn(self, evaluate_fn: Callable[..., MetricRecord | None]) -> Callable[..., Any]:
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


def _replace(undo: ExitStack, thing: Any, name: str, value: Any) -> None:
    """Give one object another method, until `undo` is closed."""
    if name in vars(thing):
        undo.callback(setattr, thing, name, vars(thing)[name])
    else:
        undo.callback(delattr, thing, name)
    setattr(thing, name, value)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ConfigRecord as JSON holds it."""
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in config.items()}
