"""Do answers as sets hold whom they should, and do shuffled weights destroy the answer?

    python benchmarks/answers.py
    python benchmarks/answers.py --alpha 100 --rounds 2      # clients that are nearly alike

Trains a small CNN on scikit-learn's digits, ten clients by Dirichlet (every seed takes the next alpha), by plain
FedAvg, and explains the predicted classes of test inputs after `--rounds`. The truth are the Shapley values from all
1,024 fusions. Sets by the spread over inputs of the same predicted class, or by the standard error:
  nobody     share of the answers that name nobody          size   mean number of clients in the others
  first      how often they hold the client with the largest exact value, beside random sets of the same size
  another    how often they hold the client that the same method puts first for another input of the class
Then Spearman, over clients, of every method with that truth, as it is and with the numbers of every tensor shuffled,
alike for all models, or for each apart; mean over `--shuffles` draws and all inputs (the federation farthest from 0).
The last column: with the clients' numbers of examples instead of the truth, shuffled alike.
"""

from __future__ import annotations

import argparse
import copy
from collections import defaultdict
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from influence_ground_truth import dirichlet, trained, with_shuffled_weights
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tracefl import Provenance, answer_sets, trace
from tracefl.evidence import coalitions
from tracefl.judged import spearman


class Round(NamedTuple):
    """A round of a federation, and what is explained of it."""

    model: nn.Module
    states: dict[str, dict[str, Tensor]]
    weights: dict[str, int]
    incoming: dict[str, Tensor]
    x: Tensor
    targets: Tensor


def small_cnn(norm: bool) -> nn.Module:
    first = [nn.Conv2d(1, 16, 3, padding=1), *([nn.BatchNorm2d(16)] if norm else []), nn.ReLU()]
    second = [nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(256, 10))


