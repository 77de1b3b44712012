"""What a GPU brings: the same answers on the CPU and on the GPU of one machine, how far apart and how fast.

    python benchmarks/gpu.py --models resnet18 densenet121 gpt --clients 10 --inputs 20

Every method of `trace`, and `audit`; client states lie in main memory and are moved as they are needed. Times are
medians over `--repeats`, after one run that is not counted. The last column is the largest difference of a
contribution, over the largest contribution.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from provenance_speed import MODELS
from torch import Tensor

from tracefl import audit, trace

METHODS = ["neuron", "influence", "integrated", "shapley"]


def timed(work: Callable[[], Tensor], repeats: int) -> tuple[Tensor, float]:
    """What `work` gives, and the median of its seconds."""
    answer, seconds = work(), []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        answer = work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return answer, statistics.median(seconds)


def compare(name: str, K: int, N: int, repeats: int) -> None:
    torch.manual_seed(0)
    model, batch_of = MODELS[name]()
    model.eval()
    weights = {n: w for n, w in model.state_dict().items() if w.is_floating_point()}
    states = {f"c{k}": {n: w + 0.01 * torch.rand_like(w) for n, w in weights.items()} for k in range(K)}
    start, shares, batch = {n: w.clone() for n, w in weights.items()}, dict.fromkeys(states, 1.0), batch_of(N)
    labels = torch.arange(N) % 10

    def by(method: str) -> Tensor:
        own = {
            "neuron": {},
            "influence": {"weights": shares},
            "integrated": {"weights": shares, "reference": start, "steps": 8},
        }
        own["shapley"] = {"weights": shares, "reference": start, "evaluations": 2 * K + 2}
        if method == "audit":
            return audit(model, states, batch, labels, weights=shares, reference=start, aims=True).values[None]
        return trace(model, states, batch, method=method, **own[method]).contributions

    for method in [*METHODS, "audit"]:
        expected, slow = timed(lambda method=method: by(method), repeats)
        model.cuda()
        found, fast = timed(lambda method=method: by(method), repeats)
        model.cpu()
        apart = float((found - expected).abs().max() / expected.abs().max())
        cells = [name, str(K), str(N), method, f"{slow:.3f}", f"{fast:.3f}", f"**{slow / fast:.1f}**", f"{apart:.1e}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "densenet121"], choices=list(MODELS))
    parser.add_argument("--clients", nargs="+", type=int, default=[10])
    parser.add_argument("--inputs", nargs="+", type=int, default=[20])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    print(f"{torch.cuda.get_device_name()}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    columns = ["model", "K", "N", "what", "CPU s", "GPU s", "CPU / GPU", "apart"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name in options.models:
        for K in options.clients:
            for N in options.inputs:
                compare(name, K, N, options.repeats)


if __name__ == "__main__":
    main()
