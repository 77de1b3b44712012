"""How true are the scores? Against all 2^K coalitions of a round: exact leave-one-out, exact Shapley, client-LDS.

    python benchmarks/influence_ground_truth.py --data data/mnist --model resnet18
    python benchmarks/influence_ground_truth.py --data data/cifar10 --model densenet121
    python benchmarks/influence_ground_truth.py --data data/dbpedia_14 --model bert --rounds 6
    python benchmarks/influence_ground_truth.py --run logs/<a recorded run>

Without a recorded run, trains by plain FedAvg (clients by Dirichlet, Adam at 1e-3, 2 epochs, batch 32). For the last
`--judged` rounds, explains test inputs that the released model gets right. Mean over inputs of
  client-LDS   Spearman, over coalitions, of the sum of the members' scores with the log-odds of the coalition's model
  mean-LDS     the same of their weighted mean, the sum over the members' weight, as fusing them moves the model
  rho loo      Spearman, over clients, with exact leave-one-out;   rho Shapley: with exact Shapley values
  rho nudge    with what the log-odds lose when W_g goes a hundredth of the way that leaving a client out would take it:
               where this is 1 and rho loo is not, the rest is the curvature that first-order scores cannot see
  top holder   how often the best score is that of the client with the most examples of the label (chance: 1 / K)
The last two rows are a sanity check: the numbers of every tensor in another order, the same for all models or for each
its own; what then still agrees with the truth was not learned.
"""

from __future__ import annotations

import argparse
import copy
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn

from tracefl import trace
from tracefl.classifier import log_odds, logits_of
from tracefl.evidence import coalitions
from tracefl.judged import spearman
from tracefl.runs import Run

Inputs = Tensor | dict[str, Tensor]


