"""A recorded federated run: a folder of safetensors with a JSON header.

    run.json                            schema, versions, seed, clients with label counts, the
                                        model's entries in its order, rounds with their metrics,
                                        SHA-256 of every file and of itself; strict JSON
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

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tracefl.errors import require
from tracefl.files import file_stem, holds, read_file, write_atomically, write_state, writing
from tracefl.header import ROUND, SCHEMA, Checker
from tracefl.record import ClientInfo, Participant, Round, state_file, strict
from tracefl.same import NO_HEADER, Compared
from tracefl.sealed import sealed
from tracefl.states import State, StateFile
from tracefl.storage import Storing, packed
from tracefl.training import Evaluation
from tracefl.written import Text, as_read


class Run(Compared):
    """A recorded run, open for reading and, while it is being trained, for adding rounds.

    `clients` lists what the server knows of every client, `rounds` the complete rounds;
    `run["seed"]` reads an entry of the header.

    Example:
        >>> from tracefl.flower import ClientInfo, Evaluation, Run
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
        super().__init__(path, header, written)
        self._text = Text()
        self._checker = Checker(f"the run in {path}", "correct it")
        if holds(path):
            self._remove_states()  # a process may have died before it did

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

        Returns:
            The run, without a round.

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
                start["storage"] = storing.as_json()
            run = cls(path, {**start, "rounds": []})
            run._checker.header(json.loads(sealed(run._json())))
            run._save()
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

        Returns:
            The run, with the rounds that are recorded.

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
        self._check_next(number)
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
        return state_file(file, None, self._base(number), self.entries, self.storing)

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
        self._check_next(number)
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
                failures=dict(sorted(failures.items())),  # they come in any order
                strategy_sha256=sha256.get("strategy"),
                metrics={} if metrics is None else {"train": dict(metrics)},
                weights_from=weights_from,
                **self._place(number),
            )
            told = as_read("rounds", record.as_json())
            ids, ours = {each.id for each in self.clients}, "data_sha256" in self
            self._checker.round(f"round {number}", told, number, ids, ours)
            self.rounds.append(record)
            for index in range(len(self.rounds) - (self.storing.rounds or len(self.rounds))):
                self.rounds[index] = replace(self.rounds[index], kept=False)
            self._save()
            self._remove_states()
            self._remove_strays(record)

    def record_metrics(self, number: int, kind: str, metrics: Mapping[str, Any] | None) -> None:
        """Add metrics of a recorded round, or of the initial model (round 0).

        Args:
            number: the round's.
            kind: "evaluate", the mean of what clients found; or "server", what evaluate_fn found.
            metrics: name -> number or list of numbers; None: there were none.
        """
        found = None if metrics is None else dict(metrics)
        told = as_read("metrics", strict({kind: found}))
        self._checker.entry(f"round {number}: metrics", told, ROUND["metrics"])
        if number:
            record = self.round(number)
            self.rounds[number - 1] = replace(record, metrics={**record.metrics, kind: found})
        else:
            self._header["initial_metrics"] = {**self.metrics(0), kind: found}
        self._save()

    def add_client(self, client: ClientInfo) -> None:
        """Add a client that joined after the run was created; it is saved with the next round.

        Args:
            client: what is known of it.

        Raises:
            TraceFLError: the run has a client of this id, or another entry is not as it must be.
        """
        self._checker.client(f"client {client.id!r}", as_read("clients", asdict(client)))
        self._checker.once("clients", [each.id for each in (*self.clients, client)])
        self.clients.append(client)

    def note_unsaved(self, names: list[str]) -> None:
        """Say what the strategy keeps that is not recorded; it is saved with the next round."""
        self._header["unsaved"] = names

    def _remove_states(self) -> None:
        """Remove the clients' states that are not kept; run.json says so by now."""
        for record in self.rounds:
            if not record.kept and (record.folder / "clients").exists():
                shutil.rmtree(record.folder / "clients", ignore_errors=True)

    def _remove_strays(self, record: Round) -> None:
        """Remove states of a round that is no part of it: an earlier attempt had other clients."""
        named = {record.folder / client.file for client in record.clients}
        for file in (record.folder / "clients").glob("*.safetensors"):
            if file not in named:
                file.unlink(missing_ok=True)

    def _check_next(self, number: int) -> None:
        """Recorded rounds are not written over."""
        follows = f"{self.path} has {len(self.rounds)} rounds: the next is round {len(self.rounds) + 1}"
        require(number == len(self.rounds) + 1, f"{follows}, got {number}")

    def _check_unchanged(self) -> None:
        """Refuse to write after another writer, whose rounds would be lost."""
        file, again = self.path / "run.json", "open the run again"
        changed = f"{file} was changed by another writer since it was opened: {again}"
        require((read_file(file, again) if file.exists() else b"") == self._written, changed)

    def _json(self) -> str:
        """run.json, not sealed yet."""
        header = {**self._header, "initial_metrics": strict(self.metrics(0)), "schema": SCHEMA}
        return self._text.of(header, self.clients, self.rounds)

    def _save(self) -> None:
        """Write run.json.

        Raises:
            TraceFLError: another writer has changed it since, or an entry is no plain JSON.
        """
        content = sealed(self._json())
        with writing(self.path):
            self._check_unchanged()
            write_atomically(self.path / "run.json", content)
        self._written = content
