"""Linear layers that use weights as a checkpoint stores them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.models.weights.checkpoint import load_weights


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(32, eps=1e-6)
        self.up = nn.Linear(32, 48, bias=False)
        self.gate = nn.Linear(32, 48, bias=False)
        self.down = nn.Linear(48, 32)
        self.head = nn.Linear(32, 10, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.norm(x)
        x = x + self.down(torch.tanh(self.gate(h)) * self.up(h))
        return self.head(x), self.head(x.flatten(0, -2))


def both(folder: Path, x: torch.Tensor, **options: Any) -> list[Path]:
    """Exports of one model, with its weights at rest and in memory."""
    torch.manual_seed(0)
    model = Layers().eval()
    save_file(model.state_dict(), folder / "m.safetensors")
    rest = Layers().eval()
    load_weights(rest, folder / "m.safetensors")
    for name, module in (("rest", rest), ("memory", model)):
        export_model(module, folder / name, inputs={"x": x}, **options)
    return [folder / "rest" / "model.onnx", folder / "memory" / "model.onnx"]


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def results(path: Path, x: np.ndarray[Any, Any]) -> list[Any]:
    found: list[Any] = onnxruntime.InferenceSession(path).run(None, {"x": x})
    return found


@pytest.mark.parametrize("shape", [(2, 3, 32), (5, 32), (2, 3, 4, 32)], ids=str)
@pytest.mark.parametrize("dynamic", [True, False])
def test_the_results_are_those_of_transposed_weights_bit_for_bit(
    tmp_path: Path, shape: tuple[int, ...], dynamic: bool
) -> None:
    rest, memory = both(tmp_path, torch.randn(shape), dynamic=dynamic)
    assert operators(rest).count("Gemm") in (4, 5)  # torch's exporter writes a 2D layer with a bias as Gemm, too
    assert "Transpose" not in operators(rest)
    other = tuple(size + 3 for size in shape[:-1]) + shape[-1:] if dynamic else shape
    x = np.random.default_rng(0).standard_normal(other).astype(np.float32)
    for got, wanted in zip(results(rest, x), results(memory, x), strict=True):
        np.testing.assert_array_equal(got, wanted)
    initializers = onnx.load(rest, load_external_data=False).graph.initializer
    assert {t.name for t in initializers if t.external_data} == {
        "up.weight", "gate.weight", "down.weight", "head.weight",
    }  # fmt: skip


def test_sizes_are_computed_once(tmp_path: Path) -> None:
    rest, _ = both(tmp_path, torch.randn(2, 3, 32))
    counts = {name: operators(rest).count(name) for name in ("Shape", "Concat", "Reshape")}
    assert counts["Shape"] <= 3  # one for all layers; those of flatten
    assert counts["Concat"] <= 5


def test_the_file_is_valid_for_onnx(tmp_path: Path) -> None:
    rest, _ = both(tmp_path, torch.randn(2, 3, 32), weights="pack")  # onnx refuses hard links
    onnx.checker.check_model(rest, full_check=True)


def test_for_tensorrt_the_transposition_stays_a_node(tmp_path: Path) -> None:
    rest, memory = both(tmp_path, torch.randn(2, 3, 32), target="plugin")
    assert operators(rest).count("Transpose") >= 4
    x = np.random.default_rng(0).standard_normal((4, 5, 32)).astype(np.float32)
    for got, wanted in zip(results(rest, x), results(memory, x), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
