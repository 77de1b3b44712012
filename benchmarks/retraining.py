"""Who is responsible for the model as it is now? `trace_run` against retraining without each client.

    python benchmarks/retraining.py --seeds 3

Federations on scikit-learn's digits (Dirichlet 0.4), a small CNN with BatchNorm and one without; 10 of 10 clients take
part, 4 of 12, 5 of 20. Recorded through `tracefl.Run`, then trained again without each client `--retrainings` times, by
other orders of the examples; the same clients take part in every round, but for the one that is left out. Explained are
the classes that the last model predicts for test inputs, a quarter of them wrong. Truth: the mean log-odds of the
retrained models, negative. Mean over inputs and seeds:
  rho       Spearman, over clients, with the truth        first   how often the same client has the largest value
  ceiling   one retraining against the mean of the others: what noise leaves to be reached
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from tracefl import trace_run
from tracefl.classifier import log_odds
from tracefl.data.examples import Examples, count_labels
from tracefl.judged import spearman
from tracefl.models import exchanged_state
from tracefl.record import ClientInfo
from tracefl.runs import Run
from tracefl.training import evaluate

FEDERATIONS = ((10, 10), (12, 4), (20, 5))  # clients, of whom in a round
ROUNDS = {True: 6, False: 10}  # with BatchNorm it learns faster
ALPHA, INPUTS = 0.4, 24
TRAINING = {"epochs": 5, "lr": 0.004, "batch_size": 32}
State = dict[str, Tensor]


@dataclass
class Federation:
    """A recorded run and what is known of it. K clients, N explained inputs."""

    run: Run
    model: nn.Module
    parts: dict[str, Tensor]  # client -> its examples' rows
    everything: Examples
    server: Examples
    x: Tensor
    targets: Tensor
    accuracy: float
    without: Tensor  # log-odds of the targets after training without client k, [R, K, N]


def small_cnn(norm: bool) -> nn.Module:
    """On 8 x 8 images, 10 classes."""
    layers: list[nn.Module] = []
    for channels, width in ((1, 12), (12, 24)):
        between = [nn.BatchNorm2d(width)] if norm else []
        layers += [nn.Conv2d(channels, width, 3, padding=1), *between, nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 4, 10))


def digits(clients: int, seed: int) -> tuple[Examples, dict[str, Tensor], Examples, Examples]:
    """All examples, the rows of every client, the server's examples, and those to explain."""
    data = load_digits()
    random = np.random.default_rng(seed)
    order = random.permutation(len(data.target))
    x = torch.tensor(data.images[order] / 8 - 1, dtype=torch.float32)[:, None]
    everything = Examples(x, torch.tensor(data.target[order]))
    server, test, rest = everything[torch.arange(200)], everything[torch.arange(200, 360)], torch.arange(360, len(x))
    share, labels = random.dirichlet([ALPHA] * clients, 10), everything.labels[rest].numpy()
    owner = np.array([random.choice(clients, p=share[label]) for label in labels])
    for k in range(clients):  # nobody has less than two batches
        owner[random.choice(len(owner), max(0, 40 - int((owner == k).sum())), replace=False)] = k
    parts = {str(k): rest[torch.tensor(np.flatnonzero(owner == k))] for k in range(clients)}
    return everything, parts, server, test


def batches(part: Tensor, random: np.random.Generator) -> Tensor:
    """Rows [steps, batch size] of a client's training: every epoch its examples in another order, in full batches."""
    size = TRAINING["batch_size"]
    number = max(1, round(len(part) / size))
    orders = [random.permutation(len(part)) for _ in range(int(TRAINING["epochs"]))]
    return torch.cat([part[np.resize(order, number * size)].view(number, size) for order in orders])


