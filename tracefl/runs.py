"""A recorded federated run: a folder of safetensors with a JSON header.

    run.json                            schema, versions, seed, clients with label counts, the
                                        model's entries in its order, rounds with their metrics,
                                        SHA-256 of every file; strict JSON
    config.yaml                         the resolved configuration
    rounds/0000/global.safetensors      the initial model
    rounds/0003/global.safetensors      the released model of round 3
    rounds/0003/clients/7.safetensors   client 7's model as received (`file_stem`)
    rounds/0003/predictions.safetensors class predicted for every example of the server, if it has
    rounds/0003/strategy.safetensors    what the strategy carries to the next round, if anything

Every file is written under a temporary name, flushed to disk and renamed. A round exists once
run.json names it, so a crash loses no complete round; what an interrupted round left behind is
overwritten when that round runs again. Whoever writes holds the folder's lock (`locked`), and a
recording is never written over: `Run.create` refuses, `Run.open_or_create` goes on with it.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor, nn

from tracefl.data.examples import Examples, load_examples
from tracefl.errors import TraceFLError, as_sentence, require
from tracefl.states import State, StateFile, as_file
from tracefl.storage import PackedFile, Storing, packed
from tracefl.training import Evaluation

if TYPE_CHECKING:
    from tracefl.provenance.result import Provenance

SCHEMA, PACKED_SCHEMA = 2, 3  # 3: clients' states may be gone, differences or rounded (`storage`)
READABLE = (1, 2, 3)  # 1: without the order of entries and metrics, always with predictions
log = logging.getLogger("tracefl")
NO_HEADER = ("schema", "initial_sha256", "entries", "clients", "rounds", "initial_metrics", "unsaved", "storage")


@dataclass(frozen=True)
class Participant:
    """A client that took part in a round.

    `weight` is p_k, the share with which the strategy took its update: n_k / sum of n over the
    updates that it used, or the same for each; 0 for an update that it did not use
    (`Round.weights_from`). `num_examples` is 0 where the client did not say it. `file` is relative
    to the round's folder.
    """

    id: str
    num_examples: int
    weight: float
    file: str
    sha256: str


@dataclass(frozen=True)
class Round:
    """One complete round.

    `loss` and `accuracy` are the released model's on the server's data, None where it has none.
    `metrics` are those of the clients' training ("train"), of their evaluation ("evaluate") and of
    the app's evaluate_fn ("server"). `weights_from` says where p_k are from: "strategy", as it
    averaged; "models", found from the released model, which is that mean of the updates; or
    "assumed", in proportion to num-examples, since neither could be had. `kept` is False where the
    clients' states are gone (storage.keep=last:N).
    """

    folder: Path = field(compare=False, repr=False)  # where its files are
    base: StateFile = field(compare=False, repr=False)  # the model that it began with
    number: int
    clients: list[Participant]
    global_sha256: str
    predictions_sha256: str | None
    loss: float | None
    accuracy: float | None
    failures: dict[str, str] = field(default_factory=dict)  # client id -> why it was left out
    strategy_sha256: str | None = None  # of what the strategy carries to the next round
    metrics: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    weights_from: str = "strategy"
    kept: bool = True
    entries: Sequence[str] = field(default=(), compare=False, repr=False)  # of the model, in its order
    storing: Storing = field(default_factory=Storing, compare=False, repr=False)  # of the run

    def as_json(self) -> dict[str, Any]:
        """The record as run.json holds it."""
        names = [entry.name for entry in fields(self) if entry.compare and not (entry.name == "kept" and self.kept)]
        record = {name: _strict(getattr(self, name)) for name in names}
        return record | {"clients": _strict([asdict(client) for client in self.clients])}

    def client_state(self, client_id: str) -> StateFile:
        """The model that a client sent, as received; a tensor is read when it is asked for.

        Raises:
            TraceFLError: the client did not take part, its state is not kept, or (on reading) its
                file is damaged.
        """
        participants = {client.id: client for client in self.clients}
        took_part = f"its participants were {', '.join(participants)}"
        require(client_id in participants, f"client '{client_id}' took no part in round {self.number}: {took_part}")
        gone = f"the clients' states of round {self.number} are gone, as storage.keep={self.storing.keep} asks"
        require(self.kept, f"{gone}: choose a later round, or train again with storage.keep=all or deltas")
        file, sha256 = self.folder / participants[client_id].file, participants[client_id].sha256
        return _state_file(file, sha256, self.base, self.entries, self.storing)


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows of a client.

    Args:
        id: the client's id, any string: "0", "hospital/berlin", ...
        label_counts: label -> number of training examples that the client holds, where known.
        flipped_label_counts: of a faulty client, the same for the labels that it trains on.
        fault: of a faulty client, the kind of its fault.

    Example:
        >>> ClientInfo("3", {0: 10, 1: 5}, flipped_label_counts={0: 15}).trained_label_counts
        {0: 15}
    """

    id: str
    label_counts: dict[int, int] = field(default_factory=dict)
    flipped_label_counts: dict[int, int] | None = None
    fault: str | None = None

    @property
    def trained_label_counts(self) -> dict[int, int]:
        """Label -> number of examples that the client trains on with that label."""
        return self.label_counts if self.flipped_label_counts is None else self.flipped_label_counts


