"""The small network, and inputs for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.provenance.small import Block


@pytest.fixture
def block():
    torch.manual_seed(0)
    model = Block().double()
    for norm in (model.norm1, model.norm2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return model


@pytest.fixture
def x():
    return torch.randn(5, 2, 9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
