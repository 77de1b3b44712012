"""The whole run: who is responsible for the model as it is now?

With 10 of 100 clients in a round, the last round cannot answer for the other 90. The truth is to
train the federation again without client k. Replay follows the recorded rounds instead, with d_k
what the global model would differ by without k (d_t of `change`):

    k's contribution:  y(W_T) - y(W_T + d_k),

and R_t, how the clients of round t answer a difference, a memory, R(d) = c d; a proxy,
R(d) = Σ_j p'_j (F_j(W + d) - F_j(W)), with F_j a training on examples of the server's whose labels
are as client j's; or both, 0.7 of the proxy's and 0.3 of memory 0.3's: the proxy knows which
directions last, but what it errs would grow from round to round if all was kept.
The other method is the sum over rounds of y(W_t) - y(W_t without k in round t).

Without its only client there is no round. What no client sends in a round stays.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tracefl.classifier import Batch, batch_size, copied, exact, full_precision
from tracefl.data.examples import Examples
from tracefl.errors import TraceFLError, require
from tracefl.evidence.change import Change
from tracefl.evidence.game import Explained
from tracefl.evidence.reaction import Memory, Proxy, reaction
from tracefl.evidence.recorded_states import RecordedStates
from tracefl.provenance.clients import States
from tracefl.provenance.result import Provenance
from tracefl.provenance.trace import as_classes
from tracefl.runs import Run

METHODS = ("replay", "sum")


def trace_run(
    run: Run,
    inputs: Batch,
    *,
    targets: Tensor | Sequence[int] | None = None,
    round: int | None = None,
    method: str = "replay",
    memory: float | str | None = None,
    model: nn.Module | None = None,
    examples: Examples | tuple[Batch, Tensor] | None = None,
    training: Mapping[str, Any] | None = None,
    proxies: int | None = None,
    scratch_bytes: int = 1 << 30,
) -> Provenance:
    """Explain predictions of a global model by all clients that took part up to its round.

    Args:
        run: the recorded run.
        inputs: N inputs, as Tensor [N, ...] or as a dict of the model's keyword arguments.
        targets: classes [N] to explain; default: those that the model predicts.
        round: whose global model predicts, from 1; default: the last.
        method: "replay" (default), what the model would be without the client; or "sum", over the
            rounds, of what leaving the client out of that round alone would do to y.
        memory: of "replay", what the clients who train on leave of a difference: from 0, the last
            round alone, to 1, everything; "proxy", found by training on `examples` from the model
            with the difference and from that without it, once for every other client of the round;
            or "mixed", 0.7 of this and 0.3 of memory 0.3. Default: "mixed" where examples and
            training are known, or 0.5.
        model: of the run's architecture; its weights do not matter, and it is left as it was.
            Default: built from the run, which can do so unless it is an own Flower app's.
        examples: labelled examples of the server's for the proxy, `Examples` or (inputs, labels);
            those among `inputs` are left out. Each class is drawn as often as a client holds it, by
            the run's label counts. Default: the run's.
        training: `epochs`, `lr` and `batch_size` of a client's training. Default: the run's.
        proxies: for how many clients of a round, drawn at random, the proxy trains; default: all.
            A run of T rounds with n clients in each takes about T * n trainings for each of the K
            clients, and with proxies=2 T * 2.
        scratch_bytes: memory to take beside the model (default 1 GiB). Differences that do not fit
            take more passes over the recorded states.

    Returns:
        Contributions [N, K] to the log-odds of the targets; see `Provenance`. `layers` says by what
        memory, and of "sum" the rounds, whose gap to the change of y since the initial model is
        `completeness_error`.

    Raises:
        TraceFLError: an argument or a recorded state is unusable; the message names it.

    Example:
        >>> import tempfile, torch
        >>> from tracefl import trace_run
        >>> from tracefl.flower import ClientInfo, Evaluation, Run
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> initial, clients = {"weight": torch.zeros(2, 1)}, [ClientInfo(who, {}) for who in "ab"]
        >>> run = Run.create(tempfile.mkdtemp(), initial=initial, clients=clients)
        >>> sent = {"a": torch.tensor([[3.0], [0.0]]), "b": torch.tensor([[1.0], [0.0]])}
        >>> parts = [run.record_client(1, who, {"weight": w}, 5, 0.5) for who, w in sent.items()]
        >>> evaluation = Evaluation(0.5, 1.0, torch.tensor([0]))
        >>> run.record_round(1, parts, {"weight": torch.tensor([[2.0], [0.0]])}, evaluation, {})
        >>> trace_run(run, torch.ones(1, 1), model=model).contributions.tolist()
        [[1.0, -1.0]]
    """
    require(isinstance(run, Run), f"run must be a recorded run, got a {type(run).__name__}: use Run.open(folder)")
    require(run.rounds, f"{run.path} has no complete round: train one first")
    require(method in METHODS, f"method must be one of {', '.join(METHODS)}, got {method!r}")
    fine = isinstance(scratch_bytes, int | float) and scratch_bytes >= 1
    require(fine, f"scratch_bytes must be a number of at least 1, got {scratch_bytes!r}")
    fine = round is None or (isinstance(round, int) and not isinstance(round, bool))
    require(fine, f"round must be a whole number from 1 to {len(run.rounds)}, got {round!r}")
    fine = proxies is None or (isinstance(proxies, int) and not isinstance(proxies, bool) and proxies >= 1)
    require(fine, f"proxies must be a whole number of at least 1, got {proxies!r}")
    last = run.round(len(run.rounds) if round is None else round).number
    fine = (
        memory is None
        or memory in ("proxy", "mixed")
        or (isinstance(memory, int | float) and not isinstance(memory, bool) and 0 <= memory <= 1)
    )
    require(fine, f"memory must be a number from 0 to 1, 'proxy' or 'mixed', got {memory!r}")
    model = _model_of(run, last) if model is None else copied(model)
    require(isinstance(model, nn.Module), f"model must be a torch.nn.Module, got a {type(model).__name__}")
    model, inputs = full_precision(model, inputs)
    classes = None if targets is None else as_classes(targets, batch_size(inputs), "targets")
    recorded = RecordedStates(run, model, last)
    at = Explained(model, inputs, classes, "log_odds", int(scratch_bytes))
    if method == "sum":
        with exact(model):
            return _sum(recorded, at, int(scratch_bytes))
    react = reaction(run, recorded, at, memory, examples, training, proxies)
    with exact(model):
        return _replay(recorded, at, react, int(scratch_bytes))


def _model_of(run: Run, number: int) -> nn.Module:
    try:
        return run.model(number)
    except TraceFLError as error:
        raise TraceFLError(f"the model of {run.path} cannot be built ({error}); pass model=") from error


def _replay(recorded: RecordedStates, at: Explained, react: Memory | Proxy, scratch_bytes: int) -> Provenance:
    W_T, ids = recorded.load(recorded.last), recorded.ids
    y = at.of_model()
    share = torch.zeros(at.N, len(ids), dtype=torch.float64)
    copies = 1 if isinstance(react, Memory) else 2  # with a proxy, differences before and after a round
    some = max(1, scratch_bytes // 4 * 3 // (copies * recorded.nbytes))
    for first in range(0, len(ids), some):
        followed = ids[first : first + some]
        for k, change in _changes(recorded, followed, react).items():
            recorded.put(W_T, change)
            share[:, ids.index(k)] = y - at.y(f"the model without client {k!r}", partial(_check, recorded))
    recorded.put(W_T)
    return Provenance("replay", ids, torch.as_tensor(at.targets).cpu(), share[None], [react.name])


@torch.no_grad()
def _changes(recorded: RecordedStates, ids: Sequence[str], react: Memory | Proxy) -> dict[str, Change]:
    """Client -> its change after the last round, of those with an update that counted."""
    changes = dict[str, Change]()
    for t, p in recorded.p.items():
        alone = next(iter(p)) if len(p) == 1 else None
        W = recorded.load(t - 1) if alone in ids or isinstance(react, Proxy) else {}
        if p:
            react(t, {k: change for k, change in changes.items() if k != alone}, W)
        for k in ids:
            if k in p and k not in changes:
                changes[k] = recorded.no_change()
        if alone in changes:
            released = recorded.load(t)
            for name, w in W.items():
                changes[alone].add(name, w - released[name])
        elif alone is None and p:
            recorded.leave_out(t, changes)
    return changes


@torch.no_grad()
def _sum(recorded: RecordedStates, at: Explained, scratch_bytes: int) -> Provenance:
    """The sum over rounds, a layer for each; in one read as many clients are left out as fit."""
    recorded.load(recorded.last)
    y_T, ids, check = at.of_model(), recorded.ids, partial(_check, recorded)
    by_round = torch.zeros(recorded.last, at.N, len(ids), dtype=torch.float64)
    server = torch.zeros(recorded.last, at.N, dtype=torch.float64)
    some = max(1, scratch_bytes // 4 * 3 // recorded.nbytes)
    recorded.load(0)
    y_0 = y_before = at.y("the initial model", check)
    for t, p in recorded.p.items():
        W = recorded.load(t)
        y = at.y(f"the model of round {t}", check)
        taken = list(p) if len(p) > 1 else []
        for first in range(0, len(taken), some):
            followed = taken[first : first + some]
            changes = {k: recorded.no_change() for k in followed}
            recorded.leave_out(t, changes)
            for k, change in changes.items():
                recorded.put(W, change)
                whose = f"the model of round {t} without client {k!r}"
                by_round[t - 1, :, ids.index(k)] = y - at.y(whose, check)
        if len(p) == 1:
            by_round[t - 1, :, ids.index(next(iter(p)))] = y - y_before
        elif p:
            recorded.put(recorded.fusion(t, W))
            server[t - 1] = y - at.y(f"the fusion of round {t}", check)
        else:
            server[t - 1] = y - y_before
        y_before = y
    rounds = [f"round {t}" for t in recorded.p]
    return Provenance("sum", ids, torch.as_tensor(at.targets).cpu(), by_round, rounds, server, y_T - y_0)


def _check(recorded: RecordedStates) -> None:
    """Raise TraceFLError for the first recorded state with values that are not finite."""
    for t, clients in recorded.clients.items():
        States(clients, recorded.entries, recorded.aliases_of(t)).check_finite()
