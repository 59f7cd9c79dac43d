"""Engines that the real TensorRT-RTX builds here, for tests of what runs them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.models.versions import installed_version
from rmsnorm_deploy.runtime.tensorrt.build import build_engine
from tests.helpers.models.families import build

# One profile for prompts, and one for steps; both may hold 3 rows.
PROFILES = (
    "batch:1,1,3;sequence:1,8,24;past_sequence:0,0,0",
    "batch:1,1,3;sequence:1,1,4;past_sequence:0,16,1200",
)


@dataclass(frozen=True)
class DecoderEngine:
    """An exported decoder and its engine.

    Attributes:
        model: the PyTorch model.
        folder: the exported folder.
        engine: the engine's file.
    """

    model: nn.Module
    folder: Path
    engine: Path


def require_rtx() -> str:
    """The version of TensorRT-RTX; skips the test if it is not installed."""
    version = installed_version("tensorrt-rtx-cu13")
    if version is None:
        pytest.skip("needs the builder: pip install 'rmsnorm-deploy[rtx]'")
    return version


def decoder_engine_in(folder: Path, **options: Any) -> DecoderEngine:
    """A Qwen3 of two layers in float32, exported with a cache, and built."""
    model = build("qwen3")
    export_model(model, folder / "out", with_past=True, target=options.pop("target", "standard"))
    build_engine(folder / "out", folder / "model.engine", profiles=PROFILES, **options)
    return DecoderEngine(model, folder / "out", folder / "model.engine")
