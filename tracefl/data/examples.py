"""Labelled examples as tensors: one safetensors file per client, one for the server.

Images are stored as bytes [N, C, 32, 32], decoded and resized once; they become floats when a client loads them.
Light on imports: every client process reads its own file through this module.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

IMAGE_SIZE = 32
# ImageNet's channel statistics: what torchvision's pretrained weights expect.
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@dataclass(frozen=True)
class Examples:
    """N model inputs (float [N, 3, 32, 32]) with their labels (int64 [N])."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> "Examples":
        return Examples(self.inputs[rows], self.labels[rows])


def normalize(pixels: Tensor) -> Tensor:
    """Bytes [N, C, H, W] with C of 1 or 3 as normalized floats [N, 3, H, W]."""
    scaled = pixels.to(torch.float32).div_(255).expand(-1, 3, -1, -1)
    return (scaled - MEAN) / STD


def load_examples(file: Path) -> Examples:
    tensors = load_file(file)
    return Examples(normalize(tensors["pixels"]), tensors["labels"])
