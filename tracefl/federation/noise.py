"""The Gaussian noise of differential privacy: a function of (seed, round, tensor), so that it can be drawn again.

The ledger needs that: the noise's own share in a prediction is < noise, dy/dW >, and nothing has to be stored for it.
"""

import zlib

import numpy as np
import torch
from torch import Tensor

NOISE_STREAM = 0xD9  # keeps these draws apart from those of participants and clients


def gaussian_noise(name: str, like: Tensor, std: float, seed: int, server_round: int) -> Tensor:
    """N(0, std^2) in the shape and type of `like`, the parameter `name`."""
    generator = np.random.default_rng([seed, server_round, zlib.crc32(name.encode()), NOISE_STREAM])
    return torch.from_numpy(generator.standard_normal(like.shape, dtype=np.float32) * np.float32(std)).to(like.dtype)


def noise_std(noise_multiplier: float, clipping_norm: float, participants: int) -> float:
    """Standard deviation of the noise on the mean of `participants` updates, each clipped to `clipping_norm`."""
    return noise_multiplier * clipping_norm / participants