def federation(seed: int, rounds: int, inputs: int, alpha: float = 0.3, clients: int = 10, norm: bool = False) -> Round:
    """The last of `rounds` rounds on digits."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x, y = torch.tensor(pixels[order]).float().view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels[order])
    x_test, x, y = x[:360], x[360:], y[360:]
    parts = [part for part in dirichlet(y.numpy(), clients, alpha, seed) if len(part) > 1]
    weights = {f"c{k}": len(part) for k, part in enumerate(parts)}
    torch.manual_seed(seed)
    model = small_cnn(norm)
    for number in range(1, rounds + 1):
        incoming = copy.deepcopy(model.state_dict())
        states = {f"c{k}": trained(model, x[part], y[part], seed + 1000 * number + k) for k, part in enumerate(parts)}
        model.load_state_dict({
            name: sum(n / sum(weights.values()) * states[who][name] for who, n in weights.items())
            if w.is_floating_point() else w
            for name, w in incoming.items()
        })  # fmt: skip
        model.eval()
    with torch.no_grad():
        return Round(model, states, weights, incoming, x_test[:inputs], model(x_test[:inputs]).argmax(1))


def exact_values(of: Round) -> Tensor:
    v = coalitions.values(of.model, of.states, of.weights, of.incoming, of.x, of.targets)
    return coalitions.shapley(v)


def explained(of: Round, method: str, evaluations: int | None = None) -> Provenance:
    given: dict[str, Any] = {"method": method, "targets": of.targets}
    if method != "neuron":
        given["weights"] = of.weights
    if method == "shapley":
        given |= {"reference": of.incoming, "evaluations": evaluations}
    return trace(of.model, of.states, of.x, **given)


def judged(found: Provenance, truth: Tensor, rows: Tensor) -> list[float]:
    """Sets of the inputs `rows`; all inputs together say who is first for another one of the class."""
    some = replace(
        found, targets=found.targets[rows], by_layer=found.by_layer[:, rows],
        standard_error=None if found.standard_error is None else found.standard_error[rows],
    )  # fmt: skip
    sets, first = answer_sets(some), [found.client_ids[k] for k in truth.argmax(1)[rows].tolist()]
    others = defaultdict(list)
    for i in sorted({*range(len(found.targets))} - {*rows.tolist()}):
        others[int(found.targets[i])].append(found.responsible[i])
    held = [
        np.mean([who in named for who in others[label]])
        for named, label in zip(sets.sets, some.targets.tolist(), strict=True)
        if named and others[label]
    ]
    return [sets.nobody, sets.size, *sets.coverage(first), float(np.mean(held)) if held else np.nan]


def sets_table(rounds: list[Round], truths: list[Tensor], few: list[int], evaluations: list[int]) -> None:
    print("| method | spread | nobody | size | first (chance) | another |\n|---|---|---|---|---|---|")

    def line(method: str, spread: str, found: list[list[float]]) -> None:
        nobody, size, first, chance, another = np.ma.masked_invalid(found).mean(axis=0).filled(np.nan)
        last = "" if np.isnan(another) else f"{another:.3f}"
        print(f"| {method} | {spread} | {nobody:.2f} | {size:.2f} | {first:.3f} ({chance:.2f}) | {last} |", flush=True)

    for method in ("neuron", "influence", "shapley"):
        answers = [explained(of, method) for of in rounds]
        for number in few:
            found = []
            for answer, truth in zip(answers, truths, strict=True):
                of_class = [(answer.targets == label).nonzero()[:number, 0] for label in answer.targets.unique()]
                found.append(judged(answer, truth, torch.cat(of_class)))
            line(method, f"{number} inputs of a class", found)
    for number in evaluations:
        found = []
        for of, truth in zip(rounds, truths, strict=True):
            answer = explained(of, "shapley", number)
            found.append(judged(answer, truth, torch.arange(len(of.x))))
        line("shapley", f"standard error of {number} fusions", found)


def sizes(of: Round) -> Tensor:
    """Number of examples of every client, in the place of a truth [N, K]."""
    return torch.tensor(list(of.weights.values()), dtype=torch.float64).expand(len(of.x), -1)


def agreement(of: Round, truth: Tensor, method: str, how: str, shuffles: int) -> float:
    """Spearman with the truth of the models as they are; how: "as it is", "alike" or "apart"."""
    if how == "as it is":
        answers = [explained(of, method).contributions]
    else:
        given: dict[str, Any] = {"method": method, "targets": of.targets}
        given |= {} if method == "neuron" else {"weights": of.weights}
        answers = [
            with_shuffled_weights(of.model, of.states, of.incoming, of.x, how == "alike", seed, **given)
            for seed in range(shuffles)
        ]
    return float(np.mean([np.nanmean(spearman(answer.numpy(), truth.numpy())) for answer in answers]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.3, 0.7])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--inputs", type=int, default=180)
    parser.add_argument("--few", type=int, nargs="+", default=[2, 4, 10], help="inputs of a class that are explained")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--shuffles", type=int, default=10)
    options = parser.parse_args()
    alphas = [options.alpha[seed % len(options.alpha)] for seed in range(options.seeds)]
    rounds = [federation(seed, options.rounds, options.inputs, alpha) for seed, alpha in enumerate(alphas)]
    truths = [exact_values(of) for of in rounds]
    pairs = list(zip(rounds, truths, strict=True))
    sets_table(rounds, truths, options.few, options.evaluations)
    print("\n| method | as it is | shuffled alike | shuffled apart | alike, with sizes |\n|---|---|---|---|---|")
    for method in ("neuron", "influence", "shapley"):
        cells = []
        for how in ("as it is", "alike", "apart"):
            found = [agreement(of, truth, method, how, options.shuffles) for of, truth in pairs]
            cells.append(f"{np.mean(found):.2f}" + ("" if how == "as it is" else f" ({max(found, key=abs):.2f})"))
        with_sizes = np.mean([agreement(of, sizes(of), method, "alike", options.shuffles) for of in rounds])
        print(f"| {method} | {' | '.join(cells)} | {with_sizes:.2f} |", flush=True)


if __name__ == "__main__":
    main()
