"""Running the command line inside the test process, and the tiny models that it is run on."""

from __future__ import annotations

from pathlib import Path

import pytest

from rmsnorm_deploy.cli.application import run
from tests.helpers.interface.command_line import CommandLine

# `norm` casts before it scales, so that a half-precision export has a deviation to report.
_MODELS = """
import torch
from torch import nn


class CastThenScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype)


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(12, 16)
        self.norm = CastThenScale()
        self.centered = nn.LayerNorm(16)
        self.head = nn.Linear(16, 64)

    def forward(self, input_ids):
        return self.head(self.centered(self.norm(self.embed(input_ids))))


class Floats(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(8, 16)
        self.norm = nn.RMSNorm(16, eps=1e-6)

    def forward(self, x):
        return self.norm(self.up(x))


def net():
    print("a factory may print")
    return Net(0)


def other_net():
    return Net(1)


def without_norms():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 4)), {"input": torch.ones(2, 3, dtype=torch.int64)}


def floats():
    return Floats(), {"x": torch.randn(2, 3, 8)}


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16)

    def forward(self, x):
        return nn.functional.rms_norm(self.up(x), (16,), eps=1e-6)


def functional():
    return Functional(), {"x": torch.randn(2, 3, 8)}


def broken():
    raise RuntimeError("no luck")


def quitting():
    raise SystemExit(3)
"""


@pytest.fixture
def rmsnorm(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python file with factories, named as `f"{models}:net"`."""
    path = tmp_path_factory.mktemp("models") / "tiny_models.py"
    path.write_text(_MODELS)
    return path


@pytest.fixture(scope="session")
def exported(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`net` in float32 for every target, each in its subfolder."""
    folder = tmp_path_factory.mktemp("exported") / "net"
    targets = [f"--target={name}" for name in ("primitives", "standard", "ort", "plugin")]
    assert run(["export", f"{models}:net", "-o", str(folder), *targets]) == 0
    return folder
