"""What a large federation costs, and what recording does: time and memory of a round.

    python benchmarks/scale.py [--data FOLDER] [--clients 10 1000] [--rounds 4] [--examples 50] [--ray] [key=value ...]

Rounds of resnet18 on MNIST with 10 participants, which train on the same number of examples whether the federation has
10 clients or 1,000. Every federation is a process of its own, in the order a, b, b, a; it trains in that process, one
client after the other on one thread, or on Ray (--ray). Of every round are measured its wall and CPU seconds, the peak
of the process's memory, and the recorder's own seconds: how long the round waits for it, which is what it does beside
the strategy's own methods, the clients' training and the evaluation of the model. "writing" is the CPU time of its
thread, which writes while others train. Further words are settings, such as storage.keep=deltas.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.simulation import configuration
from tests.federation import local
from tracefl.data.prepare import prepare
from tracefl.federation import grid, rounds, server_app
from tracefl.federation.server_app import serve
from tracefl.federation.simulation import simulate
from tracefl.federation.start import initial_state, open_or_create
from tracefl.models import build_model, model_spec
from tracefl.runs import Run

PARTICIPANTS = 10


class OneByOne(local.LocalGrid):
    """Answers come one by one, as those of simulated clients do."""

    def pull_messages(self, message_ids: Any) -> list[Any]:
        return [self.answer(self.mailbox.pop(0))] if self.mailbox else []


class Clock:
    """Seconds by what they are spent on; what is measured inside of another counts for itself only."""

    def __init__(self) -> None:
        self.seconds, self.calls = dict[str, float](), list[list[Any]]()

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        started, inside = time.perf_counter(), [0.0]
        self.calls.append(inside)
        try:
            yield
        finally:
            took = time.perf_counter() - started
            self.calls.pop()
            self.seconds[what] = self.seconds.get(what, 0.0) + took - inside[0]
            if self.calls:
                self.calls[-1][0] += took

    def watch(self, holder: Any, name: str, what: str) -> None:
        """Measure a function or a method from now on."""
        function: Callable[..., Any] = getattr(holder, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.measure(what):
                return function(*args, **kwargs)

        setattr(holder, name, measured)


def watched_clock() -> Clock:
    """A clock of the recorder, and of what happens inside of its methods but is not its own."""
    clock = Clock()
    for name in ("configure_train", "aggregate_train", "_receive", "_shown"):
        clock.watch(rounds.Rounds, name, "recorder")
    clock.watch(server_app, "evaluate", "evaluation")
    clock.watch(OneByOne, "pull_messages", "clients")
    local.LocalGrid = OneByOne  # type: ignore[misc]
    record = Run.record_client

    def recorded(*args: Any, **kwargs: Any) -> Any:
        started = time.thread_time()
        try:
            return record(*args, **kwargs)
        finally:
            clock.seconds["writing"] = clock.seconds.get("writing", 0.0) + time.thread_time() - started

    Run.record_client = recorded  # type: ignore[method-assign]
    start = rounds.Rounds.__init__

    def started(self: rounds.Rounds, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        for name in self._own:
            own = self._own[name]

            def measured(*args: Any, own: Any = own) -> Any:
                with clock.measure("strategy"):
                    return own(*args)

            self._own[name] = measured

    rounds.Rounds.__init__ = started  # type: ignore[method-assign]
    return clock


def one_federation(clients: int, arguments: argparse.Namespace) -> None:
    """Train, and print what every round took as a line of JSON."""
    clock, found = watched_clock(), []
    grid.PULL_INTERVAL_S = grid.PULL_INTERVAL_S if arguments.ray else 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(
            f"storage.dir={folder}", "dataset.name=mnist", f"dataset.path={arguments.data}",
            f"num_clients={clients}", f"clients_per_round={PARTICIPANTS}", f"num_rounds={arguments.rounds}",
            f"data_dist.max_per_client_data_size={arguments.examples}", "data_dist.min_examples_per_class=1",
            "dirichlet_alpha=100", "data_dist.max_server_data_size=500", *arguments.settings,
        )  # fmt: skip
        data = prepare(config)
        path = Path(folder) / "run"
        run = open_or_create(config, data, path, initial_state(config, data, path))
        model, examples = build_model(model_spec(config, data)), data.server()
        mark = [time.perf_counter(), time.process_time()]

        def on_round(run: Run) -> None:
            wall, cpu = time.perf_counter(), time.process_time()
            took = dict(clock.seconds)
            clock.seconds.clear()
            trained = sum(client.num_examples for client in run.rounds[-1].clients)
            found.append({"wall": wall - mark[0], "cpu": cpu - mark[1], "memory": peak(), "examples": trained, **took})
            mark[:] = [time.perf_counter(), time.process_time()]

        (simulate if arguments.ray else local.simulate)(
            config, lambda nodes: serve(nodes, config, data, run, model, examples, on_round=on_round)
        )
        size = (path / "run.json").stat().st_size
        print(json.dumps({"clients": clients, "rounds": found, "disk": run.disk(), "run.json": size}))


def peak() -> float:
    """Peak memory of this process since the last call, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")]
    Path("/proc/self/clear_refs").write_text("5")
    return found


def compare(arguments: argparse.Namespace) -> None:
    small, large = arguments.clients
    measured: dict[int, list[dict[str, float]]] = {small: [], large: []}
    for clients in (small, large, large, small):
        words = [*sys.argv[1:], "--only", str(clients)]
        done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        later = found["rounds"][1:]  # the first one has the start in it
        measured[clients] += later
        for each in later:
            print(f"{clients} clients:", ", ".join(f"{name} {value:.2f}" for name, value in each.items()))
        print(f"{clients} clients: disk by round {found['disk']}, run.json {found['run.json']} bytes", flush=True)
    middle = {clients: {name: median(each[name] for each in of) for name in of[0]} for clients, of in measured.items()}
    for name in ("wall", "cpu", "memory", "recorder"):
        ratio = middle[large][name] / middle[small][name]
        values = " and ".join(f"{middle[clients][name]:.2f}" for clients in (small, large))
        print(f"{name}: median {values}, {ratio:.2f} times")
    for clients in middle:
        shares = [each["recorder"] / each["wall"] for each in measured[clients]]
        print(f"{clients} clients: recorder's share of a round {100 * median(shares):.1f} % (median of {len(shares)})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/mnist")
    parser.add_argument("--clients", type=int, nargs=2, default=[10, 1000])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--examples", type=int, default=50)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*")
    chosen = parser.parse_intermixed_args()
    one_federation(chosen.only, chosen) if chosen.only else compare(chosen)