def rows(inputs: Inputs, chosen: Tensor) -> Inputs:
    return {k: v[chosen] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[chosen]


def examples_of(folder: Path, split: str, limit: int, seed: int) -> pd.DataFrame:
    return pd.read_parquet(next(folder.glob(f"{split}-*.parquet"))).sample(limit, random_state=seed)


def images(frame: pd.DataFrame) -> Tensor:
    column = "image" if "image" in frame else "img"
    pixels = [Image.open(io.BytesIO(cell["bytes"])).convert("RGB").resize((32, 32)) for cell in frame[column]]
    return torch.from_numpy(np.stack([np.asarray(p) for p in pixels])).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def texts(frames: list[pd.DataFrame]) -> list[Inputs]:
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator(frames[0]["content"], vocab_size=8000)
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(length=64)
    encoded = [tokenizer.encode_batch(list(frame["content"])) for frame in frames]
    return [
        {
            "input_ids": torch.tensor([e.ids for e in batch]),
            "attention_mask": torch.tensor([e.attention_mask for e in batch]),
        }
        for batch in encoded
    ]


def build(name: str, classes: int) -> nn.Module:
    if name == "bert":
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
        return BertForSequenceClassification(BertConfig(vocab_size=8000, num_labels=classes, **sizes))
    import torchvision

    return torchvision.models.get_model(name, num_classes=classes)


def dirichlet(labels: np.ndarray, clients: int, alpha: float, seed: int) -> list[Tensor]:
    """Every class is spread over the clients by a Dirichlet draw."""
    random = np.random.default_rng(seed)
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        own = random.permutation(np.flatnonzero(labels == label))
        cuts = (np.cumsum(random.dirichlet([alpha] * clients))[:-1] * len(own)).astype(int)
        for part, piece in zip(parts, np.split(own, cuts), strict=True):
            part.extend(piece.tolist())
    return [torch.tensor(part) for part in parts]


def trained(model: nn.Module, inputs: Inputs, labels: Tensor, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(2):
        for batch in torch.randperm(len(labels)).split(32):
            if len(batch) > 1:
                loss = nn.functional.cross_entropy(logits_of(model, rows(inputs, batch)), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.state_dict()


def shuffled(states: list[dict[str, Tensor]], alike: bool, seed: int = 0) -> list[dict[str, Tensor]]:
    """The numbers of every tensor in another order: the same for all states, or for each its own."""
    generator, found = torch.Generator(), []
    for number, state in enumerate(states):
        generator.manual_seed(seed if alike else 1000 * seed + number)
        order = {name: torch.randperm(w.numel(), generator=generator) for name, w in state.items()}
        found.append({name: w.flatten()[order[name]].view(w.shape) for name, w in state.items()})
    return found


def with_shuffled_weights(
    model: nn.Module, states: dict, incoming: dict, x: Inputs, alike: bool, seed: int = 0, **given: Any
) -> Tensor:
    """`trace` of a round whose models have lost what they know: contributions [N, K]."""
    model = copy.deepcopy(model)
    of_model, of_incoming, *of_clients = shuffled([model.state_dict(), incoming, *states.values()], alike, seed)
    model.load_state_dict(of_model, strict=False)
    clients = dict(zip(states, of_clients, strict=True))
    reference = {"reference": of_incoming} if given["method"] == "shapley" else {}
    return trace(model, clients, x, **reference, **given).contributions


@torch.no_grad()
def nudge(model: nn.Module, states: dict, weights: dict, x: Inputs, y: Tensor, way: float = 0.01) -> Tensor:
    """[N, K] log-odds at W_g less those at W_g - way * p_k / (1 - p_k) (W_k - W_g), in float64."""
    model, x = copy.deepcopy(model).double(), x if isinstance(x, dict) else x.double()
    here = {name: w.clone() for name, w in model.state_dict().items()}
    values = [log_odds(logits_of(model, x).double(), y)]
    for who, state in states.items():
        step = way * weights[who] / (sum(weights.values()) - weights[who])
        model.load_state_dict({n: w - step * (state[n] - w) if w.is_floating_point() else w for n, w in here.items()})
        values.append(log_odds(logits_of(model, x).double(), y))
    return values[0][:, None] - torch.stack(values[1:], 1)


def judge(
    model: nn.Module, states: dict, weights: dict, incoming: dict, x: Inputs, y: Tensor, held: Tensor
) -> list[str]:
    """One line per kind of scores. held [K, classes]: examples of each class on each client."""
    start = time.perf_counter()
    v = coalitions.values(model, states, weights, incoming, x, y)
    played = time.perf_counter() - start
    exact = {"exact leave-one-out": coalitions.leave_one_out(v), "exact Shapley": coalitions.shapley(v)}
    nudged, p = nudge(model, states, weights, x, y), torch.tensor([float(weights[who]) for who in states])
    given = {"targets": y, "weights": weights}
    start = time.perf_counter()
    influence = trace(model, states, x, method="influence", **given).contributions
    traced = time.perf_counter() - start
    start = time.perf_counter()
    whole = trace(model, states, x, method="integrated", reference=incoming, **given)
    along = time.perf_counter() - start
    scores = {
        "paper (raw weights, decay 0.9)": trace(model, states, x, targets=y, layers="paper").contributions,
        "p_k * update, no decay": trace(model, states, x, reference=incoming, layer_decay=1, **given).contributions,
        "influence": influence,
        **exact,
        **{
            f"influence, weights shuffled {how}": with_shuffled_weights(
                model, states, incoming, x, how == "alike", method="influence", **given
            )
            for how in ("alike", "apart")
        },
    }
    lines = [
        f"played {len(v)} coalitions in {played:.0f} s, influence in {traced:.2f} s; integrated in {along:.1f} s, "
        f"its shares miss the change of y by {float(whole.completeness_error.mean()):.2%}"
    ]
    for name, s in scores.items():
        cells = [
            coalitions.client_lds(v, s).mean().item(),
            coalitions.client_lds(v, s, p=p).mean().item(),
            *(spearman(s.numpy(), truth.numpy()).mean() for truth in (*exact.values(), nudged)),
            (s.argmax(1) == held[:, y].argmax(0)).double().mean().item(),
        ]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return lines


def report(model: nn.Module, *given: Any) -> None:
    lines = judge(model, *given)
    print(lines[0])
    print("| scores | client-LDS | mean-LDS | rho loo | rho Shapley | rho nudge | top holder |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(lines[1:]), flush=True)


def judge_recorded(folder: Path, judged: int, inputs: int) -> None:
    run = Run.open(folder)
    examples, classes = run.server_examples(), len(run["class_names"])
    labels = {client.id: client.label_counts for client in run.clients}
    for record in run.rounds[-judged:]:
        model, states = run.model(record.number), {k: dict(v) for k, v in run.client_states(record.number).items()}
        weights = {client.id: client.weight for client in record.clients}
        right = (run.predictions(record.number) == examples.labels).nonzero()[:inputs, 0]
        chosen = examples[right]
        held = torch.tensor([[labels[who].get(label, 0) for label in range(classes)] for who in states])
        print(f"round {record.number}: accuracy {record.accuracy:.2f} on {len(examples)} examples of the server")
        if len(right):
            incoming = dict(run.global_state(record.number - 1))
            report(model, states, weights, incoming, chosen.inputs, chosen.labels, held)


def prepared(options: argparse.Namespace) -> tuple[Inputs, Tensor, list[Tensor], Inputs, Tensor, int]:
    """Training examples with labels, each client's rows of them, test examples with labels, and how many classes."""
    seed = options.seed
    frames = [examples_of(options.data, "train", options.examples, seed), examples_of(options.data, "test", 500, seed)]
    label = next(name for name in ("label", "fine_label", "topic") if name in frames[0])
    y, y_test = (torch.tensor(frame[label].to_numpy()) for frame in frames)
    x, x_test = texts(frames) if options.model == "bert" else [images(frame) for frame in frames]
    parts = [part for part in dirichlet(y.numpy(), options.clients, options.alpha, seed) if len(part) > 1]
    return x, y, parts, x_test, y_test, int(y.max()) + 1


def one_round(
    model: nn.Module, x: Inputs, y: Tensor, parts: list[Tensor], seed: int
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Train every client and load their mean; the state that the round began with, and the clients'."""
    incoming = copy.deepcopy(model.state_dict())
    states = {f"c{k}": trained(model, rows(x, part), y[part], seed + k) for k, part in enumerate(parts)}
    total = sum(map(len, parts))
    p = {f"c{k}": len(part) / total for k, part in enumerate(parts)}
    fused = {
        name: sum(p[who] * states[who][name] for who in states) if w.is_floating_point() else w
        for name, w in incoming.items()
    }
    model.load_state_dict(fused)
    model.eval()
    return incoming, states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder with train-*.parquet and test-*.parquet")
    source.add_argument("--run", type=Path, help="folder of a recorded run")
    parser.add_argument("--model", default="resnet18", help="bert, or any classifier of torchvision")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--alpha", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--judged", type=int, default=2, help="how many of the last rounds to judge")
    parser.add_argument("--examples", type=int, default=4000, help="training examples over all clients")
    parser.add_argument("--inputs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.run:
        judge_recorded(options.run, options.judged, options.inputs)
        return
    x, y, parts, x_test, y_test, classes = prepared(options)
    held = torch.stack([y[part].bincount(minlength=classes) for part in parts])
    weights = {f"c{k}": len(part) for k, part in enumerate(parts)}
    torch.manual_seed(options.seed)
    model = build(options.model, classes)
    for number in range(1, options.rounds + 1):
        incoming, states = one_round(model, x, y, parts, options.seed + 1000 * number)
        with torch.no_grad():
            predicted = torch.cat(
                [logits_of(model, rows(x_test, batch)) for batch in torch.arange(len(y_test)).split(100)]
            )
        right = (predicted.argmax(1) == y_test).nonzero()[:, 0]
        print(f"round {number}: accuracy {len(right) / len(y_test):.2f} on {len(y_test)} test examples", flush=True)
        if number > options.rounds - options.judged and len(right):
            chosen = right[: options.inputs]
            report(model, states, weights, incoming, rows(x_test, chosen), y_test[chosen], held)


if __name__ == "__main__":
    main()
