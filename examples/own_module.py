"""Export a module of one's own, whose norm is written by hand, for three targets."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import rmsnorm_deploy as rd


class MyNorm(nn.Module):
    """RMSNorm as Gemma has it: statistics in float32, and 1 is added to the weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (wide * (1.0 + self.weight.float())).to(x.dtype)


class Block(nn.Module):
    """A residual block around one linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = MyNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


def main() -> int:
    """Return 0 if every export is as accurate as PyTorch."""
    torch.manual_seed(0)
    model = Block(64).eval()
    for site in rd.find_norms(model).sites:
        print(f"{site.path}: {site.spec.describe()}")
    inputs = {"x": np.random.default_rng(0).standard_normal((2, 5, 64)).astype(np.float32)}
    with tempfile.TemporaryDirectory() as temporary:
        exports = rd.export_model(
            model, Path(temporary) / "out", inputs=inputs, target=["primitives", "standard", "ort"]
        )
        reports = {export.target: rd.validate(export.folder, model, shapes=[(1, 3), (4, 9)]) for export in exports}
    for target, report in reports.items():
        print(f"{target}: {report.summary}")
    return 0 if all(report.verdict == "pass" for report in reports.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
