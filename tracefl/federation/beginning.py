"""The part of a strategy's loop in which a round begins: what is sent, and who is there."""

import logging
from collections.abc import Iterable

from flwr.app import ArrayRecord

from tracefl.errors import TraceFLError
from tracefl.federation.loop import EQUAL_WEIGHTS, Loop
from tracefl.federation.memory import fingerprints, innermost, parts
from tracefl.federation.privacy import FixedClipping
from tracefl.federation.released import apart_in, failing, not_finite, unusable
from tracefl.federation.replies import EXAMPLES, Expected
from tracefl.federation.resend import Resending
from tracefl.record import ClientInfo

log = logging.getLogger("tracefl")


class Beginnings(Loop):
    """What `Rounds` sees to before clients are asked."""

    _tasks: Resending
    _wanted: Expected  # what a reply of this round must be

    def _begin(self, arrays: ArrayRecord) -> None:
        """Nothing is known of this round but the model that it begins with."""
        if self._first_values is None:
            self._first_values = fingerprints(self.strategy)
        self._forget_round()
        self._expected = dict(arrays.to_torch_state_dict())
        self._check_sent()
        self._wanted = self._expect()
        self._view.asked.clear()  # what comes late is no reply of this round
        self._tasks.forget()
        self._look_for_nodes()

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
