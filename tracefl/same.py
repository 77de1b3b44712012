"""Whether a run is the one that is to be gone on with: what differs is named."""

import json
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tracefl.errors import TraceFLError, as_sentence, require
from tracefl.reading import Recorded
from tracefl.record import ClientInfo, strict
from tracefl.sealed import KEY
from tracefl.states import State
from tracefl.storage import Storing

NO_HEADER = ("schema", "initial_sha256", "entries", "clients", "rounds", "initial_metrics", "unsaved", "storage", KEY)


class Compared(Recorded):
    """The part of `Run` that refuses to go on as another run."""

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
            given = json.loads(json.dumps(strict(header)))
        for key, was, now in _differences(mine, given):
            told = f"the run in {self.path} was recorded with {key}={was!r}, got {now!r}"
            raise TraceFLError(f"{told}: give the same or choose another folder")


def same_state(a: State, b: State) -> bool:
    """Whether two states hold the same entries with the same values."""
    return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _differences(was: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, recorded, given) of what differs; only keys that are given count at the top."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        if was != now:
            yield key, was, now
        return
    for name in now if not key else sorted(was.keys() | now.keys()):
        yield from _differences(was.get(name), now.get(name), f"{key}.{name}" if key else name)
