"""What the simulation costs beside the training itself, and what the whole original experiment costs here.

    python benchmarks/simulation.py round      [--data FOLDER] [--per-client 2048] [--rounds 2]
    python benchmarks/simulation.py experiment [--data FOLDER]

round: seconds of a simulated round over seconds of a plain PyTorch loop over the same clients' batches on the same
cores (all of them, torch's own threads), one after the other on the same machine; start-up of Ray apart.
experiment: the original's MNIST experiment (8,000 training images, resnet18 from scratch, 10 clients, 3 rounds, 30
traced inputs) as one command: CPU seconds of all its processes, of its training, of its tracing, and peak memory.
Beside it the CPU seconds of the bare training steps, measured in the same run on one thread.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as tracefl.main does

import psutil
import torch
from flwr.serverapp import Grid
from hydra import compose, initialize_config_module

from tracefl.checks import load
from tracefl.config import Config
from tracefl.data.prepare import prepare
from tracefl.data.prepared import PreparedData
from tracefl.federation.server_app import identify_nodes, serve
from tracefl.federation.simulation import simulate
from tracefl.models import build_model, exchanged_state, load_exchanged_state, model_spec
from tracefl.record import ClientInfo
from tracefl.runs import Run
from tracefl.training import train

State = dict[str, torch.Tensor]


def configuration(*overrides: str) -> Config:
    with initialize_config_module("tracefl.conf", version_base="1.3"):
        return load(compose("base", overrides=list(overrides)))


def plain_round(config: Config, data: PreparedData, state: State) -> tuple[float, float]:
    """Wall and CPU seconds of training every client and averaging, with nothing else."""
    model = build_model(model_spec(config, data))
    wall, cpu = time.perf_counter(), time.process_time()
    mean: State = {}
    total = sum(sum(counts.values()) for counts in data.label_counts.values())
    for client, counts in data.label_counts.items():
        load_exchanged_state(model, state)
        train(
            model,
            data.client(client),
            epochs=config.client.epochs,
            lr=config.client.lr,
            batch_size=config.batch_size,
            seed=int(client),
        )
        for name, value in exchanged_state(model).items():
            mean[name] = mean.get(name, 0) + value * (sum(counts.values()) / total)
    return time.perf_counter() - wall, time.process_time() - cpu


def simulated_rounds(config: Config, data: PreparedData, folder: Path) -> tuple[float, list[float]]:
    """Seconds until the first round starts (Ray, actors), then of every round."""
    torch.manual_seed(0)
    model, examples = build_model(model_spec(config, data)), data.server()
    initial = {name: value.clone() for name, value in exchanged_state(model).items()}
    clients = [ClientInfo(client, counts) for client, counts in data.label_counts.items()]
    run = Run.create(folder, initial=initial, clients=clients, seed=0)
    marks = [time.perf_counter()]

    def drive(grid: Grid) -> None:
        identify_nodes(grid, config.num_clients)  # answered once Ray and its actors are up
        marks.append(time.perf_counter())
        on_round = lambda _: marks.append(time.perf_counter())  # noqa: E731
        serve(grid, config, data, run, model, examples, on_round=on_round)

    simulate(config, drive)
    return marks[1] - marks[0], [later - earlier for earlier, later in pairwise(marks[1:])]


def benchmark_round(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(
            f"storage.dir={folder}", "dataset.name=mnist", f"dataset.path={arguments.data}",
            f"data_dist.max_per_client_data_size={arguments.per_client}", f"num_rounds={arguments.rounds}",
        )  # fmt: skip
        data = prepare(config)
        images = config.client.epochs * sum(sum(counts.values()) for counts in data.label_counts.values())
        state = exchanged_state(build_model(model_spec(config, data)))
        state = {name: value.clone() for name, value in state.items()}
        plain = [plain_round(config, data, state)]
        startup, rounds = simulated_rounds(config, data, Path(folder) / "run")
        plain.append(plain_round(config, data, state))
    loop = sum(wall for wall, _ in plain) / len(plain)
    ratio = sum(rounds) / len(rounds) / loop
    cores = psutil.cpu_count()
    print(f"{images} image steps a round, {cores} cores, torch {torch.__version__}")
    print(f"plain loop before and after: {', '.join(f'{wall:.1f} s ({cpu:.0f} s CPU)' for wall, cpu in plain)}")
    print(f"simulated rounds: {', '.join(f'{seconds:.1f} s' for seconds in rounds)}; start-up of Ray {startup:.1f} s")
    print(f"a simulated round costs {ratio:.2f} times the plain loop")


def benchmark_experiment(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"storage.dir={folder}", "dataset.name=mnist", f"dataset.path={arguments.data}", "num_rounds=3",
            "data_dist.max_per_client_data_size=800", "provenance.inputs_per_label=1",
        ]  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "tracefl.main", *overrides], stdout=subprocess.PIPE, text=True
        )
        cpu, peak = watch(process)
        output = process.stdout.read() if process.stdout else ""
        config = configuration(*overrides)
        data = prepare(config)
        torch.set_num_threads(1)
        state = exchanged_state(build_model(model_spec(config, data)))
        _, bare = plain_round(config, data, {name: value.clone() for name, value in state.items()})
    traced = re.search(r"traced (\d+) inputs in ([\d.]+) s \(([\d.]+) s of CPU\)", output)
    if not traced:
        sys.exit(output[-2000:])
    print(f"whole experiment: {cpu:.0f} s of CPU in all processes, peak memory {peak / 2**30:.1f} GiB")
    print(f"tracing {traced[1]} inputs with both methods: {traced[3]} s of CPU")
    print(f"bare training steps of 3 rounds on one thread: {3 * bare:.0f} s of CPU")
    print(f"whole over bare training: {cpu / (3 * bare):.2f}")


def watch(process: subprocess.Popen) -> tuple[float, float]:
    """CPU seconds and peak of the summed resident memory over a process, its children and Ray's workers."""
    root, seen, peak, before = psutil.Process(process.pid), {}, 0.0, set(psutil.pids())
    while process.poll() is None:
        memory = 0.0
        for each in psutil.process_iter(["pid", "cmdline"]):
            ray = each.pid not in before and any("ray" in part for part in each.info["cmdline"] or [])
            try:
                if ray or each.pid == root.pid or root in each.parents():
                    times = each.cpu_times()
                    seen[each.pid] = times.user + times.system
                    memory += each.memory_full_info().uss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # it ended between listing and reading
        peak = max(peak, memory)
        time.sleep(2)  # listing every process costs CPU of its own
    return sum(seen.values()), peak


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["round", "experiment"])
    parser.add_argument("--data", default="data/mnist")
    parser.add_argument("--per-client", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=2)
    chosen = parser.parse_args()
    {"round": benchmark_round, "experiment": benchmark_experiment}[chosen.what](chosen)
