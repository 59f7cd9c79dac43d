"""Quantized and converted files of a float32 model: honest ones pass under their profile, planted faults do not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import quantize_dynamic

from rmsnorm_deploy.export.from_torch.export_model import prepare
from rmsnorm_deploy.export.from_torch.save import save
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.accuracy.lossy import PROFILES
from rmsnorm_deploy.runtime.accuracy.tolerances import Limits
from rmsnorm_deploy.runtime.validation.api import bisect, validate
from tests.helpers.models.small_models import Residual, residual_inputs

Change = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def model() -> Residual:
    return Residual().eval()


@pytest.fixture(scope="module")
def files(model: Residual, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The export in float32, its int8 quantization, and an export of the model in float16, by profile."""
    folder = tmp_path_factory.mktemp("lossy")
    wide = save(prepare(model, inputs=residual_inputs()), folder / "fp32", "standard").folder / "model.onnx"
    quantize_dynamic(wide, folder / "int8.onnx")
    inputs = {name: value.half() for name, value in residual_inputs().items()}
    half = save(prepare(copy.deepcopy(model).half(), inputs=inputs), folder / "fp16", "standard").folder
    return {"fp32": wide, "int8": folder / "int8.onnx", "fp16": half}


def changed(path: Path, place: Path, find: str, change: Change) -> Path:
    """A copy of a file in which the first constant whose name contains `find` went through `change`."""
    model = onnx.load(path if path.is_file() else path / "model.onnx")
    tensor = next(tensor for tensor in model.graph.initializer if find in tensor.name)
    values = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(values.copy()).astype(values.dtype), tensor.name))
    onnx.save(model, place / "changed.onnx")
    return place / "changed.onnx"


@pytest.mark.parametrize("profile", ["int8", "fp16"])
def test_an_honest_file_passes_under_its_profile_only(files: dict[str, Path], model: Residual, profile: str) -> None:
    report = validate(files[profile], model, lossy=profile)
    assert (report.verdict, len(report.norms), len(report.segments)) == ("pass", 2, 3)
    assert report.summary.endswith(f"2 of 2 norms, 3 of 3 segments within the limits of {profile}.")
    assert report.settings["lossy"] == profile
    if profile == "int8":
        assert validate(files[profile], model).verdict == "fail"
    else:
        with pytest.raises(UsageError, match=r"exported in float16, but the PyTorch model is in float32.*--lossy"):
            validate(files[profile], model)


def test_a_float32_file_passes_under_every_profile(files: dict[str, Path], model: Residual) -> None:
    for profile in PROFILES:
        assert validate(files["fp32"], model, lossy=profile).verdict == "pass"


def test_a_module_in_bfloat16_is_held_to_the_float32_one(model: Residual) -> None:
    narrow = copy.deepcopy(model).bfloat16()
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    report = validate(narrow, model, cases=[{"x": x}], lossy="bf16")
    assert (report.verdict, len(report.norms)) == ("pass", 2)
    assert report.rows[0][1].reason.endswith("the candidate is bfloat16, the baseline float32")
    assert validate(narrow, model, cases=[{"x": x}], lossy="fp16").verdict == "fail"


def test_a_wrong_scale_fails_in_its_segment(files: dict[str, Path], model: Residual, tmp_path: Path) -> None:
    path = changed(files["int8"], tmp_path, "_scale", lambda scale: scale * 1.5)
    report = validate(path, model, lossy="int8")
    assert report.verdict == "fail"
    assert all(norm.passed for norm in report.norms)
    failed = [segment.name for segment in report.segments if not segment.verdict.passed]
    assert failed == [report.loss[0].name]
    assert "RMS error / row RMS" in report.culprits[0].reason
    assert [culprit.name for culprit in bisect(path, model, lossy="int8").culprits] == failed


def test_a_wrong_norm_fails_alone(files: dict[str, Path], model: Residual, tmp_path: Path) -> None:
    for profile in ("int8", "fp16"):
        path = changed(files[profile], tmp_path, "norms.0.weight", lambda weight: weight * 1.05)
        report = validate(path, model, lossy=profile)
        assert [(norm.norm.key[0], norm.passed) for norm in report.norms] == [("norms.0", False), ("norms.1", True)]


def test_the_rows_of_a_norm_are_of_the_files_dtype(files: dict[str, Path], model: Residual) -> None:
    report = validate(files["fp16"], model, lossy="fp16", shapes=((2, 5),))
    assert {(norm.norm.x_dtype, norm.norm.y_dtype) for norm in report.norms} == {("float16", "float16")}
    assert {kind.name for norm in report.norms for kind in norm.kinds} >= {"large", "largest", "tiny", "as it runs"}
    for norm in report.norms:
        as_it_runs = next(kind for kind in norm.kinds if kind.name == "as it runs")
        assert as_it_runs.figures is not None
        assert 1e-5 < as_it_runs.figures.rms_rel_row < 1e-3


def test_the_loss_is_sorted_and_printed(files: dict[str, Path], model: Residual) -> None:
    report = validate(files["int8"], model, lossy="int8", shapes=((2, 5),))
    content = report.to_dict()
    assert [row["rms_rel_row"] for row in content["loss"]] == sorted(
        (row["rms_rel_row"] for row in content["loss"]), reverse=True
    )
    assert {(row["kind"], row["name"]) for row in content["loss"]} == {
        *(("segment", segment.name) for segment in report.segments), ("norm", "norms.0"), ("norm", "norms.1"),
    }  # fmt: skip
    assert sum(line.startswith("largest loss: segment ") for line in str(report).splitlines()) >= 1
    assert validate(files["fp32"], model, shapes=((2, 5),)).to_dict()["loss"] == []


def test_explicit_limits_replace_single_entries(files: dict[str, Path], model: Residual) -> None:
    given = {"@segments": Limits(max_rms=1e-6)}
    report = validate(files["int8"], model, lossy="int8", limits=given, shapes=((2, 5),))
    assert all(row.passed for _, row in report.rows)
    assert not all(segment.verdict.passed for segment in report.segments)
    assert "of at most 1e-06 allowed" in report.culprits[0].reason


def test_limits_on_norms_and_segments_without_a_profile(files: dict[str, Path], model: Residual) -> None:
    outputs = {"*": Limits(min_cosine=0.9)}
    report = validate(files["int8"], model, limits=outputs, shapes=((2, 5),))
    assert (all(row.passed for _, row in report.rows), report.verdict) == (True, "fail")
    parts = {"@norms": Limits(max_rms=1e-5), "@segments": Limits(min_cosine=0.99)}
    assert validate(files["int8"], model, limits={**outputs, **parts}, shapes=((2, 5),)).verdict == "pass"


def test_top1_needs_logits(files: dict[str, Path], model: Residual) -> None:
    with pytest.raises(UsageError, match=r"--min-top1: expected an output that holds logits.*got output"):
        validate(files["int8"], model, limits={"*": Limits(min_top1=0.9)})
