"""A recorded run's model without some of its clients.

Its round, fused again without them; or replayed, every round from `since` on without them, a share
c of what is changed being carried on (`memory`, 1 unless given): d_t of `change`, with R(d) = c d.

How the others would have trained from the changed model is left out: later rounds undo part of a
change, for which c below 1 stands. Only a training without the clients (exclude_clients) has it.
"""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from tracefl.errors import require
from tracefl.evidence.change import Change, is_variance, weights_of
from tracefl.evidence.fusion import as_ids, mean_of, same_names, wide
from tracefl.record import Round
from tracefl.runs import Run
from tracefl.states import State, is_continuous


@torch.no_grad()
def state_without(
    run: Run | str | Path,
    without: Collection[str | int],
    *,
    round: int | None = None,
    since: int | None = None,
    memory: float = 1.0,
) -> dict[str, Tensor]:
    """The model of a recorded round without some clients, as a state dict.

    One pass over the recorded rounds; beside the model, a change of it in double precision is in
    memory, and one tensor at a time of the clients.

    Args:
        run: the run, or its folder.
        without: ids of the clients to leave out.
        round: the round whose model it is; default: the last one.
        since: the first round to fuse without them; default: only `round` itself.
        memory: share of a change that the next round keeps in a replay, 0 to 1.

    Raises:
        TraceFLError: an argument or a recorded state is unusable.
    """
    run = opened(run)
    number, first = rounds_of(run, round, since)
    share = isinstance(memory, int | float) and not isinstance(memory, bool) and 0 <= memory <= 1
    require(share, f"memory must be a number from 0 to 1, got {memory!r}: 1 keeps all of a change")
    left_out, replay = known_ids(run, without), _Replay()
    for record in run.rounds[first - 1 : number]:
        out, kept = weights_of(record, left_out), weights_of(record, None, left_out)
        replay.released = run.global_state(record.number)
        if not kept:
            replay.keep_incoming(run.global_state(record.number - 1))
        else:
            replay.carry_on(memory)
            if out:
                replay.fuse_without(record, out, kept)
    return replay.state()


class _Replay(Change):
    """The change d of the model, in float64 or complex128, round by round.

    Attributes:
        released: W_t of the round that is replayed.
        fused: W'_t of what was fused without clients in this round: F'_t + W_t - F_t + c d_{t-1},
            which has no rounding error of the clients' that are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.released: State = {}
        self.fused = dict[str, Tensor]()

    def carry_on(self, memory: float) -> None:
        """The next round, in which others train."""
        self.fused = {}
        self.fade(memory, self.d)

    def keep_incoming(self, incoming: State) -> None:
        """W'_t = W'_{t-1}, where nobody is left."""
        self.fused = {}
        for name in incoming:
            if is_continuous(came := incoming[name]):
                self._add(name, came.to(wide(came.dtype)) - self.released[name], came)

    def fuse_without(self, record: Round, out: dict[str, float], kept: dict[str, float]) -> None:
        """F' - F = p_out (mean of those kept - mean of those left out); states are read once."""
        states: dict[str, State] = {who: record.client_state(who) for who in (*kept, *out)}
        p_out = sum(out.values()) / (sum(out.values()) + sum(kept.values()))
        for name in same_names(states):
            stay, dtype = mean_of({who: states[who] for who in kept}, kept, name)
            if is_continuous(stay):
                leave, _ = mean_of({who: states[who] for who in out}, out, name)
                W, F = self.released[name], torch.lerp(leave, stay, 1 - p_out)
                rounded = len(states) * torch.finfo(dtype).eps * (p_out * leave.abs() + (1 - p_out) * stay.abs())
                added = torch.where((W - F).abs() <= rounded, 0, W - F)
                self.fused[name] = stay + added + self.d.get(name, 0)
                self._add(name, p_out * (stay - leave), stay)

    def state(self) -> dict[str, Tensor]:
        """W'_t."""
        state = dict[str, Tensor]()
        for name in self.released:
            state[name] = W = self.released[name]
            if name in self.d and is_continuous(W):
                moved = self.fused[name] if name in self.fused else W + self.d[name]
                state[name] = self.positive(name, moved, W).to(W.dtype)
        return state

    def _add(self, name: str, by: Tensor, without: Tensor) -> None:
        self.add(name, by)
        if is_variance(name):
            self.least[name] = without


def opened(run: Run | str | Path) -> Run:
    """The run, of which a folder may be given."""
    kind = type(run).__name__
    require(isinstance(run, Run | str | Path), f"run must be a Run or the folder of one, got a {kind}")
    return run if isinstance(run, Run) else Run.open(run)


def rounds_of(run: Run, round: int | None, since: int | None) -> tuple[int, int]:
    """The round, and the first one that is fused again."""
    require(run.rounds, f"{run.path} has no complete round: train it first")
    number = len(run.rounds) if round is None else round
    for name, value in (("round", number), ("since", since)):
        whole = value is None or (isinstance(value, int) and not isinstance(value, bool))
        require(whole, f"{name} must be the number of a round, got {value!r}: give one from 1 to {len(run.rounds)}")
    run.round(number)
    first = number if since is None else since
    require(1 <= first <= number, f"since must be a round from 1 to round={number}, got {first}: correct it")
    return number, first


def known_ids(run: Run, without: Collection[str | int]) -> list[str]:
    """The ids as the run has them; a whole number stands for its digits."""
    took_part = [client.id for record in run.rounds for client in record.clients]
    known = list(dict.fromkeys([client.id for client in run.clients] + took_part))
    if isinstance(without, Collection) and not isinstance(without, str | bytes):
        without = [str(who) if isinstance(who, int) and not isinstance(who, bool) else who for who in without]
    left_out = as_ids(without, known, "without")
    require(left_out, "without must name the clients to leave out, got none: name one")
    return left_out
