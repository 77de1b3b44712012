"""Who is responsible for the model as it is now? `trace_run` against retraining without each client.

    python benchmarks/retraining.py --seeds 3

Federations on scikit-learn's digits (Dirichlet 0.3), a small CNN with BatchNorm and one without; 10 of 10 clients take
part, 4 of 12, 5 of 20. Recorded through `tracefl.Run`, then trained again without each client `--retrainings` times, by
other orders of the examples; the same clients take part in every round, but for the one that is left out. Explained are
the classes that the last model predicts for test inputs. Truth: the mean log-odds of the retrained models, negative.
Mean over inputs and seeds:
  rho       Spearman, over clients, with the truth        first   how often the same client has the largest value
  ceiling   one retraining against the mean of the others: what noise leaves to be reached
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tracefl import trace_run
from tracefl.classifier import log_odds
from tracefl.data.examples import Examples, count_labels
from tracefl.evaluation.localization import spearman
from tracefl.models import exchanged_state
from tracefl.runs import ClientInfo, Run
from tracefl.training import evaluate, train

FEDERATIONS = ((10, 10), (12, 4), (20, 5))  # clients, of whom in a round
INPUTS = 24
ROUNDS = {True: 6, False: 8}  # with BatchNorm, without, which learns more slowly
TRAINING = {norm: {"epochs": 3, "lr": lr, "batch_size": 16} for norm, lr in ((True, 0.003), (False, 0.006))}


def small_cnn(norm: bool) -> nn.Module:
    """On 8 x 8 images, 10 classes."""
    layers: list[nn.Module] = []
    for channels, width in ((1, 12), (12, 24)):
        between = [nn.BatchNorm2d(width)] if norm else []
        layers += [nn.Conv2d(channels, width, 3, padding=1), *between, nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 4, 10))


def has_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def digits(clients: int, seed: int) -> tuple[dict[str, Examples], Examples, Examples]:
    """Every client's examples, the server's, and those to explain."""
    data = load_digits()
    random = np.random.default_rng(seed)
    order = random.permutation(len(data.target))
    x = torch.tensor(data.images[order] / 8 - 1, dtype=torch.float32)[:, None]
    everything = Examples(x, torch.tensor(data.target[order]))
    server, test, rest = everything[torch.arange(200)], everything[torch.arange(200, 360)], torch.arange(360, len(x))
    share, labels = random.dirichlet([0.3] * clients, 10), everything.labels[rest].numpy()
    owner = np.array([random.choice(clients, p=share[label]) for label in labels])
    for k in range(clients):  # nobody has less than two batches
        owner[random.choice(len(owner), max(0, 24 - int((owner == k).sum())), replace=False)] = k
    parts = {str(k): everything[rest[torch.tensor(np.flatnonzero(owner == k))]] for k in range(clients)}
    return parts, server, test


def one_round(
    model: nn.Module, start: Mapping[str, Tensor], parts: Mapping[str, Examples], who: list[str], seed: list[int]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, float]]:
    """What these clients send, the mean of it, and their weights."""
    n = {k: len(parts[k]) for k in who}
    weights, sent = {k: n[k] / sum(n.values()) for k in who}, {}
    for k in who:
        model.load_state_dict(start, strict=False)
        drawn = int(np.random.default_rng([*seed, int(k)]).integers(2**31))
        train(model, parts[k], seed=drawn, **TRAINING[has_norm(model)])
        sent[k] = {name: w.clone() for name, w in exchanged_state(model).items()}
    mean = {name: sum(weights[k] * sent[k][name] for k in who) for name in start} if who else dict(start)
    return sent, mean, weights


def recorded(folder: Path, norm: bool, clients: int, a_round: int, seed: int) -> tuple[Run, nn.Module, dict, Examples]:
    """A run, its architecture, the clients' examples and those to explain."""
    parts, server, test = digits(clients, seed)
    torch.manual_seed(seed)
    model, random = small_cnn(norm), np.random.default_rng([seed, 1])
    state = {name: w.clone() for name, w in exchanged_state(model).items()}
    known = [ClientInfo(k, count_labels(part.labels)) for k, part in parts.items()]
    run = Run.create(folder, initial=state, clients=known, seed=seed)
    for number in range(1, ROUNDS[norm] + 1):
        who = [str(k) for k in sorted(random.choice(clients, a_round, replace=False))]
        sent, state, weights = one_round(model, state, parts, who, [seed, 2, number])
        took_part = [run.record_client(number, k, sent[k], len(parts[k]), weights[k]) for k in who]
        model.load_state_dict(state, strict=False)
        run.record_round(number, took_part, state, evaluate(model, server), {})
    return run, model, parts, test


