"""The part of a strategy's loop in which updates become a model, and clients fail.

A released model that cannot be used is not recorded: the client whose update stands apart has
failed, and where that is accepted, the strategy aggregates again without it.
"""

import logging
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Tensor

from tracefl.errors import TraceFLError, as_sentence, require
from tracefl.federation.again import Before
from tracefl.federation.alike import unlike
from tracefl.federation.loop import Loop
from tracefl.federation.memory import innermost, state_of
from tracefl.federation.released import Problem, apart, apart_in, failing, fused, spoilt, unusable
from tracefl.federation.replies import Update
from tracefl.federation.weights import Weights, assumed, find_weights
from tracefl.record import Participant
from tracefl.states import State
from tracefl.training import Evaluation

Accepted = tuple[Message, Update, Participant]
log = logging.getLogger("tracefl")


@dataclass(frozen=True)
class Made:
    """What a strategy has made of a round's updates, and what is wrong with the model."""

    used: list[Accepted]
    arrays: ArrayRecord | None
    metrics: MetricRecord | None
    released: dict[str, Tensor]
    state: dict[str, Tensor]
    evaluation: Evaluation | None
    problem: Problem | None
    before: Before | None


class Releases(Loop):
    """What `Rounds` makes of the updates of a round."""

    def _release(self, server_round: int, given: dict[str, Message]) -> Made:
        """What the strategy makes of the accepted updates, and what is wrong with it."""
        number, name = self.index, type(innermost(self.strategy)).__name__
        accepted = [self._updates[client] for client in self._chosen if client in self._updates]
        used = [(given[sent], update, participant) for sent, update, participant in accepted if sent in given]
        first = next(iter(self._failures), "")
        everyone_failed = f"every client failed; the first said: client {first}: {self._failures.get(first)}."
        require(accepted or not self._chosen, f"round {number}: {everyone_failed}")
        self._used = {}
        before = Before(self.strategy, [reply for reply, _, _ in used]) if self.options.accept_failures else None
        odd = unlike({participant.id: update for _, update, participant in used}, everything=True)
        hint = "".join(f"; client {client}: {why}" for client, why in odd.items())
        with as_sentence(
            f"round {number}: {name} cannot aggregate {len(used)} updates{hint}",
            "correct the strategy, or let clients send what it expects",
            Exception,
        ), np.errstate(all="ignore"):  # what overflows is found below  # fmt: skip
            arrays, metrics = self._own["aggregate_train"](server_round, [reply for reply, _, _ in used])
        returned = f"round {number}: {name}.aggregate_train must return an ArrayRecord or None, and metrics"
        require(arrays is None or isinstance(arrays, ArrayRecord), f"{returned}; got a {type(arrays).__name__}")
        released = dict(self._expected)  # what no client sends is as it was
        if arrays is None:
            log.warning("round %d: %s released no model, it stays as it was", number, name)
        else:
            released |= fused(arrays, self._expected, f"round {number}")
        state, evaluation = state_of(self.strategy), None
        problem = unusable(released, self._expected) or spoilt(state)
        if problem is None and self.options.evaluate:
            evaluation = self.options.evaluate(released)
            what = "evaluate must return a tracefl.flower.Evaluation"
            require(isinstance(evaluation, Evaluation), f"{what}, got {evaluation!r}")
            problem = failing(evaluation)
        return Made(used, arrays, metrics, released, state, evaluation, problem, before)

    def _leave_out(self, made: Made) -> None:
        """The client whose update stands apart has failed; give the strategy back what it had."""
        assert made.problem is not None
        about = f"{made.problem.whose} {made.problem.text}"
        updates = {participant.id: update.state for _, update, participant in made.used}
        found = apart(updates, self._expected, made.problem.entry)
        if found is None:
            remedy = "no client's update stands apart, so training itself diverges: lower the clients' learning rate"
            raise TraceFLError(f"round {self.index}: {about}; {remedy}. {self._kept()}.")
        changed = made.before.restore() if made.before is not None else None
        self._fail(found.client, f"{about}, and its update stands apart: {found}")
        again = f"{changed} has changed, so the round cannot be aggregated without it"
        remedy = "give the strategy state_dict() and load_state_dict(state), or exclude the client"
        require(not changed, f"round {self.index}, client {found.client}: {about}; {again}: {remedy}. {self._kept()}.")

    def _judge_not_finite(self) -> None:
        """Clients whose values are not finite have failed, unless the model sent is the cause.

        It is if most clients answer so; it may be if an update stood apart when it was made.
        """
        bad, before = self._not_finite, self.index - 1
        answers = len(bad) + len(self._updates)
        found = apart_in(self.run, before) if bad else None
        found = None if found is None or found.others is None or [*bad] == [found.client] else found
        sent = f"the model of round {before}" if before else "the initial model"
        sent += f" (client {found.client}'s update stands apart there: {found})" if found else ""
        excused = found is not None or (len(bad) > 1 and 2 * len(bad) > answers)
        if excused and (len(bad) == answers or not self.options.accept_failures):
            told = f"round {self.index}: {len(bad)} of {answers} clients answer with non-finite values"
            remedy = f"training on {sent} diverges, lower the clients' learning rate or begin anew"
            raise TraceFLError(f"{told}: {remedy}. {self._kept()}.")
        for client in [client for client in self._chosen if client in bad]:
            cause = f", of which {sent} that it was sent may be the cause" * excused
            self._fail(client, bad[client] + cause)

    def _weights(self, released: State | None, used: list[Accepted]) -> Weights:
        """p_k of the updates that the strategy was given."""
        if released is None or not used:
            return Weights([0.0] * len(used), "strategy")
        told = [self._used.get(id(reply.content), 0.0) for reply, _, _ in used]
        if self._flowers() and any(told):
            return Weights([weight / sum(told) for weight in told], "strategy")
        known = {"told": told, "weight": [update.weight for _, update, _ in used]}
        known["examples"] = [float(update.num_examples) for _, update, _ in used]
        states = [update.state for _, update, _ in used]
        if found := find_weights(released, self._expected, states, known | {"equal": [1.0] * len(used)}):
            return found
        name = type(innermost(self.strategy)).__name__
        return assumed(known["examples"], f"round {self.index}: what weights {name} gave the updates")

    def _check_alike(self) -> None:
        """Leave out who sends something else than most clients."""
        updates = {client: self._updates[client][1] for client in self._chosen if client in self._updates}
        for client, why in unlike(updates, everything=self._flowers()).items():
            self._fail(client, why)

    def _kept(self) -> str:
        return f"Rounds 1 to {len(self.run.rounds)} are kept; the same command goes on from there"

    def _fail(self, client: str, reason: str) -> None:
        """This client has failed: its update does not count, if there is one."""
        sent = self._updates.pop(client, None)
        others_can = self._updates or self._unwritten or self.run.rounds
        tolerate = ", accept_failures=true goes on without such a client" if others_can else ""
        require(
            self.options.accept_failures, f"round {self.index}, client {client}: {reason}. {self._kept()}{tolerate}."
        )
        self._failures[client] = reason
        if sent is not None:
            self.run.forget_client(self.index, sent[2])
