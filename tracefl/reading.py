"""A recorded run as it is read: its header, its rounds, and the models in its folder."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from tracefl.data.examples import Examples
from tracefl.errors import TraceFLError, as_sentence, require
from tracefl.header import READABLE, STORED_SINCE, Checker
from tracefl.record import Participant, Round, client_from_json, numbers
from tracefl.sealed import read_sealed
from tracefl.states import State, StateFile
from tracefl.storage import Storing

if TYPE_CHECKING:
    from tracefl.provenance.result import Provenance

MOVED = "put the run where it was, or train again"
RESTORE = "restore it from a copy, or train again in another folder"
log = logging.getLogger("tracefl")


class Recorded:
    """The part of `Run` that reads."""

    def __init__(self, path: Path, header: dict[str, Any], written: bytes = b"") -> None:
        self.path = path
        self._header = header
        self._written = written  # run.json as this object last read or wrote it
        self.clients = [client_from_json(entry) for entry in header["clients"]]
        self.storing = Storing(**header.get("storage", {}))
        self._last_base: tuple[int, StateFile] = 0, StateFile(path)
        self.rounds = list[Round]()
        for entry in header["rounds"]:
            self.rounds.append(self._round_from_json(entry))

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a recorded run: run.json is checked, entry by entry (`header`).

        Its files are compared with their hashes when they are read.

        Args:
            path: the run's folder.

        Returns:
            The run, with its `clients` and its complete `rounds`.

        Raises:
            TraceFLError: there is no run at `path`, or its header is damaged; the message names the
                entry.
        """
        path = Path(path)
        file = path / "run.json"
        with as_sentence(f"{file} cannot be read", RESTORE, OSError, ValueError):
            require(file.exists(), f"{path} holds no recorded run (no run.json): give a run's folder")
        written, header = read_sealed(file, RESTORE)
        schema = header.get("schema")
        known = f"{', '.join(map(str, READABLE[:-1]))} or {READABLE[-1]}"
        readable = type(schema) is int and schema in READABLE
        require(readable, f"the schema of {path} must be {known}, got {schema!r}: train the run again")
        Checker(str(file), RESTORE).header(header)
        if header["schema"] < STORED_SINCE:
            header.pop("storage", None)
        return cls(path, header, written)

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
        """The record of a round.

        Args:
            number: the round's, from 1.

        Returns:
            Who took part with which weight, loss, accuracy and metrics; see `Round`.

        Raises:
            TraceFLError: it is not recorded.
        """
        there = 1 <= number <= len(self.rounds)
        require(there, f"round {number} is not recorded in {self.path}: it has rounds 1 to {len(self.rounds)}")
        return self.rounds[number - 1]

    def global_state(self, number: int) -> StateFile:
        """The model that a round released.

        Args:
            number: the round's; 0: the initial model.

        Returns:
            Its state dict; a tensor is read, and its file's hash compared, when it is asked for.

        Raises:
            TraceFLError: the round is not recorded or, on reading, its file is damaged.
        """
        sha256 = self._header["initial_sha256"] if number == 0 else self.round(number).global_sha256
        return StateFile(self._file(number, "global"), sha256, order=self.entries)

    @property
    def entries(self) -> list[str]:
        """Names of the model's entries in its order; empty in a run of schema 1."""
        return self._header.get("entries", [])

    def client_states(self, number: int) -> dict[str, StateFile]:
        """The models that a round's participants sent, as `tracefl.trace` takes them.

        Args:
            number: the round's, from 1.

        Returns:
            Client id -> state dict, of which a tensor is read when it is asked for.

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
        """The model that a round released, ready to use.

        Args:
            number: the round's; 0: the initial model.

        Returns:
            The model on the CPU, in eval mode.

        Raises:
            TraceFLError: the run is an own Flower app's, which knows how its model is built.
        """
        from tracefl.models import build_model, load_exchanged_state

        unknown = f"{self.path / 'run.json'}: model {self['model']!r:.80} cannot be built"
        with as_sentence(unknown, RESTORE, LookupError, TypeError, ValueError, RuntimeError, AttributeError):
            model = build_model(self["model"])
        load_exchanged_state(model, self.global_state(number))
        return model.eval()

    def server_examples(self) -> Examples:
        """The server's examples, in the order of `predictions`.

        Returns:
            Their inputs and labels, see `tracefl.flower.Examples`.

        Raises:
            TraceFLError: the run is one of an own Flower app, or its data are gone.
        """
        from tracefl.data.prepared import server_examples

        folder = self.path / self["data_folder"]
        with as_sentence(f"the server's examples of {self.path} cannot be read from {folder}", MOVED, TraceFLError):
            return server_examples(folder, self._header.get("data_sha256"))

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
        """What a round's model predicts for the server's examples.

        Args:
            number: the round's, from 1.

        Returns:
            The predicted classes, int64 [N].

        Raises:
            TraceFLError: the run was recorded without `evaluate`.
        """
        sha256 = self.round(number).predictions_sha256
        without = f"round {number} of {self.path} has no predictions: it was recorded without evaluate"
        require(sha256, f"{without}; give trace the inputs and targets")
        found = StateFile(self._file(number, "predictions"), sha256).get("predictions")
        fits = found is not None and found.dtype == torch.int64 and found.dim() == 1
        require(fits, f"{self._file(number, 'predictions')} holds no predictions: {RESTORE}")
        return found  # type: ignore[return-value]

    def strategy_state(self, number: int) -> State:
        """What the strategy carries from round `number` to the next; empty if nothing."""
        sha256 = self.round(number).strategy_sha256 if number else None
        return StateFile(self._file(number, "strategy"), sha256) if sha256 else {}

    def metrics(self, number: int) -> dict[str, dict[str, Any] | None]:
        """The metrics of a round.

        Args:
            number: the round's; 0: the initial model.

        Returns:
            "train", "evaluate" (both by clients) and "server", where they are there: name -> value.

        Raises:
            TraceFLError: the round is not recorded.
        """
        return self.round(number).metrics if number else numbers(self._header.get("initial_metrics", {}))

    @property
    def unsaved(self) -> list[str]:
        """What the strategy kept from round to round that is not recorded: "Class.attribute"."""
        return self._header.get("unsaved", [])

    @property
    def kept_rounds(self) -> list[Round]:
        """The rounds whose clients' states are there: those that can be traced."""
        return [record for record in self.rounds if record.kept]

    def disk(self) -> dict[int, int]:
        """How large the run's models are.

        Returns:
            Round -> bytes on disk; round 0 is the initial model.
        """
        numbers = range(len(self.rounds) + 1)
        folders = {number: self._file(number, "global").parent for number in numbers}
        return {
            number: sum(file.lstat().st_size for file in folder.rglob("*.safetensors"))
            for number, folder in folders.items()
        }

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
        entry = entry | {name: numbers(entry[name]) for name in ("loss", "accuracy", "metrics") if name in entry}
        clients = [Participant(**client) for client in entry["clients"]]
        return Round(**{**entry, "clients": clients, **self._place(entry["number"])})