def retrained(run: Run, model: nn.Module, parts: Mapping[str, Examples], x: Tensor, targets: Tensor, R: int) -> Tensor:
    """Log-odds after training without client k, [R, K, N]; of a client that never took part, NaN."""
    took_part = {client.id for record in run.rounds for client in record.clients}
    found = torch.full((R, len(parts), len(x)), torch.nan, dtype=torch.float64)
    for r in range(R):
        for k, without in enumerate(parts):
            if without not in took_part:
                continue
            state = dict(run.global_state(0))
            for record in run.rounds:
                who = [client.id for client in record.clients if client.id != without]
                _, state, _ = one_round(model, state, parts, who, [run["seed"], 3, r, k, record.number])
            model.load_state_dict(state, strict=False)
            with torch.no_grad():
                found[r, k] = log_odds(model.eval()(x), targets).double()
    return found


def prepared(folder: Path, norm: bool, clients: int, a_round: int, seed: int, R: int) -> dict:
    """A federation with its truth; what `folder` holds of it is not computed again."""
    folder = folder / f"{'norm' if norm else 'plain'}-{a_round}-of-{clients}-seed-{seed}"
    truth = folder / "truth.pt"
    if truth.exists():
        parts, server, test = digits(clients, seed)
        run, model = Run.open(folder), small_cnn(norm)
        return {"run": run, "model": model, "parts": parts, "server": server, **torch.load(truth)}
    run, model, parts, test = recorded(folder, norm, clients, a_round, seed)
    model.load_state_dict(dict(run.global_state(len(run.rounds))), strict=False)
    found = evaluate(model, test)
    wrong = torch.nonzero(found.predictions != test.labels)[: INPUTS // 4, 0]
    right = torch.nonzero(found.predictions == test.labels)[: INPUTS - len(wrong), 0]
    rows = torch.cat([wrong, right])
    x, targets = test[rows].inputs, found.predictions[rows]
    of = {"x": x, "targets": targets, "accuracy": found.accuracy}
    of["without"] = retrained(run, model, parts, x, targets, R)
    torch.save(of, truth)
    _, server, _ = digits(clients, seed)
    return {"run": run, "model": model, "parts": parts, "server": server, **of}


def judged(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """rho and first, of values [N, K]."""
    first = found.argmax(1) == truth.argmax(1)
    return float(np.nanmean(spearman(found.numpy(), truth.numpy()))), first.double().mean().item()


def estimates(of: dict, took_part: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Name of each row, and its values [N, K] of the clients that took part."""
    given = {
        "targets": of["targets"],
        "model": of["model"],
        "examples": of["server"],
        "training": TRAINING[has_norm(of["model"])],
    }
    rows = {f"replay, memory {c:g}": {"memory": c} for c in (0.3, 0.5, 0.7, 0.9, 1.0)}
    rows = {"last round": {"memory": 0.0}, "sum over rounds": {"method": "sum"}, **rows}
    rows |= {"replay, by proxy": {"memory": "proxy"}, "replay, default (mixed)": {}}
    for name, row in rows.items():
        found = trace_run(of["run"], of["x"], **given, **row)
        yield name, found.contributions[:, [found.client_ids.index(k) for k in took_part]]
    held = [[count_labels(of["parts"][k].labels).get(c, 0) for k in took_part] for c in of["targets"].tolist()]
    yield "label counts", torch.tensor(held, dtype=torch.float64)


def judge(of: dict) -> dict[str, tuple[float, float]]:
    """rho and first of every row, and the ceiling."""
    took_part = {client.id for record in of["run"].rounds for client in record.clients}
    kept = [k for k, who in enumerate(of["parts"]) if who in took_part]
    truths = -of["without"][:, kept].transpose(1, 2)  # [R, N, K]
    names = [who for who in of["parts"] if who in took_part]
    rows = {name: judged(found, truths.mean(0)) for name, found in estimates(of, names)}
    against = [judged(one, torch.cat([truths[:r], truths[r + 1 :]]).mean(0)) for r, one in enumerate(truths)]
    return {**rows, "ceiling": tuple(np.mean(against, 0).tolist())}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--retrainings", type=int, default=3)
    arguments.add_argument("--folder", type=Path, help="where runs and retrained outputs are kept (default: nowhere)")
    arguments.add_argument("--clients", type=int, nargs="+", default=[10, 12, 20], help="which federations")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    tables: dict[str, list[dict[str, tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for seed in range(options.seeds):
            for clients, a_round in [(K, some) for K, some in FEDERATIONS if K in options.clients]:
                for norm in (True, False):
                    of = prepared(folder, norm, clients, a_round, seed, options.retrainings)
                    title = f"{a_round} of {clients}, CNN {'with' if norm else 'without'} BatchNorm"
                    print(f"{title}, seed {seed}: accuracy {of['accuracy']:.2f}", flush=True)
                    tables.setdefault(title, []).append(judge(of))
    for title, found in tables.items():
        print(f"\n{title}, {len(found)} seeds{'rho':>{46 - len(title)}}{'first':>8}")
        for name in found[0]:
            rho, first = np.mean([row[name] for row in found], 0)
            print(f"  {name:42}{rho:12.2f}{first:8.2f}")


if __name__ == "__main__":
    main()