def trained(model: nn.Module, start: State, rows: list[Tensor], everything: Examples) -> State:
    """M models trained at once, as `tracefl.training.train` does one: vmap over the models, and Adam.

    Args:
        start: name -> [M, ...].
        rows: of each model the examples of every step, [steps, batch size].
        everything: examples of all clients.
    """
    order = sorted(range(len(rows)), key=lambda m: -len(rows[m]))  # those that end first come last
    learned = [name for name, _ in model.named_parameters()]
    W = {name: w[order].clone() for name, w in start.items()}
    moments = {name: (torch.zeros_like(W[name]), torch.zeros_like(W[name])) for name in learned}

    def loss(P: State, buffers: State, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, {**P, **buffers}, (x,)), labels)

    model.train()
    for t in range(len(rows[order[0]])):
        M = sum(len(of) > t for of in rows)
        at = torch.stack([rows[m][t] for m in order[:M]])
        P = {name: W[name][:M] for name in learned}
        buffers = {name: w[:M] for name, w in W.items() if name not in P}  # moved in place
        counters = {name: w.expand(M).clone() for name, w in model.named_buffers() if name not in W}
        G = vmap(grad(loss))(P, {**buffers, **counters}, everything.inputs[at], everything.labels[at])
        for name, (m, v) in moments.items():
            m[:M].lerp_(G[name], 0.1)
            v[:M].lerp_(G[name].square(), 0.001)
            step = m[:M] / (1 - 0.9 ** (t + 1)) / ((v[:M] / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
            W[name][:M] -= TRAINING["lr"] * step
    back = torch.tensor(order).argsort()
    return {name: w[back] for name, w in W.items()}


def one_round(
    model: nn.Module, starts: State, parts: Mapping[str, Tensor], who: list[list[str]], everything: Examples,
    random: np.random.Generator,
) -> tuple[list[dict[str, State]], State, list[dict[str, float]]]:  # fmt: skip
    """A round of M federations at once: of each what its clients send, the mean of it, [M, ...], and their weights."""
    of = [m for m, clients in enumerate(who) for _ in clients]
    rows = [batches(parts[k], random) for clients in who for k in clients]
    ends = trained(model, {name: w[of] for name, w in starts.items()}, rows, everything)
    sent, weights, means, first = [], [], {name: w.clone() for name, w in starts.items()}, 0
    for m, clients in enumerate(who):
        n = torch.tensor([len(parts[k]) for k in clients])
        p = n / n.sum()
        of_m = {name: w[first : first + len(clients)] for name, w in ends.items()}
        for name, w in of_m.items():
            if clients:
                means[name][m] = torch.tensordot(p.to(w), w, 1)
        sent.append({k: {name: w[i] for name, w in of_m.items()} for i, k in enumerate(clients)})
        weights.append(dict(zip(clients, p.double().tolist(), strict=True)))
        first += len(clients)
    return sent, means, weights


def recorded(folder: Path, model: nn.Module, digits_of: tuple, a_round: int, rounds: int, seed: int) -> Run:
    """Train a federation and record it."""
    everything, parts, server, _ = digits_of
    state, random = {n: w.clone() for n, w in exchanged_state(model).items()}, np.random.default_rng([seed, 1])
    known = [ClientInfo(k, count_labels(everything.labels[part])) for k, part in parts.items()]
    run = Run.create(folder, initial=state, clients=known, seed=seed)
    for number in range(1, rounds + 1):
        who = [str(k) for k in sorted(random.choice(len(parts), a_round, replace=False))]
        one = {n: w[None] for n, w in state.items()}
        sent, means, weights = one_round(model, one, parts, [who], everything, random)
        state = {n: w[0] for n, w in means.items()}
        took_part = [run.record_client(number, k, sent[0][k], len(parts[k]), weights[0][k]) for k in who]
        model.load_state_dict(state, strict=False)
        run.record_round(number, took_part, state, evaluate(model, server), {})
    return run


def retrained(
    run: Run, model: nn.Module, parts: Mapping[str, Tensor], everything: Examples, x: Tensor, targets: Tensor, R: int
) -> Tensor:
    """Log-odds after training without client k, [R, K, N]; of a client that never took part, NaN."""
    taken = [k for k in parts if any(k == client.id for record in run.rounds for client in record.clients)]
    left_out, random = taken * R, np.random.default_rng([run["seed"], 2])
    states = {n: w.expand(len(left_out), *w.shape) for n, w in run.global_state(0).items()}
    for record in run.rounds:
        who = [[client.id for client in record.clients if client.id != k] for k in left_out]
        _, states, _ = one_round(model, states, parts, who, everything, random)
    found = torch.full((R, len(parts), len(x)), torch.nan, dtype=torch.float64)
    with torch.no_grad():
        for i, k in enumerate(left_out):
            model.load_state_dict({n: w[i] for n, w in states.items()}, strict=False)
            found[i // len(taken), list(parts).index(k)] = log_odds(model.eval()(x), targets).double()
    return found


def federation(folder: Path, norm: bool, clients: int, a_round: int, seed: int, R: int) -> Federation:
    """A federation with its truth; what `folder` holds of it is not computed again."""
    folder = folder / f"{'norm' if norm else 'plain'}-{a_round}-of-{clients}-seed-{seed}"
    everything, parts, server, test = of = digits(clients, seed)
    torch.manual_seed(seed)
    model, truth = small_cnn(norm), folder / f"truth-{R}.pt"
    if not truth.exists():
        shutil.rmtree(folder, ignore_errors=True)  # of one that was interrupted
        recorded(folder, model, of, a_round, ROUNDS[norm], seed)
    run = Run.open(folder)
    model.load_state_dict(dict(run.global_state(ROUNDS[norm])), strict=False)
    found = evaluate(model, test)
    wrong = torch.nonzero(found.predictions != test.labels)[: INPUTS // 4, 0]
    right = torch.nonzero(found.predictions == test.labels)[: INPUTS - len(wrong), 0]
    rows = torch.cat([wrong, right])
    x, targets = test[rows].inputs, found.predictions[rows]
    if not truth.exists():
        torch.save(retrained(run, model, parts, everything, x, targets, R), truth)
    return Federation(run, model, parts, everything, server, x, targets, found.accuracy, torch.load(truth))


def by_label_counts(of: Federation) -> Tensor:
    return torch.tensor([[c.label_counts.get(int(y), 0) for c in of.run.clients] for y in of.targets]).double()


def by_trace_run(**given: object) -> Callable[[Federation], Tensor]:
    def of_clients(of: Federation) -> Tensor:
        more = {} if given.get("method") == "sum" else {"examples": of.server, "training": TRAINING}
        found = trace_run(of.run, of.x, targets=of.targets, model=of.model, **more, **given)  # type: ignore[arg-type]
        columns = [found.client_ids.index(k) if k in found.client_ids else -1 for k in of.parts]
        return torch.stack([found.contributions[:, i] if i >= 0 else torch.zeros(len(of.x)) for i in columns], 1)

    return of_clients


ESTIMATES: dict[str, Callable[[Federation], Tensor]] = {
    "label counts": by_label_counts,
    "last round": by_trace_run(memory=0),
    "sum over rounds": by_trace_run(method="sum"),
    **{f"replay, memory {c:g}": by_trace_run(memory=c) for c in (0.3, 0.5, 0.7, 1)},
    "replay, by proxy": by_trace_run(memory="proxy"),
    "default, proxies=2": by_trace_run(proxies=2),
    "replay, default": by_trace_run(),
}


def agreement(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """Mean over inputs of Spearman's rho and of naming the same client first; [N, K] both."""
    rho = spearman(found.numpy(), truth.numpy())
    return float(np.nanmean(rho)), (found.argmax(1) == truth.argmax(1)).double().mean().item()


def judged(of: Federation, found: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Of every estimate [N, K] how it agrees with the truth; and the ceiling."""
    trained_again = -of.without.transpose(1, 2)
    there = ~trained_again[0, 0].isnan()  # of the others there is no truth
    trained_again = trained_again[:, :, there]
    result = {name: agreement(values[:, there], trained_again.mean(0)) for name, values in found.items()}
    R = len(trained_again)
    others = [(trained_again.sum(0) - one) / (R - 1) for one in trained_again]
    ceilings = [agreement(one, rest) for one, rest in zip(trained_again, others, strict=True)]
    return {**result, "ceiling": tuple(np.mean(ceilings, 0))}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--retrainings", type=int, default=3)
    arguments.add_argument("--folder", type=Path, help="where runs and retrained outputs are kept (default: nowhere)")
    arguments.add_argument("--clients", type=int, nargs="+", default=[10, 12, 20], help="which federations")
    arguments.add_argument("--prepare", action="store_true", help="train and retrain into --folder, and stop")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    table: dict[str, dict[str, list[tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for seed in range(options.seeds):
            for clients, a_round in [(K, some) for K, some in FEDERATIONS if K in options.clients]:
                for norm in (True, False):
                    column = f"{a_round} of {clients}, {'BatchNorm' if norm else 'plain'}"
                    of = federation(folder, norm, clients, a_round, seed, options.retrainings)
                    print(f"{column}, seed {seed}: accuracy {of.accuracy:.2f}", flush=True)
                    if options.prepare:
                        continue
                    pairs = judged(of, {name: make(of) for name, make in ESTIMATES.items()})
                    for name, (rho, first) in pairs.items():
                        print(f"    {name:20} {rho:.2f} / {first:.2f}", flush=True)
                        table.setdefault(name, {}).setdefault(column, []).append((rho, first))
    print("\nmeans: rho / first".ljust(21), *(f"{column:>19}" for column in next(iter(table.values()), {})))
    for name, columns in table.items():
        means = [np.mean(pairs, 0) for pairs in columns.values()]
        print(f"{name:20}", *(f"{rho:12.2f} /{first:5.2f}" for rho, first in means))


if __name__ == "__main__":
    main()
