"""Quantized exports on the command line: export, inspect, verify, run, validate and build."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.interface.command_line import CommandLine
from tests.helpers.models.factory_file import small_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory.mktemp("models"), "quantized_models")


def test_a_quantized_export_goes_through_every_command(rmsnorm: CommandLine, source: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    outcome = rmsnorm("export", source, "-o", folder, "--target", "ort", "--quantize", "int8")
    assert outcome.code == 0
    line = "  quantized to int8: the weights of 1 MatMuls; left: 1 (the operator is Gather)"
    assert line in outcome.out.splitlines()
    assert "rmsnorm validate judges the file by the limits of --lossy int8" in outcome.out
    assert line in rmsnorm("inspect", folder).out.splitlines()
    assert rmsnorm("inspect", folder, "--json").json["quantized"]["nodes"] == 1
    assert rmsnorm("verify", folder).code == 0
    np.savez(tmp_path / "x.npz", input_ids=np.array([[1, 2, 3]]))
    assert rmsnorm("run", folder, "--inputs", tmp_path / "x.npz", "-o", tmp_path / "y.npz").code == 0
    outcome = rmsnorm("validate", folder, "--against", source, "--shape", "2x5")
    assert outcome.code == 0
    assert "within the limits of int8" in outcome.out
    assert "note: the manifest says that the file has int8 weights" in outcome.out
    outcome = rmsnorm("validate", folder / "model.onnx", "--against", source, "--shape", "2x5")
    assert outcome.code == 1


def test_several_targets_and_json(rmsnorm: CommandLine, source: str, tmp_path: Path) -> None:
    arguments = ("export", source, "-o", tmp_path / "out", "--quantize", "int4")
    rows = rmsnorm(*arguments, "--target", "ort,standard", "--json").json["exports"]
    assert [(row["target"], row["quantized"]["profile"], row["quantized"]["nodes"]) for row in rows] == [
        ("ort", "int4", 1), ("standard", "int4", 1),
    ]  # fmt: skip
    outcome = rmsnorm(*arguments[:3], tmp_path / "no", "--quantize", "int4", "--target", "ort,plugin")
    assert (outcome.code, (tmp_path / "no").exists()) == (3, False)
    assert "Use --target ort for ONNX Runtime" in outcome.err
    outcome = rmsnorm(*arguments[:3], tmp_path / "no", "--quantize", "int5")
    assert outcome.code == 2
    assert "expected one of int4, int8, got 'int5'" in outcome.err
    outcome = rmsnorm("build", tmp_path / "out" / "standard", "-o", tmp_path / "m.engine")
    assert outcome.code == 3
    assert "1 nodes com.microsoft::MatMulNBits with quantized weights, which only ONNX Runtime runs" in outcome.err


def test_a_manifest_with_an_unknown_profile_is_refused(rmsnorm: CommandLine, source: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert rmsnorm("export", source, "-o", folder, "--target", "ort", "--quantize", "int4").code == 0
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"profile": "int4"', '"profile": "int3"'))
    outcome = rmsnorm("validate", folder, "--against", source)
    assert outcome.code == 2
    assert "says that its weights are 'int3', expected one of int8, int4, fp16, bf16" in outcome.err
