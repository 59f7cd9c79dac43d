"""`python -m benchmarks.tensorrt_check` with the stand-in for TensorRT's runtime."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from benchmarks.tensorrt_check import archive, run
from benchmarks.tensorrt_check.rows import DTYPES, FAMILIES, NORMS, Row, all_rows
from benchmarks.tensorrt_check.worker import Worker
from rmsnorm_deploy import __version__
from rmsnorm_deploy.models.tensors import to_numpy
from tests.helpers.models.families import build
from tests.helpers.tensorrt.stand_in import StandIn

ROW = "rtx/qwen3/float32/native"


def check(out: Path, *more: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and rows of a run in this process, where the stand-in is."""
    place = out / "rows.json"
    arguments = ["--in-process", "--runtime", "rtx", "--out", str(out / "made"), "--json", str(place), *more]
    out.mkdir(exist_ok=True)
    code = run.main(arguments)
    return code, json.loads(place.read_text(encoding="utf-8"))["rows"]


def test_a_row_passes(stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = check(tmp_path, "--only", f"^{ROW}$", "--markdown", str(tmp_path / "table.md"))
    print(json.dumps(rows, indent=1)[:6000])
    printed = capsys.readouterr().out
    assert code == 0, printed
