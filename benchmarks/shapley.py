"""How true are Shapley values from few fusions, and what do they cost?

    python benchmarks/shapley.py --data data/mnist --model resnet18
    python benchmarks/shapley.py --data data/cifar10 --model cnn --rounds 5
    python benchmarks/shapley.py --data data/dbpedia_14 --model bert --rounds 6
    python benchmarks/shapley.py --data data/mnist --model cnn --clients 30 --evaluations 100 200 400

Trains as influence_ground_truth.py does and explains, for the last `--judged` rounds, the predicted classes of test
inputs, a quarter of them wrong. Up to 14 clients the truth are all 2^K fusions; beyond, a run of `--long` fusions.
Mean over inputs and, where coalitions are drawn, over `--seeds`:
  rho       Spearman, over clients, with the truth        first   how often the same client has the largest value
  error     mean |error| over mean |value|                95 %    share of truths within 1.96 standard errors
and the processor time of `trace` over that of as many bare forward passes plus one read of every state.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from influence_ground_truth import build, one_round, prepared, rows
from torch import Tensor, nn

from tracefl import trace
from tracefl.classifier import logits_of
from tracefl.evidence import coalitions, shapley
from tracefl.judged import spearman

Value = Callable[[Tensor], Tensor]  # bool [M, K] -> v [M, N]
Explain = Callable[[int], tuple[Tensor, Tensor]]  # number of fusions -> Shapley values, standard errors


class Table:
    """All 2^K values, in the place of a game that fuses: what is judged are numbers, many times."""

    def __init__(self, v: Tensor, p: Tensor):
        self.v, self.p, self.ids, self.N = v, p, list(range(len(p))), v.shape[1]

    def play(self, sets: Tensor, nobody: Tensor) -> Tensor:
        return self.v[(sets.long() * 2 ** torch.arange(len(self.p))).sum(1)]

    def ends(self) -> tuple[Tensor, Tensor, Tensor]:
        one = torch.eye(len(self.p), dtype=torch.bool)
        return self.v[-1], self.play(one, self.v[0]), self.play(~one, self.v[0])


def permutations(v: Value, K: int, evaluations: int, random: np.random.Generator) -> Tensor:
    """Antithetic permutations: marginal contributions along an order and along the same backwards."""
    known, phi, n = {(False,) * K, (True,) * K}, 0.0, 0
    while True:
        order = random.permutation(K)
        for way in (order, order[::-1].copy()):
            sets = torch.ones(K + 1, K, dtype=torch.bool).tril(-1)[:, np.argsort(way)]
            fresh = set(map(tuple, sets.tolist())) - known
            if n and len(known) + len(fresh) > evaluations:
                return phi / n
            known |= fresh
            phi, n = phi + v(sets).diff(dim=0)[np.argsort(way)].T, n + 1


def kernel_shap(v: Value, K: int, evaluations: int, random: np.random.Generator) -> Tensor:
    """Paired KernelSHAP (Covert and Lee, 2021): a weighted regression on coalitions and their complements."""
    chance = 1 / (np.arange(1, K) * np.arange(K - 1, 0, -1))
    sets = torch.zeros(evaluations - 2, K, dtype=torch.bool)
    for i in range(0, len(sets) - 1, 2):
        sets[i, random.choice(K, 1 + random.choice(K - 1, p=chance / chance.sum()), replace=False)] = True
        sets[i + 1] = ~sets[i]
    nobody, everyone = v(torch.tensor([[False] * K, [True] * K]))
    x, y, whole = sets.double(), v(sets) - nobody, everyone - nobody
    others = torch.linalg.lstsq(x[:, :-1] - x[:, -1:], y - x[:, -1:] * whole, driver="gelsd").solution
    return torch.cat([others, (whole - others.sum(0))[None]]).T


def judged(phi: Tensor, truth: Tensor, error: Tensor | None = None) -> list[float]:
    held = float("nan") if error is None else ((phi - truth).abs() <= 1.96 * error + 1e-12).double().mean().item()
    return [
        float(np.nanmean(spearman(phi.numpy(), truth.numpy()))),
        (phi.argmax(1) == truth.argmax(1)).double().mean().item(),
        ((phi - truth).abs().mean() / truth.abs().mean()).item(),
        held,
    ]


def line(name: str, evaluations: int, found: list[list[float]]) -> None:
    rho, first, error, held = np.mean(found, axis=0)
    coverage = "" if np.isnan(held) else f"{held:.3f}"
    print(f"| {name} | {evaluations} | {rho:.3f} | {first:.2f} | {error:.3f} | {coverage} |")


def table(v: Tensor, p: Tensor, influence: Tensor, evaluations: list[int], seeds: int) -> None:
    """Every estimate against the exact values, from all 2^K fusions."""
    K, game, truth = len(p), Table(v, p), coalitions.shapley(v)
    line("influence", 0, [judged(influence, truth)])
    line("leave-one-out", K + 1, [judged(coalitions.leave_one_out(v), truth)])
    for n in [2 * K + 2, *evaluations]:
        drawn = range(seeds if n > 2 * K + 2 else 1)
        found = [shapley.values(game, v[0], n, seed) for seed in drawn]
        line("shapley", n, [judged(phi, truth, None if error.isnan().any() else error) for phi, error in found])
        for estimate in (permutations, kernel_shap):
            random = [np.random.default_rng(seed) for seed in range(seeds)]
            rivals = [estimate(lambda sets: game.play(sets, v[0]), K, n, one) for one in random]
            line(estimate.__name__, n, [judged(phi, truth) for phi in rivals])


def against_a_long_run(long: int, evaluations: list[int], K: int, explain: Explain) -> None:
    truth, error = explain(long)
    print(f"a run of {long} fusions, its standard errors {error.mean() / truth.abs().mean():.1%} of a mean value")
    for n in [2 * K + 2, *evaluations]:
        phi, own = explain(n)
        line("shapley", n, [judged(phi, truth, None if own.isnan().any() else (own**2 + error**2).sqrt())])


def seconds(run: Callable[[], object], times: int) -> float:
    run()
    start = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - start) / times


def cost(model: nn.Module, states: dict, x: Tensor | dict, given: dict, evaluations: int) -> None:
    with torch.no_grad():
        forward = seconds(lambda: logits_of(model, x), 10)
    read = seconds(lambda: [w.sum() for state in states.values() for w in state.values()], 2)
    took = seconds(lambda: trace(model, states, x, evaluations=evaluations, **given), 1)
    bare = evaluations * forward + read
    print(f"{evaluations} fusions: {took:.2f} s of processor time, {took / bare:.2f} times {bare:.2f} s", flush=True)


def report(model: nn.Module, states: dict, weights: dict, incoming: dict, x: Tensor | dict, y: Tensor, options) -> None:
    K, n = len(states), torch.tensor(list(weights.values()), dtype=torch.float64)
    given = {"targets": y, "weights": weights, "reference": incoming, "method": "shapley"}
    print("| estimate | fusions | rho | first | error | 95 % |\n|---|---|---|---|---|---|")
    if K <= coalitions.MOST_CLIENTS:
        influence = trace(model, states, x, targets=y, weights=weights, method="influence").contributions
        v = coalitions.values(model, states, weights, incoming, x, y)
        table(v, n / n.sum(), influence, options.evaluations, options.seeds)
    else:

        def explain(number: int) -> tuple[Tensor, Tensor]:
            found = trace(model, states, x, evaluations=number, **given)
            return found.contributions, found.standard_error

        against_a_long_run(options.long, options.evaluations, K, explain)
    cost(model, states, x, given, 2 * K + 2)
    cost(model, states, x, given, options.evaluations[-1])


def small_cnn(classes: int, norm: bool) -> nn.Module:
    layers: list[nn.Module] = []
    for channels, further in ((3, 16), (16, 32), (32, 32)):
        normed = [nn.BatchNorm2d(further)] if norm else []
        layers += [nn.Conv2d(channels, further, 3, stride=2, padding=1), *normed, nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, classes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train-*.parquet and test-*.parquet")
    parser.add_argument("--model", default="resnet18", help="cnn, cnn-batchnorm, bert, or one of torchvision's")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--alpha", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--judged", type=int, default=2, help="how many of the last rounds to judge")
    parser.add_argument("--examples", type=int, default=3000, help="training examples over all clients")
    parser.add_argument("--inputs", type=int, default=12)
    parser.add_argument("--evaluations", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--long", type=int, default=2000, help="fusions that stand for the truth, above 14 clients")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    x, y, parts, x_test, y_test, classes = prepared(options)
    weights = {f"c{k}": len(part) for k, part in enumerate(parts)}
    torch.manual_seed(options.seed)
    cnn = options.model in ("cnn", "cnn-batchnorm")
    model = small_cnn(classes, "-" in options.model) if cnn else build(options.model, classes)
    for number in range(1, options.rounds + 1):
        incoming, states = one_round(model, x, y, parts, options.seed + 1000 * number)
        if number <= options.rounds - options.judged:
            continue
        with torch.no_grad():
            logits = [logits_of(model, rows(x_test, batch)) for batch in torch.arange(len(y_test)).split(100)]
        predicted = torch.cat(logits).argmax(1)
        right = predicted == y_test
        print(f"round {number}: accuracy {right.double().mean():.2f} on {len(y_test)} test examples", flush=True)
        wrong = (~right).nonzero()[: options.inputs // 4, 0]
        chosen = torch.cat([right.nonzero()[: options.inputs - len(wrong), 0], wrong])
        report(model, states, weights, incoming, rows(x_test, chosen), predicted[chosen], options)


if __name__ == "__main__":
    main()