class Run:
    """A recorded run, open for reading and, while it is being trained, for adding rounds.

    `clients` lists what the server knows of every client, `rounds` the complete rounds;
    `run["seed"]` reads an entry of the header.

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.mkdtemp()
        >>> initial, clients = {"w": torch.zeros(2)}, [ClientInfo("0", {7: 3})]
        >>> run = Run.create(folder, initial=initial, clients=clients, seed=0)
        >>> sent = {"w": torch.ones(2)}
        >>> part = run.record_client(1, "0", sent, num_examples=3, weight=1.0)
        >>> evaluation = Evaluation(loss=0.5, accuracy=1.0, predictions=torch.tensor([7]))
        >>> run.record_round(1, [part], sent, evaluation, failures={})
        >>> Run.open(folder).round(1).client_state("0")["w"].tolist()
        [1.0, 1.0]
    """

    def __init__(self, path: Path, header: dict[str, Any], written: bytes = b"") -> None:
        self.path = path
        self._header = header
        self._written = written  # run.json as this object last read or wrote it
        self.clients = [_client_from_json(entry) for entry in header["clients"]]
        told = header.get("storage", {}) if header["schema"] == PACKED_SCHEMA else {}
        known = isinstance(told, dict) and told.keys() <= vars(Storing()).keys()
        require(known, f"{path / 'run.json'}: storage must hold keep and dtype, got {told!r}: restore it")
        self.storing = Storing(**told)
        self._texts: dict[str, list[tuple[Any, str]]] = {}  # clients and rounds as run.json has them
        self._last_base: tuple[int, StateFile] = 0, StateFile(path)
        self.rounds = list[Round]()
        for entry in header["rounds"]:
            self.rounds.append(self._round_from_json(entry))

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Open a recorded run. Its files are compared with their hashes when they are read.

        Args:
            path: the run's folder.

        Raises:
            TraceFLError: there is no run at `path`, or its header cannot be read.
        """
        path = Path(path)
        try:
            written = (path / "run.json").read_bytes()
            header = json.loads(written)
        except FileNotFoundError:
            raise TraceFLError(f"{path} holds no recorded run (no run.json): give a run's folder") from None
        except ValueError as error:
            raise TraceFLError(f"{path / 'run.json'} is no JSON ({error}): restore it or train again") from error
        schema = header.get("schema") if isinstance(header, dict) else None
        known = f"{', '.join(map(str, READABLE[:-1]))} or {READABLE[-1]}"
        require(schema in READABLE, f"the schema of {path} must be {known}, got {schema}: train the run again")
        return cls(path, header, written)

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        initial: State,
        clients: list[ClientInfo],
        storing: Storing | None = None,
        **header: Any,
    ) -> "Run":
        """Start a run where none is recorded.

        Args:
            path: the run's folder; it is made if it is not there.
            initial: state dict of the model that the first round starts from, in the model's order.
            clients: every client of the federation that is known by now (`add_client`).
            storing: what is kept of the clients' states; default: everything, as it was sent.
            **header: further entries of run.json, plain JSON; tracing a configuration's run needs
                `seed`, an int.

        Raises:
            TraceFLError: `path` holds a recorded run, or another process writes there.
        """
        path = Path(path)
        with writing(path):
            held = f"{path} holds a recorded run, which is not written over"
            remedy = "go on with it by Run.open_or_create, or choose another folder"
            require(not (path / "run.json").exists(), f"{held}: {remedy}")
            lost = f"{path} holds rounds but no run.json: restore it, or choose another folder"
            require(not (path / "rounds" / "0001" / "global.safetensors").exists(), lost)
            entries, again = list(initial), [name for name in NO_HEADER if name in header]
            require(not again, f"run.json has an entry '{again[:1]}' of its own: give yours another name")
            sha256 = write_state(path / "rounds" / "0000" / "global.safetensors", initial)
            start = {"schema": SCHEMA, **header, "initial_sha256": sha256, "entries": entries, "initial_metrics": {}}
            start["clients"] = [asdict(client) for client in clients]
            if storing is not None and not storing.usual:
                start |= {"schema": PACKED_SCHEMA, "storage": storing.as_json()}
            cls(path, {**start, "rounds": []})._save()
            return cls.open(path)

    @classmethod
    def open_or_create(
        cls,
        path: str | Path,
        *,
        initial: State,
        clients: list[ClientInfo],
        storing: Storing | None = None,
        **header: Any,
    ) -> "Run":
        """The run that is recorded at `path`, to go on with; or else a new one.

        Args:
            path: the run's folder.
            initial: as of `create`; a recorded run must have started from the same.
            clients: as of `create`; a recorded run must have all of these, the same.
            storing: as of `create`; a recorded run must have the same. Default: as it was recorded.
            **header: as of `create`; where a recorded run has these entries, they must be the same.

        Raises:
            TraceFLError: the recorded run differs; the message names in what.
        """
        path = Path(path)
        if not (path / "run.json").exists():
            return cls.create(path, initial=initial, clients=clients, storing=storing, **header)
        run = cls.open(path)
        if storing is not None:
            run.check_storing(storing)
        run.check_initial(initial)
        run.check_clients(clients)
        run.check_header(**header)
        return run

    def check_initial(self, initial: State) -> None:
        """Refuse another initial model than the recorded one.

        Raises:
            TraceFLError: an entry differs; the message names it.
        """
        recorded = self.global_state(0)
        differing = sorted(recorded.keys() ^ initial.keys()) or [
            name for name, value in recorded.items() if not _same(value, initial[name])
        ]
        told = f"the run in {self.path} started from another model than the one given: "
        what = f"'{differing[0]}' differs" if differing else ""
        seed = "draw the initial model after torch.manual_seed(...)"
        own = "or give the recorded one, dict(Run.open(folder).global_state(0))"
        require(not differing, f"{told}{what}; {seed}, {own}, or choose another folder")

    def check_clients(self, clients: list[ClientInfo]) -> None:
        """Refuse clients that differ from those of the run.

        Raises:
            TraceFLError: the run lacks one of them or knows another one; the message names it.
        """
        there = {client.id: client for client in self.clients}
        given = {client.id: client for client in clients}
        for name in given.keys() ^ there.keys():
            whose = "is none of the run's" if name in given else "of the run is not given"
            ids = ", ".join(there)
            raise TraceFLError(f"{self.path}: client '{name}' {whose} ({ids}): give the same or choose another folder")
        for name, client in given.items():
            known = there[name]
            told = f"client '{name}' was recorded with label counts {known.label_counts}, got {client.label_counts}"
            require(known == client, f"{self.path}: {told}: give the same or choose another folder")

    def check_storing(self, storing: Storing) -> None:
        """Refuse to go on with other storage settings than the recorded ones.

        Raises:
            TraceFLError: one differs; the message names it.
        """
        for name, was in vars(self.storing).items():
            key, now = f"storage.{name}", getattr(storing, name)
            told = f"the run in {self.path} was recorded with {key}={was}, got {now}"
            require(was == now, f"{told}: give {key}={was} to go on with it, or choose another folder (exp_key)")

    def check_header(self, **header: Any) -> None:
        """Refuse entries of run.json that differ from the recorded ones; it may lack some.

        Raises:
            TraceFLError: one differs; the message names it.
        """
        mine = {key: value for key, value in self._header.items() if key not in NO_HEADER}
        header = {key: value for key, value in header.items() if key in mine}
        plain = f"the entries {', '.join(header)} must be plain JSON: numbers, strings, lists and dicts"
        with as_sentence(plain, "give those", TypeError, ValueError):
            given = json.loads(json.dumps(_strict(header)))
        for key, was, now in _differences(mine, given):
            told = f"the run in {self.path} was recorded with {key}={was!r}, got {now!r}"
            raise TraceFLError(f"{told}: give the same or choose another folder")

    def __getitem__(self, key: str) -> Any:
        """An entry of the header, for example `run["seed"]`.

        Raises:
            TraceFLError: the run was recorded without it.
        """
        missing = f"{self.path / 'run.json'} has no entry '{key}': give it to Run.create, or train again"
        require(key in self._header, missing)
        return self._header[key]

    def __contains__(self, key: str) -> bool:
        """Whether the header has the entry."""
        return key in self._header

    def round(self, number: int) -> Round:
        """Round `number`, counted from 1: its record, and the states of its clients.

        Raises:
            TraceFLError: it is not recorded.
        """
        there = 1 <= number <= len(self.rounds)
        require(there, f"round {number} is not recorded in {self.path}: it has rounds 1 to {len(self.rounds)}")
        return self.rounds[number - 1]

    def global_state(self, number: int) -> StateFile:
        """The model released by round `number`; 0 is the initial model."""
        sha256 = self._header["initial_sha256"] if number == 0 else self.round(number).global_sha256
        return StateFile(self._file(number, "global"), sha256, order=self.entries)

    @property
    def entries(self) -> list[str]:
        """Names of the model's entries in its order; empty for a run recorded before 0.2."""
        return self._header.get("entries", [])

    def client_states(self, number: int) -> dict[str, StateFile]:
        """Client id -> the model that it sent, of every participant of a round.

        Raises:
            TraceFLError: a file is missing or damaged, or the states are not kept; all are compared
                with their hashes here.
        """
        record = self.round(number)
        states = {client.id: record.client_state(client.id) for client in record.clients}
        for state in states.values():
            state.check()
        return states

    def model(self, number: int) -> nn.Module:
        """The model released by round `number` (0: the initial one), on the CPU in evaluation mode.

        Raises:
            TraceFLError: the run is an own Flower app's, which knows how its model is built.
        """
        from tracefl.models import build_model, load_exchanged_state

        model = build_model(self["model"])
        load_exchanged_state(model, self.global_state(number))
        return model.eval()

    def server_examples(self) -> Examples:
        """The server's examples, in the order of `predictions`.

        Raises:
            TraceFLError: the run is one of an own Flower app, or its data are gone.
        """
        file = self.path / self["data_folder"] / "server.safetensors"
        gone = f"the server's examples of {self.path} cannot be read from {file}"
        with as_sentence(gone, "put the run where it was, or train again", OSError, SafetensorError, KeyError):
            return load_examples(file)

    def trace(
        self,
        index: int | Sequence[int] | None = None,
        *,
        round: int | None = None,
        method: str = "influence",
        inputs: Any = None,
        model: nn.Module | None = None,
        **options: Any,
    ) -> "Provenance":
        """Which clients are responsible for predictions of a round's global model.

        Args:
            index: the number of an example of the server, or several, from 0.
            round: of the global model, from 1; default: the last one.
            method: as in `tracefl.trace`. Shares are weighted as the round took its updates;
                "neuron" takes no weights, as the paper, unless they are given.
            inputs: of your own, as the model takes them, in place of `index`.
            model: of a run of an own Flower app, its model. A copy gets the round's weights; what
                was not exchanged stays as it is there.
            **options: further arguments of `tracefl.trace`, such as `targets`; default: the
                predicted classes.

        Returns:
            The contributions of the round's participants, see `Provenance`.

        Raises:
            TraceFLError: no such round or example, the run knows no model or no server data, a
                file is damaged, or what `tracefl.trace` raises.
        """
        from tracefl.evaluation.recorded import trace_recorded  # a later room

        answer = trace_recorded(self, index, round, inputs, model, method, options)
        number = round or len(self.rounds)
        if self.round(number).weights_from == "assumed":
            told = "round %d: how the strategy weighed the updates is not known; shares go by num-examples"
            log.warning(told, number)
        if not self.storing.exact:
            rounded = "round %d: the answer is of clients' states that are rounded to %s (storage.dtype)"
            log.warning(rounded, number, self.storing.dtype)
        return answer

    def predictions(self, number: int) -> Tensor:
        """What round `number`'s global model predicts for the server's examples, int64 [N].

        Raises:
            TraceFLError: the run was recorded without `evaluate`.
        """
        sha256 = self.round(number).predictions_sha256
        without = f"round {number} of {self.path} has no predictions: it was recorded without evaluate"
        require(sha256, f"{without}; give trace the inputs and targets")
        return StateFile(self._file(number, "predictions"), sha256)["predictions"]

    def strategy_state(self, number: int) -> State:
        """What the strategy carries from round `number` to the next; empty if nothing."""
        sha256 = self.round(number).strategy_sha256 if number else None
        return StateFile(self._file(number, "strategy"), sha256) if sha256 else {}

    def record_client(
        self, number: int, client: str, state: State, num_examples: int, weight: float = 0
    ) -> Participant:
        """Write a client's model of a round that is not complete yet.

        Args:
            number: the round's, one more than the last one's.
            client: the client's id.
            state: state dict of its model, as received.
            num_examples: how many examples it trained on.
            weight: p_k; or 0 until the strategy has used it.

        Returns:
            What `record_round` takes.
        """
        name, metadata = f"clients/{file_stem(client)}", None
        if not self.storing.plain:
            state, metadata = packed(state, self._base(number), self.storing)
        with writing(self.path):
            self._check_unchanged()
            sha256 = write_state(self._file(number, name), state, metadata)
        return Participant(client, num_examples, weight, f"{name}.safetensors", sha256)

    def forget_client(self, number: int, client: Participant) -> None:
        """Remove what `record_client` has written of a round that is not complete yet."""
        (self._file(number, "global").parent / client.file).unlink(missing_ok=True)

    def received(self, number: int, client: Participant) -> StateFile:
        """What `record_client` has written, also of a round that is not complete yet."""
        file = self._file(number, "global").parent / client.file
        return _state_file(file, None, self._base(number), self.entries, self.storing)

    def record_round(
        self,
        number: int,
        clients: list[Participant],
        released: State,
        evaluation: Evaluation | None,
        failures: dict[str, str],
        strategy_state: State | None = None,
        metrics: Mapping[str, Any] | None = None,
        weights_from: str = "strategy",
    ) -> None:
        """Complete a round: from now on it is part of the run.

        Args:
            number: the round's, one more than the last one's.
            clients: the participants, as `record_client` has returned them, with their weights.
            released: state dict of the new global model.
            evaluation: its loss, accuracy and predictions on the server's examples; None: it has
                none.
            failures: client id -> why the client was left out.
            strategy_state: what the strategy carries to the next round.
            metrics: the mean of the clients' metrics, as the strategy returns it.
            weights_from: where the participants' weights are from (`Round`).
        """
        predictions = {"predictions": evaluation.predictions} if evaluation else None
        states = {"global": released, "predictions": predictions, "strategy": strategy_state}
        with writing(self.path):
            self._check_unchanged()
            sha256 = {name: write_state(self._file(number, name), state) for name, state in states.items() if state}
            record = Round(
                number=number,
                clients=clients,
                global_sha256=sha256["global"],
                predictions_sha256=sha256.get("predictions"),
                loss=evaluation.loss if evaluation else None,
                accuracy=evaluation.accuracy if evaluation else None,
                failures=failures,
                strategy_sha256=sha256.get("strategy"),
                metrics={} if metrics is None else {"train": dict(metrics)},
                weights_from=weights_from,
                **self._place(number),
            )
            self.rounds.append(record)
            for index in range(len(self.rounds) - (self.storing.rounds or len(self.rounds))):
                self.rounds[index] = replace(self.rounds[index], kept=False)
            self._save()
            self._remove_states()

    def record_metrics(self, number: int, kind: str, metrics: Mapping[str, Any] | None) -> None:
        """Add metrics of a recorded round, or of the initial model (round 0).

        Args:
            number: the round's.
            kind: "evaluate", the mean of what clients found; or "server", what evaluate_fn found.
            metrics: name -> number or list of numbers; None: there were none.
        """
        found = None if metrics is None else dict(metrics)
        if number:
            record = self.round(number)
            self.rounds[number - 1] = replace(record, metrics={**record.metrics, kind: found})
        else:
            self._header["initial_metrics"] = {**self.metrics(0), kind: found}
        self._save()

    def metrics(self, number: int) -> dict[str, dict[str, Any] | None]:
        """Metrics of a round by kind, as `Round.metrics`; 0: of the initial model."""
        return self.round(number).metrics if number else _numbers(self._header.get("initial_metrics", {}))

    def add_client(self, client: ClientInfo) -> None:
        """Add a client that joined after the run was created; it is saved with the next round."""
        self.clients.append(client)

    @property
    def unsaved(self) -> list[str]:
        """What the strategy kept from round to round that is not recorded: "Class.attribute"."""
        return self._header.get("unsaved", [])

    def note_unsaved(self, names: list[str]) -> None:
        """Say what the strategy keeps that is not recorded; it is saved with the next round."""
        self._header["unsaved"] = names

    @property
    def kept_rounds(self) -> list[Round]:
        """The rounds whose clients' states are there: those that can be traced."""
        return [record for record in self.rounds if record.kept]

    def disk(self) -> dict[int, int]:
        """Bytes on disk of every round's folder; round 0 is the initial model."""
        numbers = range(len(self.rounds) + 1)
        folders = {number: self._file(number, "global").parent for number in numbers}
        return {
            number: sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
            for number, folder in folders.items()
        }

    def _remove_states(self) -> None:
        """Remove the clients' states that are not kept; run.json says so by now."""
        for record in self.rounds:
            if not record.kept and (record.folder / "clients").exists():
                shutil.rmtree(record.folder / "clients", ignore_errors=True)

    def _place(self, number: int) -> dict[str, Any]:
        """What a round knows of its run."""
        folder = self._file(number, "global").parent
        return {"folder": folder, "base": self._base(number), "entries": self.entries, "storing": self.storing}

    def _base(self, number: int) -> StateFile:
        """The model that a round begins with: one object, so that its hash is compared once."""
        if self._last_base[0] != number:
            self._last_base = number, self.global_state(number - 1)
        return self._last_base[1]

    def _file(self, number: int, name: str) -> Path:
        return self.path / "rounds" / f"{number:04d}" / f"{name}.safetensors"

    def _round_from_json(self, entry: dict[str, Any]) -> Round:
        entry = entry | {name: _numbers(entry[name]) for name in ("loss", "accuracy", "metrics") if name in entry}
        clients = [Participant(**client) for client in entry["clients"]]
        return Round(**{**entry, "clients": clients, **self._place(entry["number"])})

    def _check_unchanged(self) -> None:
        """Refuse to write after another writer, whose rounds would be lost."""
        file = self.path / "run.json"
        changed = f"{file} was changed by another writer since it was opened: open the run again"
        require((file.read_bytes() if file.exists() else b"") == self._written, changed)

    def _list_json(self, key: str, entries: Sequence[ClientInfo | Round]) -> str:
        """The clients or rounds as run.json holds them. Text is kept: it is most of the work."""
        kept, texts = self._texts.get(key, []), list[tuple[Any, str]]()
        for index, entry in enumerate(entries):
            if index < len(kept) and kept[index][0] is entry:
                texts.append(kept[index])
            else:
                value = entry.as_json() if isinstance(entry, Round) else asdict(entry)
                texts.append((entry, _json(key, value, 2)))
        self._texts[key] = texts
        return "[\n  " + ",\n  ".join(text for _, text in texts) + "\n ]" if texts else "[]"

    def _save(self) -> None:
        """Write run.json.

        Raises:
            TraceFLError: another writer has changed it since, or an entry is no plain JSON.
        """
        file, header = self.path / "run.json", {**self._header, "initial_metrics": _strict(self.metrics(0))}
        header |= {"schema": SCHEMA if self.storing.usual else PACKED_SCHEMA, "clients": [], "rounds": []}
        entries = {key: _json(key, value, 1) for key, value in header.items()}
        entries["clients"] = self._list_json("clients", self.clients)
        entries["rounds"] = self._list_json("rounds", self.rounds)
        content = ("{\n " + ",\n ".join(f"{json.dumps(key)}: {text}" for key, text in entries.items()) + "\n}").encode()
        with writing(self.path):
            self._check_unchanged()
            write_atomically(file, content)
        self._written = content


