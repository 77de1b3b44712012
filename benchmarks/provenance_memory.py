"""Clients stream: memory and time of trace over K paths of safetensors files.

    python benchmarks/provenance_memory.py --model resnet18 --clients 10 100 1000 --inputs 20

Every K runs in a process of its own. "above the model" is the growth of the process's peak memory (VmHWM) over what
it held before trace: model, inputs, libraries.
Paths repeat beyond `--files` distinct files; each is opened for itself.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision

from tracefl import trace
from tracefl.files import write_state


def peak_gib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def measure(folder: Path, model_name: str, K: int, N: int, size: int, method: str, scratch: int) -> str:
    torch.manual_seed(0)
    model = torchvision.models.get_model(model_name, num_classes=10).eval()
    x = torch.randn(N, 3, size, size)
    files = sorted(folder.glob("*.safetensors"))
    clients = {f"c{k}": files[k % len(files)] for k in range(K)}
    weights = dict.fromkeys(clients, 1.0)
    with torch.no_grad():
        model(x[:1])
    before, start = peak_gib(), time.perf_counter()
    trace(model, clients, x, method=method, weights=weights, scratch_bytes=scratch)
    took = time.perf_counter() - start
    nbytes = sum(w.nbytes for w in model.state_dict().values())
    cells = [model_name, f"{nbytes / 2**20:.0f}", str(size), str(K), str(N), f"{took:.1f}", f"{took / K * 1000:.1f}"]
    return "| " + " | ".join([*cells, f"{peak_gib() - before:.2f}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--clients", nargs="+", type=int, default=[10, 100, 1000])
    parser.add_argument("--inputs", nargs="+", type=int, default=[20])
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--files", type=int, default=50)
    parser.add_argument("--method", default="influence")
    parser.add_argument("--scratch-gib", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        K, N, scratch = options.clients[0], options.inputs[0], int(options.scratch_gib * 2**30)
        print(measure(options.folder, options.model, K, N, options.size, options.method, scratch), flush=True)
        return
    columns = ["model", "MiB a state", "pixels", "K", "N", "seconds", "ms a client", "GiB above the model"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        state = torchvision.models.get_model(options.model, num_classes=10).state_dict()
        for i in range(min(options.files, max(options.clients))):
            moved = {n: w + 0.01 * torch.randn_like(w) for n, w in state.items() if w.is_floating_point()}
            write_state(Path(folder, f"{i:04}.safetensors"), moved)
        for K in options.clients:
            for N in options.inputs:
                one = ["--folder", folder, "--model", options.model, "--clients", str(K), "--inputs", str(N)]
                one += ["--size", str(options.size), "--method", options.method]
                one += ["--scratch-gib", str(options.scratch_gib)]
                subprocess.run([sys.executable, __file__, *one], check=True)


if __name__ == "__main__":
    main()
