"""Does the verdict find faulty clients, and nobody where there are none?

    python benchmarks/faults.py                                                       (digits, a small CNN)
    python benchmarks/faults.py --model resnet18 --data data/mnist --alphas 0.7 --faults 1 --seeds 1

Trains federations of ten clients in this process, each with one or three faulty clients of one kind (or none), records
them as runs, and asks:
  verdict        `judge(audit_run(run))`, which knows nothing: recall, and precision of its accusations
  audit          the clients with the largest z over the rounds
  influence      those with the largest mean contribution to the traced mispredictions (of correct predictions where
  neuron         there are none); the same by the paper's score
  FedDebug       those with the most votes
  two scores     in the manner of FLForensics: each client's influence on mispredictions and on correct predictions of
                 the same classes, clustered by HDBSCAN; a cluster beside the largest with more influence on
                 mispredictions is accused
Audit, influence, neuron and FedDebug are told how many clients are faulty and name as many: recall, by chance F / K.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from omegaconf import OmegaConf
from sklearn.cluster import HDBSCAN
from torch import nn

from tracefl import trace
from tracefl.checks import load
from tracefl.config import Config
from tracefl.data.examples import Examples
from tracefl.data.faults import client_seed, fault_settings, faulty_examples, opposite
from tracefl.data.prepare import prepare
from tracefl.evaluation import feddebug, tracing
from tracefl.evaluation.stopwatch import Stopwatch
from tracefl.evidence.verdict import audit_run, judge
from tracefl.models import build_model, exchanged_state, load_exchanged_state
from tracefl.record import ClientInfo
from tracefl.runs import Run
from tracefl.training import evaluate, train

CLIENTS, CLASSES = 10, 10
KINDS = ("label_flip", "random_labels", "backdoor", "free_rider", "sign_flip")


def small_cnn(norm: bool = True) -> nn.Module:
    """Three convolutions with BatchNorm (or without), 3 x 32 x 32 pixels to ten classes."""
    layers: list[nn.Module] = []
    for i, o in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(i, o, 3, padding=1), *([nn.BatchNorm2d(o)] if norm else []), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, CLASSES))


def build(name: str) -> nn.Module:
    if name.startswith("cnn"):
        return small_cnn(norm=name == "cnn")
    return build_model({"name": name, "num_classes": CLASSES})


def configuration(args: argparse.Namespace, kind: str, faults: int, alpha: float, seed: int, folder: str) -> Config:
    faulty = np.random.default_rng(seed).permutation(CLIENTS)[:faults].tolist()
    wanted = {
        "seed": seed, "dirichlet_alpha": alpha, "num_clients": CLIENTS, "clients_per_round": CLIENTS,
        "storage": {"dir": folder}, "num_rounds": args.rounds, "faulty_clients_ids": faulty,
    }  # fmt: skip
    if args.data is not None:
        wanted |= {"dataset": {"path": str(args.data)}, "data_dist": {"max_per_client_data_size": args.examples}}
    if faults:
        wanted["fault"] = {"kind": kind}
    if kind == "label_flip":
        wanted["label2flip"] = dict.fromkeys(range(1, CLASSES), 0)
    if kind == "backdoor":
        wanted["noise_rate"] = 0.5
    return load(OmegaConf.create(OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(Config), wanted))))


def recorded(args: argparse.Namespace, config: Config, folder: Path) -> tuple[Run, nn.Module, Examples]:
    """Train by FedAvg as the product's clients do, and record."""
    data = prepare(config)
    server, fault = data.server(), fault_settings(config, CLASSES)
    infos = [ClientInfo(who, counts) for who, counts in data.label_counts.items()]
    trained_on = {}
    for who in data.label_counts:
        own, faulty = data.client(who), int(who) in config.faulty_clients_ids
        trained_on[who] = faulty_examples(own, fault, client_seed(config.seed, 0, int(who))) if faulty else own
    sizes = {who: len(own) for who, own in trained_on.items()}
    torch.manual_seed(config.seed)
    model = build(args.model)
    W = {name: w.clone() for name, w in exchanged_state(model).items()}
    run = Run.create(folder, initial=W, clients=infos, seed=config.seed)
    for t in range(1, config.num_rounds + 1):
        parts, mean = [], {name: torch.zeros_like(w, dtype=torch.float64) for name, w in W.items()}
        for who, own in trained_on.items():
            kind = config.fault.kind if int(who) in config.faulty_clients_ids else ""
            load_exchanged_state(model, W)
            if kind != "free_rider":
                seed = client_seed(config.seed, t, int(who))
                train(model, own, epochs=args.epochs, lr=args.lr, batch_size=32, seed=seed)
            state = {name: w.clone() for name, w in exchanged_state(model).items()}
            state = opposite(W, state) if kind == "sign_flip" else state
            share = sizes[who] / sum(sizes.values())
            parts.append(run.record_client(t, who, state, sizes[who], share))
            mean = {name: mean[name] + share * w.double() for name, w in state.items()}
        W = {name: mean[name].to(w.dtype) for name, w in W.items()}
        load_exchanged_state(model, W)
        run.record_round(t, parts, W, evaluate(model, server), {})
    return run, model, server


def most(scores: pd.Series, count: int) -> set[str]:
    return set(scores.sort_values(ascending=False).index[:count].astype(str))


