"""How the clients of a round answer when they train on from another model (`whole_run`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tracefl.classifier import Batch, batch_size, copied, exact, logits_of, take
from tracefl.data.examples import Examples
from tracefl.errors import TraceFLError, require
from tracefl.evidence.change import Change
from tracefl.evidence.game import Explained
from tracefl.evidence.recorded_states import RecordedStates
from tracefl.provenance.state import traced_state
from tracefl.provenance.trace import as_classes
from tracefl.results import CONFIG, content_of
from tracefl.runs import Run
from tracefl.states import as_real
from tracefl.training import train

MEMORY = 0.5  # where there is nothing to train a proxy on
PROXY, FADING = 0.7, 0.3  # "mixed": R(d) = 0.7 of the proxy's + 0.3 of memory 0.3's

# How a client trains, and the settings of a run of TraceFL's that say so.
_TRAINING = {"epochs": "client.epochs", "lr": "client.lr", "batch_size": "batch_size"}


@dataclass
class Memory:
    """R(d) = c d on what the round's clients send."""

    c: float
    recorded: RecordedStates

    @property
    def name(self) -> str:
        return f"the whole run, memory {self.c:g}"

    def __call__(self, t: int, changes: dict[str, Change], W: dict[str, Tensor]) -> None:
        for change in changes.values():
            change.fade(self.c, self.recorded.aliases_of(t))


@dataclass
class Proxy:
    """R(d) = s Σ_j p'_j (F_j(W + d) - F_j(W)) + (1 - s) c d, over the round's clients but k.

    F_j is client j's training on server's examples: as many as it has, each class drawn as often
    as it holds it.
    """

    examples: Examples
    training: Mapping[str, Any]
    recorded: RecordedStates
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

    def __call__(self, t: int, changes: dict[str, Change], W: dict[str, Tensor]) -> None:
        if not changes:
            return
        p, names = self.recorded.p[t], self.recorded.aliases_of(t)
        order = torch.randperm(len(p), generator=torch.Generator().manual_seed(t)).tolist()
        drawn = [list(p)[i] for i in order]
        others = {k: [j for j in drawn if j != k][: self.most] for k in changes}
        answers = {k: {name: torch.zeros_like(change.d[name]) for name in names} for k, change in changes.items()}
        for j in drawn:
            answering = [k for k in changes if j in others[k]]
            if not answering:
                continue
            rows, seed = self._drawn(t, j), 1000 * t + drawn.index(j)
            start = self._train(W, None, rows, seed)
            for k in answering:
                end, share = self._train(W, changes[k], rows, seed), p[j] / sum(p[i] for i in others[k])
                for name, answer in answers[k].items():
                    answer.add_(end[name] - start[name], alpha=share)
        for k, change in changes.items():
            for name in names:
                change.d[name].mul_((1 - self.share) * FADING).add_(answers[k][name], alpha=self.share)

    def _train(self, W: dict[str, Tensor], change: Change | None, rows: Tensor, seed: int) -> dict[str, Tensor]:
        self.recorded.put(W, change)
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


def reaction(
    run: Run, recorded: RecordedStates, at: Explained, memory: float | str | None,
    examples: Examples | tuple[Batch, Tensor] | None, training: Mapping[str, Any] | None, proxies: int | None,
) -> Memory | Proxy:  # fmt: skip
    """What the arguments of `trace_run` ask for, checked."""
    if isinstance(memory, int | float):
        return Memory(float(memory), recorded)
    given = training is not None or examples is not None
    training = _training_of(run) if training is None else training
    examples = _examples_of(run) if examples is None else examples
    if memory is None and (examples is None or training is None) and not given:
        return Memory(MEMORY, recorded)
    known = (
        f"memory={memory or 'mixed'!r} needs labelled examples and how clients train, which {run.path} does not hold"
    )
    if examples is None or training is None:
        raise TraceFLError(f"{known}: pass examples= and training=, or memory as a number")
    training, examples = _checked(training), _usable(examples, at)
    if memory is None and not given and len(examples) == 0:
        return Memory(MEMORY, recorded)
    must = "examples must hold others than the inputs that are explained"
    require(len(examples), f"{must}: pass more, or memory as a number")
    memory = memory or "mixed"
    return Proxy(examples, training, recorded, 1.0 if memory == "proxy" else PROXY, proxies)


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
    if (content := content_of(run.path, CONFIG)) is None:
        return None
    from omegaconf import OmegaConf

    config = OmegaConf.create(content.decode())
    found = {name: OmegaConf.select(config, key) for name, key in _TRAINING.items()}
    return None if None in found.values() else found


def _examples_of(run: Run) -> Examples | None:
    """The server's examples of a run of TraceFL's, unless its prepared data are gone."""
    try:
        return run.server_examples()
    except (TraceFLError, FileNotFoundError):
        return None
