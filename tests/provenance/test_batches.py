"""Models in which inputs share something, or the batch comes second, against the slow reference."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.provenance import reference
from tracefl.errors import TraceFLError
from tracefl.provenance import trace


class Positions(nn.Module):
    """Position embeddings [1, T, D], which the model itself repeats for the batch, or adds as they are."""

    def __init__(self, repeats):
        super().__init__()
        self.embed, self.position, self.head = nn.Embedding(9, 4), nn.Embedding(5, 4), nn.Linear(20, 3)
        self.repeats = repeats

    def forward(self, tokens):
        h = self.position(torch.arange(5)[None])
        if self.repeats:
            h = h.repeat(len(tokens), 1, 1)
        return self.head((self.embed(tokens) + h).tanh().flatten(1))


@pytest.mark.parametrize("N", [3, 5])  # 5 is the number of positions too
@pytest.mark.parametrize("repeats", [True, False])
def test_what_all_inputs_share(repeats, N):
    torch.manual_seed(0)
    model, x = Positions(repeats).double(), torch.randint(0, 9, (N, 5))
    states, weights = reference.perturbed(model)
    found = trace(model, states, x, method="influence", weights=weights)
    slow = [reference.influence(model, states, weights, x[n : n + 1], found.targets[n]) for n in range(N)]
    assert (found.contributions - torch.stack(slow)).abs().max() <= 1e-9 * found.by_layer.abs().max()


@pytest.mark.parametrize("N", [3, 6])
def test_the_batch_may_come_second(N):
    """6 inputs of 6 positions: the shapes alone do not say which axis is which."""

    class Second(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, x):
            h = self.norm(self.first(x.transpose(0, 1)).cumsum(0).tanh())
            return self.head(h.mean(0))

    torch.manual_seed(0)
    model, x = Second().double(), torch.randn(N, 6, 4).double()
    states, weights = reference.perturbed(model)
    found = trace(model, states, x, method="influence", weights=weights)
    slow = [reference.influence(model, states, weights, x[n : n + 1], found.targets[n]) for n in range(N)]
    assert (found.contributions - torch.stack(slow)).abs().max() <= 1e-9 * found.by_layer.abs().max()


def test_windows_of_one_input():
    """A layer that sees an input cut in pieces: all of its rows are the input's own, and no batch goes through."""

    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, x):
            h = self.norm(self.first(x.reshape(-1, 3, 4)).tanh())
            return self.head(h.reshape(len(x), -1, 4).mean(1))

    torch.manual_seed(0)
    model, x = Windows().double(), torch.randn(4, 6, 4).double()
    states, weights = reference.perturbed(model)
    found = trace(model, states, x, method="influence", weights=weights)
    slow = [reference.influence(model, states, weights, x[n : n + 1], found.targets[n]) for n in range(4)]
    assert (found.contributions - torch.stack(slow)).abs().max() <= 1e-9 * found.by_layer.abs().max()


class Picked(nn.Module):
    """Position embeddings [1, T, D] of which the model picks, or which it reduces over, the first axis."""

    def __init__(self, pick, norm):
        super().__init__()
        self.embed, self.position, self.head = nn.Embedding(9, 4), nn.Embedding(5, 4), nn.Linear(20, 3)
        self.pick, self.norm = pick, nn.LayerNorm(4) if norm else nn.Identity()

    def forward(self, tokens):
        h = self.pick(self.norm(self.position(torch.arange(5)[None])))
        return self.head((self.embed(tokens) + h).tanh().flatten(1))


PICKS = [
    lambda p: p[0],
    lambda p: p[-1],
    lambda p: p[:1],
    lambda p: p.mean(0),
    lambda p: p.mean(0, keepdim=True),
    lambda p: p.amax(0),
    lambda p: p.reshape(-1, 4)[torch.arange(5)],
    lambda p: p.expand(1, -1, -1) if len(p) == 1 else p,
]


@pytest.mark.parametrize("scratch", [1 << 30, 3 << 10])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.slow
def test_what_all_inputs_share_may_be_picked_from(pick, norm, scratch):
    torch.manual_seed(0)
    model, x = Picked(pick, norm).double(), torch.randint(0, 9, (4, 5))
    states, weights = reference.perturbed(model)
    options = {"method": "influence", "weights": weights, "scratch_bytes": scratch}
    found = trace(model, states, x, **options)
    slow = [reference.influence(model, states, weights, x[n : n + 1], found.targets[n]) for n in range(4)]
    assert (found.contributions - torch.stack(slow)).abs().max() <= 1e-9 * found.by_layer.abs().max()
    again = trace(model, states, x, **options | {"reference": states["c0"], "method": "integrated", "steps": 2})
    alone = [trace(model, states, x[n : n + 1], **options | {"reference": states["c0"], "method": "integrated",
             "steps": 2, "targets": again.targets[n : n + 1]}).contributions for n in range(4)]  # fmt: skip
    assert (again.contributions - torch.cat(alone)).abs().max() <= 1e-9 * again.by_layer.abs().max()


def test_logits_that_have_no_row_for_each_input():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.RNN(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0][-1])  # time first: 6 steps of 2 inputs

    model = Last()
    with pytest.raises(TraceFLError, match=r"logits \[1, classes\], a row for each input, .* got \(2, 3\)"):
        trace(model, {"a": model.state_dict()}, torch.randn(6, 2, 4))
