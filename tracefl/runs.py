"""A recorded federated run: a folder of safetensors with a JSON header.

    run.json                            schema, versions, seed, clients with label counts, rounds,
                                        SHA-256 of every file
    config.yaml                         the resolved configuration
    rounds/0000/global.safetensors      the initial model
    rounds/0003/global.safetensors      the released model of round 3
    rounds/0003/clients/7.safetensors   client 7's model as received
    rounds/0003/predictions.safetensors class predicted for every example of the server
    rounds/0003/strategy.safetensors    moments of a server optimizer, where there is one

Every file is written under a temporary name, flushed to disk and renamed. A round exists once
run.json names it, so a crash loses no complete round; what an interrupted round left behind is
overwritten when that round runs again.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from tracefl.data.examples import Examples, load_examples
from tracefl.errors import TraceFLError, as_sentence, require
from tracefl.states import State, StateFile
from tracefl.training import Evaluation

if TYPE_CHECKING:
    from tracefl.provenance.result import Provenance

SCHEMA = 1


@dataclass(frozen=True)
class Participant:
    """A client that took part in a round.

    `weight` is p_k, the share with which the strategy took its update: n_k / sum of n over the
    updates that it used, or the same for each; 0 for an update that it did not use. `file` is
    relative to the round's folder.
    """

    id: str
    num_examples: int
    weight: float
    file: str
    sha256: str


@dataclass(frozen=True)
class Round:
    """One complete round. `loss` and `accuracy` are the released model's on the server's data."""

    folder: Path = field(compare=False, repr=False)  # where its files are
    number: int
    clients: list[Participant]
    global_sha256: str
    predictions_sha256: str
    loss: float
    accuracy: float
    failures: dict[str, str] = field(default_factory=dict)  # client id -> why it was left out
    strategy_sha256: str | None = None  # of what a server optimizer carries to the next round

    def as_json(self) -> dict[str, Any]:
        """The record as run.json holds it."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}

    def client_state(self, client_id: str) -> StateFile:
        """The model that a client sent, as received; a tensor is read when it is asked for.

        Raises:
            TraceFLError: the client did not take part, or (on reading) its file is damaged.
        """
        participants = {client.id: client for client in self.clients}
        took_part = f"its participants were {', '.join(participants)}"
        require(client_id in participants, f"client '{client_id}' took no part in round {self.number}: {took_part}")
        return StateFile(self.folder / participants[client_id].file, participants[client_id].sha256)


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows of a client.

    Args:
        id: the client's id, "0", "1", ...
        label_counts: label -> number of training examples that the client holds.
        flipped_label_counts: of a faulty client, the same for the labels that it trains on.
        fault: of a faulty client, the kind of its fault.

    Example:
        >>> ClientInfo("3", {0: 10, 1: 5}, flipped_label_counts={0: 15}).trained_label_counts
        {0: 15}
    """

    id: str
    label_counts: dict[int, int]
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

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self._header = header
        self.clients = [_client_from_json(entry) for entry in header["clients"]]
        self.rounds = [self._round_from_json(entry) for entry in header["rounds"]]

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
            header = json.loads((path / "run.json").read_text())
        except FileNotFoundError:
            raise TraceFLError(f"{path} holds no recorded run (no run.json): give a run's folder") from None
        except json.JSONDecodeError as error:
            raise TraceFLError(f"{path / 'run.json'} is no JSON ({error}): restore it or train again") from error
        schema = header.get("schema")
        require(schema == SCHEMA, f"the schema of {path} must be {SCHEMA}, got {schema}: train the run again")
        return cls(path, header)

    @classmethod
    def create(cls, path: str | Path, *, initial: State, clients: list[ClientInfo], **header: Any) -> "Run":
        """Start a run, in place of one that may be recorded at `path`.

        Args:
            path: the run's folder; it is made if it is not there.
            initial: state dict of the model that the first round starts from.
            clients: every client of the federation.
            **header: further entries of run.json, plain JSON; tracing needs `seed`, an int.
        """
        path = Path(path)
        sha256 = write_state(path / "rounds" / "0000" / "global.safetensors", initial)
        start = {"schema": SCHEMA, **header, "initial_sha256": sha256, "clients": [asdict(c) for c in clients]}
        cls(path, {**start, "rounds": []})._save()
        return cls.open(path)

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
        return StateFile(self._file(number, "global"), sha256)

    def client_states(self, number: int) -> dict[str, StateFile]:
        """Client id -> the model that it sent, of every participant of a round.

        Raises:
            TraceFLError: a file is missing or damaged; all are compared with their hashes here.
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

        return trace_recorded(self, index, round, inputs, model, method, options)

    def predictions(self, number: int) -> Tensor:
        """What round `number`'s global model predicts for the server's examples, int64 [N]."""
        sha256 = self.round(number).predictions_sha256
        return StateFile(self._file(number, "predictions"), sha256)["predictions"]

    def strategy_state(self, number: int) -> State:
        """Moments that the server's optimizer keeps after round `number`; empty if it has none."""
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
        name = f"clients/{client}"
        sha256 = write_state(self._file(number, name), state)
        return Participant(client, num_examples, weight, f"{name}.safetensors", sha256)

    def record_round(
        self,
        number: int,
        clients: list[Participant],
        released: State,
        evaluation: Evaluation,
        failures: dict[str, str],
        strategy_state: State | None = None,
    ) -> None:
        """Complete a round: from now on it is part of the run.

        Args:
            number: the round's, one more than the last one's.
            clients: the participants, as `record_client` has returned them, with their weights.
            released: state dict of the new global model.
            evaluation: its loss, accuracy and predictions on the server's examples.
            failures: client id -> why the client was left out.
            strategy_state: the moments that a server optimizer keeps.
        """
        predictions = {"predictions": evaluation.predictions}
        states = {"global": released, "predictions": predictions, "strategy": strategy_state}
        sha256 = {name: write_state(self._file(number, name), state) for name, state in states.items() if state}
        hashes, judged = (sha256["global"], sha256["predictions"]), (evaluation.loss, evaluation.accuracy)
        folder = self._file(number, "global").parent
        self.rounds.append(Round(folder, number, clients, *hashes, *judged, failures, sha256.get("strategy")))
        self._save()

    def _file(self, number: int, name: str) -> Path:
        return self.path / "rounds" / f"{number:04d}" / f"{name}.safetensors"

    def _round_from_json(self, entry: dict[str, Any]) -> Round:
        clients = [Participant(**client) for client in entry["clients"]]
        return Round(**{**entry, "clients": clients, "folder": self._file(entry["number"], "global").parent})

    def _save(self) -> None:
        header = {**self._header, "rounds": [record.as_json() for record in self.rounds]}
        write_atomically(self.path / "run.json", json.dumps(header, indent=1).encode())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder for writing.

    Raises:
        TraceFLError: another process holds it; it is not waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"{folder} is being written by another process: wait for it, or choose another exp_key"
    try:
        held = FileLock(folder / ".lock").acquire(blocking=False)
    except Timeout:
        raise TraceFLError(busy) from None
    with held:
        yield


def write_state(file: Path, state: State) -> str:
    """Write a state dict as safetensors, atomically; return the file's SHA-256."""
    content = save({name: tensor.contiguous() for name, tensor in state.items()})
    write_atomically(file, content)
    return hashlib.sha256(content).hexdigest()


def write_atomically(file: Path, content: bytes) -> None:
    """Write so that the file has its old content or the new one, also after a power cut."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.tmp")
    with partial.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, file)


def _client_from_json(entry: dict[str, Any]) -> ClientInfo:
    """JSON's keys are strings, labels are numbers."""
    names = ("label_counts", "flipped_label_counts")
    counts = {name: entry[name] and {int(label): n for label, n in entry[name].items()} for name in names}
    return ClientInfo(**{**entry, **counts})
