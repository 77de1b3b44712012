"""What run.json says of a client and of a round, and where a round's files are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tracefl.errors import require
from tracefl.states import StateFile
from tracefl.storage import PackedFile, Storing


@dataclass(frozen=True)
class Participant:
    """A client that took part in a round.

    Attributes:
        id: the client's.
        num_examples: n_k, which it trained on; 0 where the client did not say it.
        weight: p_k, the share with which the strategy took its update: n_k / sum of n over the
            updates that it used, or the same for each; 0 for an update that it did not use
            (`Round.weights_from`).
        file: its state, relative to the round's folder.
        sha256: of the file.
    """

    id: str
    num_examples: int
    weight: float
    file: str
    sha256: str


@dataclass(frozen=True)
class Round:
    """One complete round.

    Attributes:
        folder: where its files are.
        base: state dict of the model that it began with.
        number: from 1.
        clients: who took part, as `Participant`s.
        global_sha256: of the released model's file.
        predictions_sha256: of its predictions' file; None where there are none.
        loss: the released model's on the server's data; None where it has none.
        accuracy: likewise, from 0 to 1.
        failures: client id -> why it was left out.
        strategy_sha256: of what the strategy carries to the next round; None if nothing.
        metrics: those of the clients' training ("train"), of their evaluation ("evaluate") and of
            the app's evaluate_fn ("server").
        weights_from: where p_k are from: "strategy", as it averaged; "models", found from the
            released model, which is that mean of the updates; or "assumed", in proportion to
            num-examples, since neither could be had.
        kept: False where the clients' states are gone (storage.keep=last:N).
        entries: names of the model's entries, in its order.
        storing: how the clients' states are stored.
    """

    folder: Path = field(compare=False, repr=False)
    base: StateFile = field(compare=False, repr=False)
    number: int
    clients: list[Participant]
    global_sha256: str
    predictions_sha256: str | None
    loss: float | None
    accuracy: float | None
    failures: dict[str, str] = field(default_factory=dict)
    strategy_sha256: str | None = None
    metrics: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    weights_from: str = "strategy"
    kept: bool = True
    entries: Sequence[str] = field(default=(), compare=False, repr=False)
    storing: Storing = field(default_factory=Storing, compare=False, repr=False)

    def as_json(self) -> dict[str, Any]:
        """The record as run.json holds it."""
        names = [entry.name for entry in fields(self) if entry.compare and not (entry.name == "kept" and self.kept)]
        record = {name: strict(getattr(self, name)) for name in names}
        return record | {"clients": strict([asdict(client) for client in self.clients])}

    def client_state(self, client_id: str) -> StateFile:
        """The model that a client sent, as received.

        Args:
            client_id: the client's id.

        Returns:
            Its state dict; a tensor is read when it is asked for.

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
        return state_file(file, sha256, self.base, self.entries, self.storing)


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows of a client.

    Args:
        id: the client's id, any string: "0", "hospital/berlin", ...
        label_counts: label -> number of training examples that the client holds, where known.
        flipped_label_counts: of a faulty client, the same for the labels that it trains on.
        fault: of a faulty client, the kind of its fault.

    Example:
        >>> from tracefl.flower import ClientInfo
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


def state_file(file: Path, sha256: str | None, base: StateFile, entries: Sequence[str], storing: Storing) -> StateFile:
    """A client's file, whatever it holds; `base` is the model that the round began with."""
    if storing.plain:
        return StateFile(file, sha256, order=entries)
    return PackedFile(file, base, sha256, entries)


def client_from_json(entry: dict[str, Any]) -> ClientInfo:
    """JSON's keys are strings, labels are numbers."""
    names = ("label_counts", "flipped_label_counts")
    given = {name: entry[name] for name in names if name in entry}
    counts = {name: of and {int(label): n for label, n in of.items()} for name, of in given.items()}
    return ClientInfo(**{**entry, **counts})


def strict(value: Any) -> Any:
    """JSON knows no infinity and no NaN: they become "inf", "-inf" and "nan"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: strict(entry) for name, entry in value.items()}
    return [strict(entry) for entry in value] if isinstance(value, list | tuple) else value


def numbers(value: Any) -> Any:
    """Loss, accuracy and metrics as they were before `strict`."""
    if isinstance(value, dict):
        return {name: numbers(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [numbers(entry) for entry in value]
    return float(value) if isinstance(value, str) else value
