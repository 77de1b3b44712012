"""A small network that does much, and how near numbers must be."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """Modules in another order than they run, one used twice, one never, in-place activations, a residual."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.unused = nn.Linear(3, 3)
        self.norm2 = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(6)
        self.stem = nn.Conv2d(2, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.relu(self.norm1(self.stem(x)))
        h = self.relu(self.norm2(self.conv(h)) + h)
        h = self.relu(self.conv(h))
        return self.head(h.mean((2, 3)))


def close(a, b, tolerance=1e-9):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-30)


class Reversed(torch.autograd.Function):
    """The identity, whose gradient is said to be another."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g
