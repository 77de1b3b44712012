"""The whole run: who is responsible for the model as it is now?

With 10 of 100 clients in a round, the last round cannot answer for the other 90. The truth is to
train the federation again without client k. Replay follows the recorded rounds instead: d_k is what
the global model would differ by without k,

    d_k <- R_t(d_k) + (fusion of round t without k  -  fusion of round t),
    k's contribution:  y(W_T) - y(W_T + d_k),

and R_t is how the clients of round t, who train on from another model, answer it: a memory,
R(d) = c d; a proxy, R(d) = Σ_j p'_j (F_j(W + d) - F_j(W)), with F_j a training on examples of the
server's whose labels are as client j's; or both, 0.7 of the proxy's and 0.3 of memory 0.3's: the
proxy knows which directions last, but what it errs would grow from round to round if all was kept.
The other method is the sum over rounds of y(W_t) - y(W_t without k in round t).

What the server did beyond averaging (noise, an optimizer), the released model - Σ p W, stays as it
was. Without its only client there is no round, and W_{t-1} + d_k stays. What no client sends in a
round stays. A running variance of W + d is at least a tenth of W's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tracefl.classifier import Batch, batch_size, copied, exact, full_precision, logits_of, take
from tracefl.data.examples import Examples
from tracefl.errors import TraceFLError, require
from tracefl.evidence.game import Explained
from tracefl.provenance.clients import States
from tracefl.provenance.result import Provenance
from tracefl.provenance.state import names_of_adapters, traced_state
from tracefl.provenance.trace import as_classes, normalised
from tracefl.record import Round
from tracefl.runs import Run
from tracefl.states import State, as_real, as_state
from tracefl.training import train

METHODS = ("replay", "sum")
MEMORY = 0.5  # where there is nothing to train a proxy on
PROXY, FADING = 0.7, 0.3  # "mixed": R(d) = 0.7 of the proxy's + 0.3 of memory 0.3's
LEAST_VARIANCE = 0.1  # of a running variance, in units of the model's own

# How a client trains, and the settings of a run of TraceFL's that say so.
_TRAINING = {"epochs": "client.epochs", "lr": "client.lr", "batch_size": "batch_size"}
Difference = dict[str, Tensor]  # traced tensor -> what it differs by


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
        >>> from tracefl import Run, trace_run
        >>> from tracefl.record import ClientInfo
        >>> from tracefl.training import Evaluation
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
    recorded = Recorded(run, model, last)
    at = Explained(model, inputs, classes, "log_odds", int(scratch_bytes))
    if method == "sum":
        with exact(model):
            return _sum(recorded, at, int(scratch_bytes))
    react = _reaction(run, recorded, at, memory, examples, training, proxies)
    with exact(model):
        return _replay(recorded, at, react, int(scratch_bytes))


def _model_of(run: Run, number: int) -> nn.Module:
    try:
        return run.model(number)
    except TraceFLError as error:
        raise TraceFLError(f"the model of {run.path} cannot be built ({error}); pass model=") from error


class Recorded:
    """The recorded states of a run up to a round, checked as they are read, tensor by tensor.

    Args:
        run: the run.
        model: of its architecture, in full precision; `load` changes its weights.
        last: the round.
    """

    def __init__(self, run: Run, model: nn.Module, last: int):
        self.run, self.model, self.last = run, model, last
        self.saved_as = names_of_adapters(model)
        self.p = {record.number: _weights(record) for record in run.rounds[:last]}
        took_part = {client.id for record in run.rounds[:last] for client in record.clients}
        known = [client.id for client in run.clients if client.id in took_part]
        self.ids = known + sorted(took_part - set(known))
        self.entries = dict(model.state_dict())
        self.clients = {t: self._clients(t) for t in self.p}
        self.sent = {t: frozenset[str]().union(*of.values()) for t, of in self.clients.items()}
        state = traced_state(model, "all", True, frozenset().union(*self.sent.values()))
        self.aliases, self.tensors = state.aliases, {name: as_real(w) for name, w in state.tensors.items()}
        require(self.tensors, f"no client of {run.path} sends a floating-point tensor: there is nothing to replay")
        self.nbytes = sum(w.nbytes for w in self.tensors.values())
        self.variances = [name for name in self.tensors if name.rpartition(".")[2] == "running_var"]

    def _clients(self, t: int) -> dict[str, State]:
        record = self.run.round(t)
        whose = {k: f"round {t}, client {k!r}" for k in self.p[t]}
        return {whose[k]: as_state(record.client_state(k), whose[k], self.entries, self.saved_as) for k in whose}

    @torch.no_grad()
    def load(self, t: int) -> dict[str, Tensor]:
        """Load the model released by round t; its traced tensors."""
        whose = f"the global model of round {t}"
        state = as_state(self.run.global_state(t), whose, self.entries, self.saved_as)
        released = States({whose: state}, self.entries, self.aliases)
        W = {name: released.tensors([name], 0, 1)[0] for name in self.tensors}
        for name in state.keys() - {alias for some in self.aliases.values() for alias in some}:
            self.entries[name].copy_(state[name])  # counters, and what no client sends
        self.put(W)
        return W

    @torch.no_grad()
    def put(self, W: Mapping[str, Tensor], d: Mapping[str, Tensor] | None = None) -> None:
        """Make W + d the model's weights."""
        for name, tensor in self.tensors.items():
            moved = W[name] if d is None else W[name] + d[name]
            least = LEAST_VARIANCE * W[name] if name in self.variances else None
            tensor.copy_(moved if least is None else torch.maximum(moved, least))

    def without(self, t: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Of every tensor that round t fuses: its name, and client -> fusion without it - fusion.

        Every client is read once. A client with all the weight is left out.
        """
        states = States(self.clients[t], self.entries, self.aliases_of(t))
        for name in self.aliases_of(t):
            thetas = states.tensors([name], 0, len(self.p[t]))
            fused, clients = self._mean(t, thetas), zip(self.p[t].items(), thetas, strict=True)
            yield name, {k: p / (1 - p) * (fused - theta.double()) for (k, p), theta in clients if p < 1}

    def fusion(self, t: int, W: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Σ p W_k of round t; what its clients do not send is as in W."""
        states, fused = States(self.clients[t], self.entries, self.aliases_of(t)), dict(W)
        for name in self.aliases_of(t):
            fused[name] = self._mean(t, states.tensors([name], 0, len(self.p[t]))).to(W[name].dtype)
        return fused

    def _mean(self, t: int, thetas: list[Tensor]) -> Tensor:
        return torch.stack([p * theta.double() for p, theta in zip(self.p[t].values(), thetas, strict=True)]).sum(0)

    def aliases_of(self, t: int) -> dict[str, list[str]]:
        return {name: some for name, some in self.aliases.items() if self.sent[t] & set(some)}


def _weights(record: Round) -> dict[str, float]:
    """p_k of the clients whose updates a round used; none, if it used no update."""
    used = {client.id: client.weight for client in record.clients if client.weight != 0}
    return dict(zip(used, normalised(used, list(used)).tolist(), strict=True)) if used else {}


@dataclass
class _Memory:
    """R(d) = c d on what the round's clients send."""

    c: float
    recorded: Recorded

    @property
    def name(self) -> str:
        return f"the whole run, memory {self.c:g}"

    def __call__(self, t: int, differences: dict[str, Difference], W: dict[str, Tensor]) -> None:
        for d in differences.values():
            for name in self.recorded.aliases_of(t):
                d[name] *= self.c


@dataclass
class _Proxy:
    """R(d) = s Σ_j p'_j (F_j(W + d) - F_j(W)) + (1 - s) c d, over the round's clients but k.

    F_j is client j's training on server's examples: as many as it has, each class drawn as often
    as it holds it.
    """

    examples: Examples
    training: Mapping[str, Any]
    recorded: Recorded
    share: float  # s
    most: int | None  # how many of a round's clients are stood for
    trained: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.trained = copied(self.recorded.model)
        state = traced_state(self.trained, "all", True, frozenset(self.recorded.aliases))
        self.tensors = {name: as_real(w) for name, w in state.tensors.items()}
        mixed = f"{self.share:g} by proxy, {1 - self.share:g} by memory {FADING:g}"
        self.name = f"the whole run, {mixed if self.share < 1 else 'memory by proxy'}"
        self.counts = {client.id: client.label_counts for client in self.recorded.run.clients}

    def __call__(self, t: int, differences: dict[str, Difference], W: dict[str, Tensor]) -> None:
        if not differences:
            return
        p, names = self.recorded.p[t], self.recorded.aliases_of(t)
        order = torch.randperm(len(p), generator=torch.Generator().manual_seed(t)).tolist()
        drawn = [list(p)[i] for i in order]
        others = {k: [j for j in drawn if j != k][: self.most] for k in differences}
        answers = {k: {name: torch.zeros_like(d[name]) for name in names} for k, d in differences.items()}
        for j in drawn:
            answering = [k for k in differences if j in others[k]]
            if not answering:
                continue
            rows, seed = self._drawn(t, j), 1000 * t + drawn.index(j)
            start = self._train(W, None, rows, seed)
            for k in answering:
                end, share = self._train(W, differences[k], rows, seed), p[j] / sum(p[i] for i in others[k])
                for name, answer in answers[k].items():
                    answer.add_(end[name] - start[name], alpha=share)
        for k, d in differences.items():
            for name in names:
                d[name].mul_((1 - self.share) * FADING).add_(answers[k][name], alpha=self.share)

    def _train(self, W: dict[str, Tensor], d: Difference | None, rows: Tensor, seed: int) -> dict[str, Tensor]:
        self.recorded.put(W, d)
        self.trained.load_state_dict(self.recorded.model.state_dict())
        with torch.random.fork_rng(), torch.enable_grad():
            train(self.trained, self.examples[rows], seed=seed, **self.training)
        return {name: w.detach().clone() for name, w in self.tensors.items()}

    def _drawn(self, t: int, client: str) -> Tensor:
        """Rows of the server's examples, with replacement."""
        labels = self.examples.labels
        held = labels.bincount().double()
        wanted = torch.zeros_like(held)
        for label, count in self.counts.get(client, {}).items():
            if label < len(wanted):
                wanted[label] += count
        chance = (wanted / held.clamp_min(1))[labels]
        chance = chance if chance.any() else torch.ones_like(chance)  # what it holds is not known
        number = next(of.num_examples for of in self.recorded.run.round(t).clients if of.id == client)
        generator = torch.Generator().manual_seed(1000 * t + self.recorded.ids.index(client))
        return torch.multinomial(chance, max(2, number), replacement=True, generator=generator)


def _reaction(
    run: Run, recorded: Recorded, at: Explained, memory: float | str | None,
    examples: Examples | tuple[Batch, Tensor] | None, training: Mapping[str, Any] | None, proxies: int | None,
) -> _Memory | _Proxy:  # fmt: skip
    if isinstance(memory, int | float):
        return _Memory(float(memory), recorded)
    given = training is not None or examples is not None
    training = _training_of(run) if training is None else training
    examples = _examples_of(run) if examples is None else examples
    if memory is None and (examples is None or training is None) and not given:
        return _Memory(MEMORY, recorded)
    known = (
        f"memory={memory or 'mixed'!r} needs labelled examples and how clients train, which {run.path} does not hold"
    )
    if examples is None or training is None:
        raise TraceFLError(f"{known}: pass examples= and training=, or memory as a number")
    training, examples = _checked(training), _usable(examples, at)
    if memory is None and not given and len(examples) == 0:
        return _Memory(MEMORY, recorded)
    must = "examples must hold others than the inputs that are explained"
    require(len(examples), f"{must}: pass more, or memory as a number")
    memory = memory or "mixed"
    return _Proxy(examples, training, recorded, 1.0 if memory == "proxy" else PROXY, proxies)


def _checked(training: Mapping[str, Any]) -> dict[str, Any]:
    kind = ", ".join(map(str, training)) if isinstance(training, Mapping) else f"a {type(training).__name__}"
    fits = isinstance(training, Mapping) and set(training) == set(_TRAINING)
    require(fits, f"training must be a dict of {', '.join(_TRAINING)}, got {kind}")
    for name, value in training.items():
        numbers = int if name != "lr" else int | float
        fine = isinstance(value, numbers) and not isinstance(value, bool) and 0 < value < float("inf")
        must = "a number" if name == "lr" else "a whole number"
        require(fine, f"training's {name} must be {must} above 0, got {value!r}")
    return dict(training)


def _usable(examples: Examples | tuple[Batch, Tensor], at: Explained) -> Examples:
    """Labelled examples to train on, without those that are explained."""
    if not isinstance(examples, Examples):
        pair = isinstance(examples, tuple | list) and len(examples) == 2
        require(pair, f"examples must be (inputs, labels), got a {type(examples).__name__}: correct them")
        inputs, labels = examples
        examples = Examples(inputs, as_classes(labels, batch_size(inputs), "the labels of examples"))  # type: ignore[arg-type]
    fits = batch_size(examples.inputs) == len(examples)
    require(fits, f"examples must have a label for each input, got {len(examples)} labels: correct them")
    padded = isinstance(examples.inputs, Tensor) or "attention_mask" in examples.inputs
    require(padded, "examples must be a Tensor, or texts with an attention_mask: add it, or pass memory as a number")
    with exact(at.work), torch.no_grad():
        C = logits_of(at.work, take(at.inputs, slice(0, 1))).shape[1]
    for label in examples.labels[(examples.labels < 0) | (examples.labels >= C)].tolist():
        require(False, f"the labels of examples must be 0 to {C - 1}, got {label}: leave such examples out")
    explained = {_content(at.inputs, i) for i in range(at.N)}
    rest = [i for i in range(len(examples)) if _content(examples.inputs, i) not in explained]
    return examples[torch.tensor(rest, dtype=torch.int64)]


def _content(inputs: Batch, i: int) -> bytes:
    """What tells one input from another; of a text the tokens, not the padding."""
    if isinstance(inputs, Tensor):
        return inputs[i].detach().double().cpu().numpy().tobytes()
    tokens = inputs.get("input_ids", next(iter(inputs.values())))[i]
    mask = inputs.get("attention_mask")
    return (tokens if mask is None else tokens[mask[i].bool()]).detach().double().cpu().numpy().tobytes()


def _training_of(run: Run) -> dict[str, Any] | None:
    """How the clients of a run of TraceFL's train."""
    file = run.path / "config.yaml"
    if not file.exists():
        return None
    from omegaconf import OmegaConf

    found = {name: OmegaConf.select(OmegaConf.load(file), key) for name, key in _TRAINING.items()}
    return None if None in found.values() else found


def _examples_of(run: Run) -> Examples | None:
    """The server's examples of a run of TraceFL's, unless its prepared data are gone."""
    try:
        return run.server_examples()
    except (TraceFLError, FileNotFoundError):
        return None


def _replay(recorded: Recorded, at: Explained, react: _Memory | _Proxy, scratch_bytes: int) -> Provenance:
    W_T, ids = recorded.load(recorded.last), recorded.ids
    y = at.of_model()
    share = torch.zeros(at.N, len(ids), dtype=torch.float64)
    copies = 1 if isinstance(react, _Memory) else 2  # with a proxy, differences before and after a round
    some = max(1, scratch_bytes // 4 * 3 // (copies * recorded.nbytes))
    for first in range(0, len(ids), some):
        followed = ids[first : first + some]
        for k, d in _differences(recorded, followed, react).items():
            recorded.put(W_T, d)
            share[:, ids.index(k)] = y - at.y(f"the model without client {k!r}", partial(_check, recorded))
    recorded.put(W_T)
    return Provenance("replay", ids, torch.as_tensor(at.targets).cpu(), share[None], [react.name])


@torch.no_grad()
def _differences(recorded: Recorded, ids: Sequence[str], react: _Memory | _Proxy) -> dict[str, Difference]:
    """Client -> d_k after the last round, of those with an update that counted."""
    differences = dict[str, Difference]()
    for t, p in recorded.p.items():
        alone = next(iter(p)) if len(p) == 1 else None
        W = recorded.load(t - 1) if alone in ids or isinstance(react, _Proxy) else {}
        if p:
            answering = {k: d for k, d in differences.items() if k != alone}
            react(t, answering, W)
        for k in ids:
            if k in p and k not in differences:
                differences[k] = {name: torch.zeros_like(w) for name, w in recorded.tensors.items()}
        if alone is not None:
            if alone in ids:
                released = recorded.load(t)
                for name, of in differences[alone].items():
                    of += W[name] - released[name]
            continue
        for name, of_clients in recorded.without(t):
            for k in of_clients.keys() & differences.keys():
                differences[k][name] += of_clients[k].to(differences[k][name].dtype)
    return differences


@torch.no_grad()
def _sum(recorded: Recorded, at: Explained, scratch_bytes: int) -> Provenance:
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
            d = {k: {name: torch.zeros_like(w) for name, w in W.items()} for k in followed}
            for name, of_clients in recorded.without(t):
                for k in followed:
                    d[k][name] += of_clients[k].to(W[name].dtype)
            for k in followed:
                recorded.put(W, d[k])
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


def _check(recorded: Recorded) -> None:
    """Raise TraceFLError for the first recorded state with values that are not finite."""
    for t, clients in recorded.clients.items():
        States(clients, recorded.entries, recorded.aliases_of(t)).check_finite()
