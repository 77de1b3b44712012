"""The Gaussian noise of differential privacy, a function of (seed, round, tensor).

It can be drawn again, so the contribution of the noise to a prediction, < noise, dy/dW >, can be
computed without storing the noise.
"""

import zlib

import numpy as np
import torch
from torch import Tensor

NOISE_STREAM = 0xD9  # keeps these draws apart from those of participants and clients


def gaussian_noise(name: str, like: Tensor, std: float, seed: int, server_round: int) -> Tensor:
    """Draws from N(0, std^2) in the shape and type of `like`, the parameter `name`.

    Example:
        >>> like = torch.zeros(3)
        >>> first, again = (gaussian_noise("w", like, 0.1, seed=0, server_round=1) for _ in "ab")
        >>> torch.equal(first, again)
        True
    """
    generator = np.random.default_rng([seed, server_round, zlib.crc32(name.encode()), NOISE_STREAM])
    return torch.from_numpy(generator.standard_normal(like.shape, dtype=np.float32) * np.float32(std)).to(like.dtype)


def noise_std(noise_multiplier: float, clipping_norm: float, participants: int) -> float:
    """Standard deviation of the noise on the mean of `participants` clipped updates.

    Example:
        >>> noise_std(0.5, 3.0, participants=10)
        0.15
    """
    return noise_multiplier * clipping_norm / participants
