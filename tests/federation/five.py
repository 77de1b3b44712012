"""Five clients, of whom b lies: how a run with its lie ends."""

import re

import pytest
import torch
from torch.nn import functional as F

from tests.federation.lying import NET, LyingGrid
from tests.federation.own import arrays
from tests.federation.recording import record
from tracefl import Run
from tracefl.errors import TraceFLError
from tracefl.training import Evaluation

FIVE = {11: "a", 12: "b", 13: "c", 14: "d", 15: "e"}
HONEST = {node: client for node, client in FIVE.items() if client != "b"}
MODES = pytest.mark.parametrize("accept", [False, True], ids=["strict", "accepting"])
STRICT_ALONE = pytest.mark.parametrize(  # where there are hundreds of lies
    "accept", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["strict", "accepting"]
)


def evaluate(state) -> Evaluation:
    """Three layers of one matrix, so that large weights overflow."""
    w, var = state["w"], state["bn.running_var"]
    logits = (w @ w.T @ w @ torch.eye(3)).T / (var + 1e-5).sqrt()
    labels = torch.tensor([0, 1, 1])
    loss = F.cross_entropy(logits, labels).item()
    return Evaluation(loss, (logits.argmax(1) == labels).double().mean().item(), logits.argmax(1))


def run_with(folder, lie, *, nodes=FIVE, rounds=1, grid=None, **changes):
    grid = grid or LyingGrid(nodes, lie)
    return record(folder, grid, rounds=rounds, initial=arrays(NET), **{"evaluate": evaluate} | changes)


def check_named(folder, lie, words, accept, without, **changes) -> None:
    """Strict: one sentence names round and client. Accepting: the round is as if the client had not been asked."""
    if not accept:
        with pytest.raises(TraceFLError, match=rf"(?s)^round 1, client b: .*(?:{words})") as raised:
            run_with(folder, lie, **changes)
        assert str(raised.value).isprintable()
        assert not Run.open(folder).rounds
        return
    run_with(folder, lie, accept_failures=True, **changes)
    kept = Run.open(folder).round(1)
    assert list(kept.failures) == ["b"]
    assert re.search(words, kept.failures["b"], re.DOTALL)
    assert not (folder / "rounds/0001/clients/b.safetensors").exists()
    assert (kept.clients, kept.global_sha256) == (without.clients, without.global_sha256)
