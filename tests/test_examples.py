"""The examples run as they are, and their last lines say what they are there to show."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAST_LINES = {
    "hugging_face_model": "verdict: pass",
    "own_module": "ort: 2 of 2 outputs, 1 of 1 norm, 2 of 2 segments as accurate as PyTorch.",
    "foreign_file": "proof: pass (1 norm alone on 10 kinds of rows; the whole model, 2 outputs)",
    "pytorch_kernel": "one graph with 9 calls of the kernel, and the outputs as before",
    "quantized_linear": "the W8A8 layer is within 2 percent of float32",
    "planted_fault": "planted in layers.0.mlp_norm, found in layers.0.mlp_norm",
}


def test_every_example_is_here() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(LAST_LINES)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"examples/{name}.py" in readme for name in LAST_LINES)


@pytest.mark.parametrize("name", LAST_LINES)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert answer.stdout.splitlines()[-1] == LAST_LINES[name]
    assert list(tmp_path.iterdir()) == []


def test_an_example_takes_a_model_by_name(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "hugging_face_model.py"), "no/such/model"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert "no/such/model" in answer.stderr
