"""How fast is trace? Against a floor that no method can beat by much, and against the slow reference.

    python benchmarks/provenance_speed.py --models resnet18 densenet121 gpt --clients 10 50 100

floor      one forward and backward of the same batch + the larger of (reading and summing every client's
           weights once) and (2 N K P operations at the measured rate of a matrix product). Embedding tables
           are left out of the floor's P and of its reading: only the rows looked up can matter.
reference  a backward pass per input, then every client's layer run forward on the global model's input to
           it; timed on `--reference-inputs` inputs and scaled to N, being linear in N.
All pieces are timed in turn, `--repeats` times; medians. Client states repeat beyond `--states-gib`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tracefl import trace
from tracefl.classifier import logits_of


def resnet18() -> tuple[nn.Module, Callable[[int], object]]:
    from torchvision.models import resnet18

    return resnet18(num_classes=10), lambda n: torch.randn(n, 3, 32, 32)


def densenet121() -> tuple[nn.Module, Callable[[int], object]]:
    from torchvision.models import densenet121

    return densenet121(num_classes=10), lambda n: torch.randn(n, 3, 32, 32)


def gpt() -> tuple[nn.Module, Callable[[int], object]]:
    from transformers import OpenAIGPTConfig, OpenAIGPTForSequenceClassification

    model = OpenAIGPTForSequenceClassification(OpenAIGPTConfig(num_labels=14, pad_token_id=0))
    return model, lambda n: {"input_ids": torch.randint(1, 40000, (n, 128))}


MODELS = {"resnet18": resnet18, "densenet121": densenet121, "gpt": gpt}


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds; on one thread CPU seconds, which other programs on the machine lengthen less."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    return clock() - start


def one_pass(model: nn.Module, batch: object) -> None:
    """Forward and backward of a batch as in training, parameter gradients included."""
    model.zero_grad(set_to_none=True)
    logits_of(model, batch).max(1).values.sum().backward()


def matrix_rate() -> float:
    """Multiply-adds a second of a large matrix product, times two."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return 2 * 2048**3 / min(seconds(lambda: a @ b) for _ in range(3))


def slow_reference(model: nn.Module, states: dict[str, dict[str, Tensor]], batches: list[object]) -> None:
    names = {m: name for name, m in model.named_modules() if list(m.parameters(recurse=False))}
    for batch in batches:
        calls: list[tuple[nn.Module, tuple[Tensor, ...], Tensor]] = []

        def record(module: nn.Module, args: tuple[Tensor, ...], z: Tensor, calls: list = calls) -> Tensor:
            z.retain_grad()
            calls.append((module, args, z))
            return z.clone()

        handles = [module.register_forward_hook(record) for module in names]
        one_pass(model, batch)
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for module, args, z in calls:
                prefix = f"{names[module]}." if names[module] else ""
                own = [name for name, _ in module.named_parameters(recurse=False)]
                for state in states.values():
                    client = {name: state[prefix + name] for name in own}
                    (functional_call(module, client, args) * z.grad).sum()


def compare(name: str, K: int, N: int, method: str, options: argparse.Namespace) -> list[str]:
    torch.manual_seed(0)
    model, batch_of = MODELS[name]()
    model.eval()
    tables = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    weights = {n: w for n, w in model.state_dict().items() if w.is_floating_point()}
    nbytes = sum(w.nbytes for w in weights.values())
    distinct = max(1, min(K, int(options.states_gib * 2**30 / nbytes)))
    pool = [{n: w + 0.01 * torch.randn_like(w) for n, w in weights.items()} for _ in range(distinct)]
    states = {f"c{k}": pool[k % distinct] for k in range(K)}
    shares = None if method == "neuron" else dict.fromkeys(states, 1.0)
    batch, few = batch_of(N), [batch_of(1) for _ in range(options.reference_inputs)]
    P = sum(w.numel() for n, w in weights.items() if n not in tables)

    def read() -> None:
        for state in states.values():
            for n, w in state.items():
                if n not in tables:
                    w.sum()

    def ours() -> None:
        trace(model, states, batch, method=method, weights=shares, scratch_bytes=int(options.scratch_gib * 2**30))

    one_pass(model, batch)
    trace(model, dict([next(iter(states.items()))]), batch_of(1))
    timed: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        for what, work in (("pass", lambda: one_pass(model, batch)), ("read", read), ("ours", ours)):
            timed.setdefault(what, []).append(seconds(work))
        timed.setdefault("product", []).append(2 * N * K * P / matrix_rate())
    t = {what: statistics.median(values) for what, values in timed.items()}
    floor = t["pass"] + max(t["read"], t["product"])
    cells = [
        name,
        str(K),
        str(N),
        f"{t['pass']:.3f}",
        f"{t['read']:.3f}",
        f"{t['product']:.3f}",
        f"{floor:.3f}",
    ]
    cells += [f"{t['ours']:.3f}", f"**{t['ours'] / floor:.2f}**"]
    if options.reference_inputs:
        slow = seconds(lambda: slow_reference(model, states, few)) * N / len(few)
        cells += [f"{slow:.1f}", f"**{slow / t['ours']:.1f}**"]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "densenet121"], choices=list(MODELS))
    parser.add_argument("--clients", nargs="+", type=int, default=[10, 50, 100])
    parser.add_argument("--inputs", nargs="+", type=int, default=[10, 20, 100])
    parser.add_argument("--method", default="neuron", choices=["neuron", "influence"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, torch.get_num_threads()])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reference-inputs", type=int, default=1, help="0 leaves the slow reference out")
    parser.add_argument("--states-gib", type=float, default=2.0, help="memory for distinct client states")
    parser.add_argument("--scratch-gib", type=float, default=1.0, help="scratch_bytes of trace")
    options = parser.parse_args()
    columns = [
        "threads",
        "model",
        "K",
        "N",
        "pass s",
        "read s",
        "product s",
        "floor s",
        "ours s",
        "ours / floor",
    ]
    columns += ["reference s", "reference / ours"] if options.reference_inputs else []
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name in options.models:
            for K in options.clients:
                for N in options.inputs:
                    cells = compare(name, K, N, options.method, options)
                    print("| " + " | ".join([str(threads), *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
