"""A Python file with a factory of a small model: tokens, a norm, and a product (`SMALL_MODEL`, `small_model`)."""

from __future__ import annotations

from pathlib import Path

# `net` makes it, always with the same weights.
SMALL_MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 32)
        self.norm = nn.RMSNorm(32, eps=1e-6)
        self.head = nn.Linear(32, 64, bias=False)

    def forward(self, input_ids):
        return self.head(self.norm(self.embed(input_ids)))


def net():
    return Net()
"""


def small_model(folder: Path, name: str) -> str:
    """Write the file, and name its factory as `rmsnorm export` reads it."""
    path = folder / f"{name}.py"
    path.write_text(SMALL_MODEL)
    return f"{path}:net"
