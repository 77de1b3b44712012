"""The recorder: runs any Flower strategy as it is and records its rounds into a run.

It opens the run or makes it, holds its lock, and sees that a run goes on as it began; then it calls
the strategy's own `start`, whose rounds are watched (`rounds`).
"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from tracefl.errors import TraceFLError, require
from tracefl.federation.call import Call
from tracefl.federation.identity import KEY
from tracefl.federation.memory import innermost, load_state, parts, settings_of
from tracefl.federation.nodes import KnownNodes, Nodes, by_number
from tracefl.federation.options import Options, draw
from tracefl.federation.rounds import CALLS, Rounds
from tracefl.files import locked, writing
from tracefl.record import ClientInfo
from tracefl.runs import Run
from tracefl.same import same_state
from tracefl.states import State
from tracefl.storage import Storing, disk_line
from tracefl.training import Evaluation

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
            others take no part. Where label counts are given, a client's num-examples must be their
            sum; where they are not, a warning says that its share is what it says.
        settings: the app's settings, plain JSON; a run that goes on must have the same.
        keep: whether all clients' states are kept ("all"), those of the last N rounds ("last:N"),
            or all as differences ("deltas"). A run that goes on must have the same; None: as it was
            recorded, a new one "all".
        dtype: what they are rounded to, "float16" or "bfloat16"; "float32": not at all. None: as
            `keep`.
        evaluate: called with the state dict of every released model; returns its evaluation on the
            server's data. None: the run is recorded without predictions.
        accept_failures: record why a client failed and go on without it, instead of stopping the
            run. A task whose process died is sent again before its client has failed.
        clients_per_round: participants to draw for a round; None: the strategy samples. With it,
            the strategy must take every node that it is shown, as with
            `FedAvg(min_train_nodes=n, min_available_nodes=n)`.
        seed: of the draw; the participants of round t depend only on (seed, t).
        excluded: ids of clients that are never drawn. Another is drawn in the place of one; the
            others take part in the same rounds as without it.
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
        keep: str | None = None,
        dtype: str | None = None,
        evaluate: Callable[[State], Evaluation] | None = None,
        accept_failures: bool = False,
        clients_per_round: int | None = None,
        seed: int = 0,
        excluded: Collection[str] = (),
        arrayrecord_key: str | None = None,
        node_timeout: float = 300,
        on_client: Callable[[int, str, Mapping[str, Any]], None] = lambda *_: None,
        on_round: Callable[[Run], None] = lambda _: None,
    ) -> None:
        kind = type(strategy)
        told = f"strategy must be one of flwr.serverapp.strategy, or a subclass, got {kind.__module__}.{kind.__name__}"
        require(isinstance(strategy, Strategy), told)
        told = f"run must be a Run or the folder of one, got a {type(run).__name__}"
        require(isinstance(run, Run | str | Path), told)
        told = f"nodes must be the app's grid, or a dict of node to client, got a {type(nodes).__name__}"
        require(isinstance(nodes, Mapping) or hasattr(nodes, "get_node_ids"), told)
        told = f"settings must be a dict, got a {type(settings).__name__}"
        require(settings is None or isinstance(settings, Mapping), told)
        self.strategy, self.settings = strategy, settings
        given = {"keep": keep, "dtype": dtype}
        self._storing = {name: value for name, value in given.items() if value is not None}
        Storing(**self._storing)  # refused before anything is asked
        self._given = None if clients is None else _infos(clients)
        self._held, self._holds = ExitStack(), False
        self._run: Run | None
        self._run, self.folder = (run, run.path) if isinstance(run, Run) else (None, Path(run))
        self._owned = self._run is None  # whether this recorder makes the run and checks its settings
        self.options = Options(
            evaluate=evaluate,
            accept_failures=accept_failures,
            clients_per_round=clients_per_round,
            seed=seed,
            excluded=excluded,
            arrayrecord_key=arrayrecord_key or getattr(innermost(strategy), "arrayrecord_key", None),
            node_timeout=node_timeout,
            on_client=on_client,
            on_round=on_round,
            joining=self._owned,
        )
        with ExitStack() as failed:
            failed.callback(self._held.close)
            if self._owned:
                self._hold()
                self._run = Run.open(self.folder) if (self.folder / "run.json").exists() else None
            expected = self._given if self._owned else self.run.clients
            wanted = [client.id for client in expected] if expected else None
            self.nodes: Nodes | KnownNodes
            if isinstance(nodes, Mapping):
                self.nodes = KnownNodes(dict(nodes))
            else:
                self.nodes = Nodes(nodes, node_key, wanted, node_timeout)
            self.nodes.refresh()
            failed.pop_all()

    @property
    def run(self) -> Run:
        """The run. A new one exists from `start` on, which knows its initial model."""
        if self._run is None:
            raise TraceFLError(f"{self.folder} holds no run yet: it is made by start, which is given the initial model")
        return self._run

    def start(self, *args: Any, **kwargs: Any) -> Result:
        """Run the strategy's own `start` until the run holds `num_rounds`.

        Args:
            *args: as of the strategy's `start`: the grid, the model that round 1 starts from, how
                many rounds the run holds in the end, and what else it takes, such as timeout
                (seconds per round). A run that goes on must have started from the same model; its
                last one is taken for it, too.
            **kwargs: the same by name, such as train_config and evaluate_fn.

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
            name = f"{type(self.strategy).__name__}.start"
            call = Call(name, self.strategy.start, args, kwargs)
            self._open(call.initial, call.num_rounds, call.train_config)
            rounds, result = self._go(call, undo)
            went = rounds.index > 0 or call.num_rounds < 1
            require(went, f"{name} went through no round: {CALLS}")
            if self._owned:
                logging.getLogger("flwr").info("TraceFL: %s", disk_line(self.run.disk()))
            return result

    def _go(self, call: Call, undo: ExitStack) -> tuple[Rounds, Result]:
        """Run the strategy's `start`, its rounds watched."""
        unknown = call.evaluate_fn is not None and any("server" not in record.metrics for record in self.run.rounds)
        rounds = Rounds(
            self.strategy,
            self.run,
            self.nodes,
            self.options,
            wanted=call.num_rounds,
            order=list(call.initial),
            reads_all=unknown or type(self.strategy).start is not Strategy.start,
        )
        kept = self.run.global_state(0)
        initial: dict[str, Tensor] = {name: kept[name] for name in call.initial}
        new: dict[str, Any] = {"grid": rounds.view(call.grid), "initial_arrays": ArrayRecord(initial)}
        if call.train_config is not None:  # strategies write the round's number into it
            new["train_config"] = ConfigRecord(dict(call.train_config))
        if call.evaluate_fn is not None:
            new["evaluate_fn"] = rounds.watched_evaluate_fn(call.evaluate_fn)
        rounds.watch(undo)
        return rounds, call.run(new)

    def participants(self, number: int) -> list[str]:
        """The clients drawn for round `number`, in the order of their ids."""
        return draw(self.nodes, self.run, number, self.options)

    def _hold(self) -> None:
        """Take the folder's lock; it is given back when `start` ends."""
        if not self._holds:
            self._held.enter_context(locked(self.folder))
            self._holds = True

    def _open(self, initial: ArrayRecord, num_rounds: int, train_config: ConfigRecord | None) -> None:
        """Create the run, or see that the recorded one is this one."""
        drawn = {"clients_per_round": self.options.clients_per_round, "seed": self.options.seed}
        header = {**drawn, "strategy": settings_of(self.strategy), "train_config": _plain(train_config or {})}
        header |= {} if self.settings is None else {"settings": dict(self.settings)}
        if self._owned and self._run is not None and not self._run.rounds and "strategy" in self._run:
            (self.folder / "run.json").unlink()  # it failed in round 1, perhaps for its settings
            self._storing = vars(self._run.storing) | self._storing
            self._run = None
        if self._owned and self._run is None:
            there = self._wait() if num_rounds else {}
            clients = self._given or [ClientInfo(client) for client in sorted(there.values(), key=by_number)]
            state = initial.to_torch_state_dict()
            storing = Storing(**self._storing)
            self._run = Run.create(self.folder, initial=state, clients=clients, storing=storing, **header)
            logging.getLogger("flwr").info("TraceFL records this run into %s", self.folder.resolve())
        elif self._owned:
            self.run.check_header(**header)
            if self._given is not None:
                self.run.check_clients(self._given)
        state, last = initial.to_torch_state_dict(), len(self.run.rounds)
        if last < num_rounds:
            self.run.check_storing(replace(self.run.storing, **self._storing))
        if not (last and same_state(state, self.run.global_state(last))):
            self.run.check_initial(state)
        if last < num_rounds and (last or not self._owned):
            self._check_known()
        load_state(self.strategy, self.run.strategy_state(last))
        if last and last < num_rounds and self.run.unsaved:
            kept = ", ".join(self.run.unsaved)
            log.warning(
                "%s goes on with round %d; %s changed in the rounds before and is not recorded: "
                "give the strategy state_dict() and load_state_dict(state)", self.folder, last + 1, kept
            )  # fmt: skip

    def _wait(self) -> dict[int, str]:
        least = ("min_available_nodes", "min_train_nodes")
        count = max([1, *(int(getattr(part, name, 1)) for part in parts(self.strategy) for name in least)])
        expected = self._given if self._owned else self.run.clients
        wanted = [] if expected is None or self.options.accept_failures else [client.id for client in expected]
        return self.nodes.wait(count, wanted, strict=not self.options.accept_failures)

    def _check_known(self) -> None:
        """Whoever is there when a run goes on must be one of its clients."""
        there, ids = self._wait(), {client.id for client in self.run.clients}
        for node, client in there.items():
            told = f"{self.folder}: node {node} says that it is client '{client}', which is none of the run's"
            known = ", ".join(sorted(ids, key=by_number))
            require(client in ids or not ids, f"{told} ({known}): start those, or choose another folder")


def _infos(clients: Iterable[ClientInfo | str]) -> list[ClientInfo]:
    """What is known of the clients, of whom some are given by id alone."""
    found = [] if isinstance(clients, str) else [c if isinstance(c, ClientInfo) else ClientInfo(c) for c in clients]
    ids = [client.id for client in found]
    texts = not isinstance(clients, str) and all(isinstance(client, str) for client in ids)
    require(texts, f"clients must be a list of texts or of ClientInfo, got {clients!r:.80}")
    twice = next((client for client in ids if ids.count(client) > 1), None)
    require(twice is None, f"clients must be distinct, got '{twice}' more than once: leave one out")
    return found


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ConfigRecord as JSON holds it."""
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in config.items()}