def _state_file(file: Path, sha256: str | None, base: StateFile, entries: Sequence[str], storing: Storing) -> StateFile:
    """A client's file, whatever it holds; `base` is the model that the round began with."""
    if storing.plain:
        return StateFile(file, sha256, order=entries)
    return PackedFile(file, base, sha256, entries)


def _json(key: str, value: Any, depth: int) -> str:
    """A value of run.json as text, `depth` levels deep in it."""
    try:
        return json.dumps(value, indent=1, allow_nan=False).replace("\n", "\n" + " " * depth)
    except (TypeError, ValueError) as error:
        plain = "must be plain JSON: numbers, strings, lists and dicts"
        raise TraceFLError(f"run.json's entry '{key}' {plain} ({error})") from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder for writing.

    Raises:
        TraceFLError: another process, or another part of this one, holds it; it is not waited for.
    """
    with as_sentence(f"{folder} cannot be made for a run", "choose another folder", OSError):
        folder.mkdir(parents=True, exist_ok=True)
    lock, busy = _lock(folder), f"{folder} is being written by another process"
    remedy = "wait for it, or choose another folder (exp_key)"
    require(not lock.is_locked, f"{folder} is being written by another process or recorder: {remedy}")
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        raise TraceFLError(f"{busy}: {remedy}") from None
    except OSError as error:
        raise TraceFLError(f"{folder} cannot be written to ({error.strerror}): choose another folder") from error
    with held:
        yield


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """The same for a moment, unless this process holds the folder already."""
    if _lock(folder).is_locked:
        yield
    else:
        with locked(folder):
            yield


def _lock(folder: Path) -> FileLock:
    """The lock of a folder: one object in this process, held by all its threads."""
    return FileLock(folder.resolve() / ".lock", is_singleton=True, thread_local=False)


def file_stem(client: str) -> str:
    """A name for a client's file: the id where it is plain, else quoted and told apart by its hash.

    No id leads out of the folder, and none is another's on a disk that ignores upper case.

    Example:
        >>> file_stem("7"), file_stem("../b")
        ('7', '..%2Fb-95cd9069')
    """
    if re.fullmatch(r"[a-z0-9_-]{1,64}", client):
        return client
    return f"{quote(client, safe='')[:100]}-{hashlib.sha256(client.encode()).hexdigest()[:8]}"


def write_state(file: Path, state: State, metadata: dict[str, str] | None = None) -> str:
    """Write a state dict as safetensors, atomically; return the file's SHA-256.

    Each tensor is hashed and written from where it is.

    Raises:
        TraceFLError: a tensor is of a type that the format does not know.
    """
    parts, digest = as_file(state, metadata), hashlib.sha256()
    for part in parts:
        digest.update(part)
    write_atomically(file, *parts)
    return digest.hexdigest()


def write_atomically(file: Path, *content: bytes | memoryview) -> None:
    """Write so that the file has its old content or the new one, also after a power cut."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.tmp")
    with partial.open("wb") as handle:
        for part in content:
            handle.write(part)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, file)


def _client_from_json(entry: dict[str, Any]) -> ClientInfo:
    """JSON's keys are strings, labels are numbers."""
    names = ("label_counts", "flipped_label_counts")
    counts = {name: entry[name] and {int(label): n for label, n in entry[name].items()} for name in names}
    return ClientInfo(**{**entry, **counts})


def same_state(a: State, b: State) -> bool:
    """Whether two states hold the same entries with the same values."""
    return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _strict(value: Any) -> Any:
    """JSON knows no infinity and no NaN: they become "inf", "-inf" and "nan"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _strict(entry) for name, entry in value.items()}
    return [_strict(entry) for entry in value] if isinstance(value, list | tuple) else value


def _numbers(value: Any) -> Any:
    """Loss, accuracy and metrics as they were before `_strict`."""
    if isinstance(value, dict):
        return {name: _numbers(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    return float(value) if isinstance(value, str) else value


def _differences(was: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, recorded, given) of what differs; only keys that are given count at the top."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        if was != now:
            yield key, was, now
        return
    for name in now if not key else sorted(was.keys() | now.keys()):
        yield from _differences(was.get(name), now.get(name), f"{key}.{name}" if key else name)