def two_scores(run: Run, model: nn.Module, server: Examples) -> set[str]:
    """The clients that the clustering of two scores accuses."""
    ids, found = [client.id for client in run.clients], np.zeros((2, len(run.clients)))
    for record in run.rounds:
        load_exchanged_state(model, dict(run.global_state(record.number)))
        predicted, weights = run.predictions(record.number), {c.id: c.weight for c in record.clients}
        wrong = (predicted != server.labels).nonzero()[:20, 0]
        right = ((predicted == server.labels) & torch.isin(predicted, predicted[wrong])).nonzero()[:20, 0]
        for place, some in enumerate((wrong, right)):
            if len(some):
                states, inputs = run.client_states(record.number), server[some].inputs
                answer = trace(model, states, inputs, targets=predicted[some], weights=weights, method="influence")
                found[place] += answer.contributions.mean(0).numpy()
    points = (found - found.mean(1, keepdims=True)) / (found.std(1, keepdims=True) + 1e-12)
    cluster = HDBSCAN(min_cluster_size=3, allow_single_cluster=True, copy=True).fit_predict(points.T)
    largest = np.bincount(cluster[cluster >= 0]).argmax() if (cluster >= 0).any() else -1
    honest = found[0, cluster == largest].mean()
    return {who for who, c, s in zip(ids, cluster, found[0], strict=True) if c != largest and s > honest}


def one(job: tuple[argparse.Namespace, str, int, float, int]) -> list[dict[str, object]]:
    """Train and judge one federation: a row per way of naming."""
    args, kind, faults, alpha, seed = job
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(args, kind, faults, alpha, seed, folder)
        run, model, server = recorded(args, config, Path(folder) / "run")
        faulty = {str(k) for k in config.faulty_clients_ids}
        table = audit_run(run, model=model, examples=server)
        verdict = judge(table)
        named = {"verdict": set(verdict.faulty), "two scores": two_scores(run, model, server)}
        if faults:
            named["audit"] = most(pd.Series({who: of.z for who, of in verdict.clients.items()}), faults)
            answers = [tracing.trace_round(config, run, model, server, r.number) for r in run.rounds]
            for method, part in pd.concat(answers).groupby("method"):
                named[str(method)] = most(part.groupby("client")["contribution"].mean(), faults)
            votes = [feddebug.debug_round(config, run, model, r.number, Stopwatch()) for r in run.rounds]
            named["FedDebug"] = most(pd.concat(votes)["client"].value_counts(), faults)
        of_run = {"kind": kind, "faults": faults, "alpha": alpha, "seed": seed, "accuracy": run.rounds[-1].accuracy}
        rows = [
            {**of_run, "method": method, "hits": len(who & faulty), "named": len(who)} for method, who in named.items()
        ]
        if args.verbose:
            for who, of in verdict.clients.items():
                mark = ("+" if who in faulty else "!") if who in verdict.faulty else ("-" if who in faulty else " ")
                if mark != " ":
                    print(f"  {mark} {kind} {faults} {alpha} {seed}: c{who} {of.why}; z {of.z:.1f}", flush=True)
        return rows


def shown(results: pd.DataFrame) -> Iterator[str]:
    """The tables in Markdown."""
    methods = ["verdict", "audit", "influence", "neuron", "FedDebug", "two scores"]
    yield "| fault | faulty | runs | accuracy | " + " | ".join(methods) + " | chance |"
    yield "|---" * (len(methods) + 5) + "|"
    faulty = results[results["faults"] > 0]
    for (kind, count), part in faulty.groupby(["kind", "faults"], sort=False):
        cells = []
        for method in methods:
            own = part[part["method"] == method]
            recall, precision = own["hits"].sum() / (len(own) * count), own["hits"].sum() / max(own["named"].sum(), 1)
            told = method not in ("verdict", "two scores")
            cells.append(f"{recall:.2f}" if told else f"{recall:.2f} ({precision:.2f})")
        runs = part[part["method"] == "verdict"]
        of_runs = f"{kind} | {count} | {len(runs)} | {runs['accuracy'].mean():.2f}"
        yield f"| {of_runs} | {' | '.join(cells)} | {count / CLIENTS:.2f} |"
    for who in ("verdict", "two scores"):
        own, clean = (part[part["method"] == who] for part in (faulty, results[results["faults"] == 0]))
        recall, precision = own["hits"].sum() / own["faults"].sum(), own["hits"].sum() / max(own["named"].sum(), 1)
        accused = f"accused somebody in {(clean['named'] > 0).sum()} of {len(clean)} clean runs"
        yield f"{who}: recall {recall:.3f}, precision {precision:.3f}; {accused}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cnn", help="cnn, cnn-plain (without BatchNorm), or a model of torchvision")
    parser.add_argument("--data", type=Path, help="folder of a dataset; default: digits")
    parser.add_argument("--examples", type=int, default=400, help="of a client, with --data")
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--faults", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.3, 0.7])
    parser.add_argument("--seeds", type=int, default=5, help="how many; two clean runs for each")
    parser.add_argument("--first-seed", type=int, default=10, help="the limits of the verdict were set on seeds 0 to 2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--verbose", action="store_true", help="print why each faulty client was accused, or not")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    with ProcessPoolExecutor(args.jobs) as pool:
        for number in range(args.seeds):
            seeds = args.first_seed + 1000 * number, args.first_seed + 1000 * number + 1  # of the clean runs
            jobs = [(args, "clean", 0, alpha, seed) for alpha in args.alphas for seed in seeds]
            jobs += [(args, *case, seeds[0]) for case in product(args.kinds, args.faults, args.alphas)]
            rows += [row for found in pool.map(one, jobs) for row in found]
            print(f"\nafter {number + 1} of {args.seeds} seeds", *shown(pd.DataFrame(rows)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
