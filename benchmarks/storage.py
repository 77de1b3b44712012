"""What the storage settings save, and what rounding does to the answers, on a recorded run.

    python benchmarks/storage.py RUN_FOLDER [--inputs 20]

For every dtype: bytes of a round's clients' states with storage.keep=all and =deltas over those as they were sent, and
how the answers of the last round change: the median of |difference| / sum_k |contribution_k| over inputs and clients,
the mean Spearman correlation of the clients' order, and how often the first client is the same. Beside them, the length
of the rounding over that of the update.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from tracefl import trace
from tracefl.files import write_state
from tracefl.runs import Run
from tracefl.states import State
from tracefl.storage import TYPES, PackedFile, Storing, packed


def stored(run: Run, number: int, storing: Storing, folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], int]:
    """Every client's state of a round as it comes back, and the bytes of their files."""
    base, states, size = run.global_state(number - 1), {}, 0
    for client, state in run.client_states(number).items():
        file = folder / "state.safetensors"
        write_state(file, *packed(dict(state), base, storing))
        states[client], size = dict(PackedFile(file, base)), size + file.stat().st_size
    return states, size


def rounding(states: dict[str, State], exact: dict[str, State], base: State) -> float:
    """Median over clients of |rounded - sent| / |sent - received|, over all numbers of a model."""
    shares = []
    for client, state in exact.items():
        names = [name for name, value in state.items() if value.is_floating_point()]
        off, moved = (
            sum(float((state[name].double() - other[name].double()).square().sum()) for name in names)
            for other in (states[client], base)
        )
        shares.append((off / moved) ** 0.5)
    return float(np.median(shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--inputs", type=int, default=20)
    arguments = parser.parse_args()
    run = Run.open(arguments.run)
    number = len(run.rounds)
    weights = {client.id: client.weight for client in run.round(number).clients}
    model, examples = run.model(number), run.server_examples()[torch.arange(arguments.inputs)]
    asked = {"neuron": {"layers": "paper"}, "influence": {"weights": weights}}
    exact: dict[str, State] = {client: dict(state) for client, state in run.client_states(number).items()}
    sent = sum((run.round(number).folder / client.file).stat().st_size for client in run.round(number).clients)

    def answers(states: dict[str, State]) -> dict[str, np.ndarray]:
        given = {"targets": run.predictions(number)[: arguments.inputs]}
        return {
            method: trace(model, states, examples.inputs, method=method, **given, **of).contributions.double().numpy()
            for method, of in asked.items()
        }

    expected = answers(exact)
    for dtype in TYPES:
        with tempfile.TemporaryDirectory() as folder:
            states, size = stored(run, number, Storing("all", dtype), Path(folder))
            as_deltas, small = stored(run, number, Storing("deltas", dtype), Path(folder))
        same = all(torch.equal(states[who][name], as_deltas[who][name]) for who in states for name in states[who])
        line = f"{dtype}: all {size / sent:.3f}, deltas {small / sent:.3f} of {sent} bytes, the same values: {same}"
        print(f"{line}; rounding over update {rounding(states, exact, run.global_state(number - 1)):.2g}")
        for method, found in answers(states).items():
            right = expected[method]
            off = np.abs(found - right) / np.abs(right).sum(1, keepdims=True)
            order = np.nanmean([spearmanr(a, b).statistic for a, b in zip(found, right, strict=True)])
            first = (found.argmax(1) == right.argmax(1)).mean()
            told = f"median difference {np.median(off):.2g}, largest {off.max():.2g}"
            print(f"  {method}: {told}, Spearman {order:.4f}, same first client {100 * first:.0f} %")


if __name__ == "__main__":
    main()
