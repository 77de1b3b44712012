"""Every route of a contraction, tile by tile and block by block, against the sum that it stands for."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.provenance import reference
from tracefl.provenance import Dense, Outer, Rows, contract, register, trace
from tracefl.provenance.layers.registry import _RULES

torch.set_num_threads(2)
small = st.integers(1, 5)


@pytest.fixture
def tiny_tiles(monkeypatch):
    monkeypatch.setattr(contract, "TILE", 256)
    monkeypatch.setattr(contract, "BLOCK", 512)


def random(*size):
    return torch.randn(size, dtype=torch.float64)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("route", ["through outputs", "through the gradient", "written out"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(N=small, S=small, R=st.integers(1, 30), C=small, K=small, centred=st.booleans())
def test_outer(route, N, S, R, C, K, centred):
    if route == "through the gradient":
        S = S + 60  # S K > S + K + 40 from K = 2 on
    left, right, theta = random(N, S, R), random(N, S, C), random(K, R, C)
    base = random(R, C) if centred else None
    slow = torch.einsum("nsr,nsc,krc->nk", left, right, theta - (base if centred else 0))
    G = Outer(left, right) if route != "written out" else Dense(left.mT @ right)
    found = contract.contract(G, list(theta), base, {})
    assert found.dtype == torch.float64
    assert (found - slow).abs().max() <= 1e-9 * (1 + slow.abs().max())


@pytest.mark.usefixtures("tiny_tiles")
def test_the_route_is_chosen_from_shapes(monkeypatch):
    """One position: through the clients' outputs. Many positions and clients: through the gradient."""
    taken = []
    monkeypatch.setattr(contract, "_by_outputs", lambda G, thetas, base, buffers: taken.append("outputs"))
    monkeypatch.setattr(
        contract, "_multiply", lambda G, thetas, base, buffers: taken.append("gradient") or torch.zeros(2, len(thetas))
    )
    for S, K in ((1, 100), (4, 10), (64, 10), (4, 100)):
        contract.contract(Outer(random(2, S, 3), random(2, S, 5)), [random(3, 5)] * K, None, {})
    assert taken == ["outputs", "outputs", "gradient", "gradient"]


@pytest.mark.usefixtures("tiny_tiles")
@settings(max_examples=30, deadline=None, derandomize=True)
@given(N=small, S=small, V=small, C=small, K=small, centred=st.booleans())
def test_rows(N, S, V, C, K, centred):
    index, values, theta = torch.randint(V, (N, S)), random(N, S, C), random(K, V, C)
    base = random(V, C) if centred else None
    looked_up = (theta - (base if centred else 0))[:, index]  # [K, N, S, C]
    slow = torch.einsum("nsc,knsc->nk", values, looked_up)
    found = contract.contract(Rows(index, values), list(theta), base, {})
    assert (found - slow).abs().max() <= 1e-9 * (1 + slow.abs().max())


def test_scalar_tensor():
    G = Dense(torch.tensor([2.0, 3.0]))
    found = contract.contract(G, [torch.tensor(5.0), torch.tensor(7.0)], torch.tensor(1.0), {})
    assert found.tolist() == [[8, 12], [12, 18]]


def test_memory_is_written_over():
    """The same buffers serve products of all sizes, and no answer is a view into them."""
    buffers = {}
    G, theta = Dense(random(2, 9, 4)), random(3, 9, 4)
    first = contract.contract(G, list(theta), None, buffers)
    expected = first.clone()
    contract.contract(Dense(random(2, 20, 4)), list(random(3, 20, 4)), None, buffers)
    assert torch.equal(first, expected)
    assert torch.equal(contract.contract(G, list(theta), None, buffers), expected)


class Lazy(Mapping):
    """Counts how often each tensor is read."""

    def __init__(self, state):
        self.state, self.reads = state, dict.fromkeys(state, 0)

    def __getitem__(self, name):
        self.reads[name] += 1
        return self.state[name].clone()

    def __iter__(self):
        return iter(self.state)

    def __len__(self):
        return len(self.state)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("scratch", [1 << 30, 1 << 14])
def test_lazy_states_are_read_once_for_a_pass(scratch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)).double()
    x = random(3, 2, 5, 5)
    states, weights = reference.perturbed(model, K=6)
    expected = trace(model, states, x, weights=weights)
    lazy = {who: Lazy(state) for who, state in states.items()}
    found = trace(model, lazy, x, weights=weights, scratch_bytes=scratch)
    assert (found.by_layer - expected.by_layer).abs().max() < 1e-12
    passes = 1 if scratch == 1 << 30 else 3
    assert {n for state in lazy.values() for n in state.reads.values()} <= set(range(1, passes + 1))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x * self.by


def test_a_rule_of_ones_own():
    torch.manual_seed(0)
    model, x = nn.Sequential(Scaled(), nn.Linear(4, 3)).double(), random(3, 4)
    states, _ = reference.perturbed(model)
    by_autograd = trace(model, states, x)
    asked = []

    @register(Scaled)
    def scaled(layer, x, g):
        asked.append(len(x))
        return {"by": Dense(x * g)}

    by_rule = trace(model, states, x)
    del _RULES[Scaled]
    assert asked == [3]  # the batch went through at once
    assert (by_rule.by_layer - by_autograd.by_layer).abs().max() < 1e-12
    assert by_rule.layers == by_autograd.layers == ["0", "1"]
