"""The method on one page gives what the engine gives."""

import pytest
import torch
from torch import nn

from tests.provenance import reference
from tests.provenance.test_models import MODELS, doubled
from tracefl.provenance import trace
from tracefl.provenance.plain import plain


@pytest.mark.parametrize("name", ["bert", "openai_gpt", "vit", "bottlenecks", "dense_blocks"])
def test_plain_and_engine_agree(name):
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model, x = make().double(), doubled(inputs())
    states, weights = reference.perturbed(model)
    neuron = trace(model, states, x, layer_decay=1.0)
    assert (plain(model, states, x) - neuron.contributions).abs().max() <= 1e-9 * neuron.by_layer.abs().sum(0).max()
    influence = trace(model, states, x, weights=weights, method="influence")
    found = plain(model, states, x, weights)
    assert (found - influence.contributions).abs().max() <= 1e-9 * influence.by_layer.abs().sum(0).max()


def test_padding_counts():
    """The output depends on the row of the padding token, although training leaves it alone."""
    torch.manual_seed(0)
    layers = nn.Embedding(9, 4, padding_idx=0), nn.Flatten(), nn.Linear(12, 3)
    model, x = nn.Sequential(*layers).double(), torch.tensor([[1, 2, 0], [3, 0, 0]])
    states, weights = reference.perturbed(model)
    found, expected = plain(model, states, x, weights), trace(model, states, x, weights=weights, method="influence")
    assert (found - expected.contributions).abs().max() <= 1e-9 * expected.by_layer.abs().max()
