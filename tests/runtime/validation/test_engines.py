"""Engines are validated as files are: outputs, norms in engines of their own, and one report of several runtimes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.engines.engine_file import record_of
from rmsnorm_deploy.runtime.generation.api import generate
from rmsnorm_deploy.runtime.report import html
from rmsnorm_deploy.runtime.tensorrt.build import build_engine
from rmsnorm_deploy.runtime.validation.api import bisect, validate
from rmsnorm_deploy.runtime.validation.options import ValidationOptions
from tests.helpers.extent import slow
from tests.helpers.tensorrt.engines import PROFILES, DecoderEngine
from tests.helpers.tensorrt.stand_in import StandIn

pytest.importorskip("tensorrt_rtx", reason="needs the builder: pip install 'rmsnorm-deploy[rtx]'")

SHAPES: dict[str, Any] = {"shapes": [(1, 5), (2, 7)]}
NORM = "model.layers.1.input_layernorm"


@pytest.fixture(scope="module")
def wrong(decoder_engine: DecoderEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine of an export in which one weight of one norm was changed."""
    folder = tmp_path_factory.mktemp("wrong")
    shutil.copytree(decoder_engine.folder, folder / "out")
    place = folder / "out" / "model.onnx"
    model = onnx.load(place)
    (tensor,) = [t for t in model.graph.initializer if t.name == f"{NORM}.weight"]
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[3] *= 1.02
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, place)
    return build_engine(folder / "out", folder / "wrong.engine", profiles=PROFILES, architectures=(89,)).path


def test_outputs_of_an_engine(stand_in: StandIn, decoder_engine: DecoderEngine) -> None:
    report = validate(decoder_engine.engine, decoder_engine.model, **SHAPES)
    assert (report.verdict, report.norms, report.segments) == ("pass", [], [])
    assert {row.name for _, row in report.rows} >= {"logits", "logits@decode"}
    assert "no norm was checked: an engine shows its outputs; --deep builds engines" in report.summary
    assert report.provenance["candidate"]["product"] == "TensorRT-RTX"
    assert not any("metadata" in note for note in report.notes)


def test_norms_of_an_engine(stand_in: StandIn, decoder_engine: DecoderEngine) -> None:
    """`deep`: each norm alone, and the segments between, in engines whose norms are marked."""
    report = validate(decoder_engine.engine, decoder_engine.model, deep=True, **SHAPES)
    assert (report.verdict, len(report.norms), len(report.segments)) == ("pass", 9, 10)
    assert any("TensorRT does not fuse across marked values" in note for note in report.notes)
    assert report.settings["deep"] is True
    assert "exposing the values at the norms did not change the outputs" in report.notes
    assert "norms ran in: layers of TensorRT-RTX 9 (float32, statistics in float32)" in str(report)


def test_an_engine_that_computes_something_else(stand_in: StandIn, decoder_engine: DecoderEngine, wrong: Path) -> None:
    report = validate(wrong, decoder_engine.model, **SHAPES)
    assert report.verdict == "fail"
    assert "the place where error is introduced is not known: an engine shows its outputs" in report.summary
    found = bisect(wrong, decoder_engine.model, **SHAPES)
    assert [(culprit.kind, culprit.name) for culprit in found.culprits] == [("norm", NORM)]
    assert found.depth


def test_one_report_of_two_runtimes(
    stand_in: StandIn, decoder_engine: DecoderEngine, tmp_path: Path, wrong: Path
) -> None:
    report = validate(decoder_engine.folder, decoder_engine.model, runners=("ort", "rtx"), **SHAPES)
    assert report.runners == {"ort": "pass", "rtx": "pass"}
    assert (report.verdict, len(report.norms)) == ("pass", 9)
    assert {case.partition(": ")[0] for case, _ in report.rows} == {"ort", "rtx"}
    assert {check.norm.key[0].partition(": ")[0] for check in report.norms} == {"ort"}
    assert [report.provenance["candidate"][name]["runner"] for name in ("ort", "rtx")] == ["onnxruntime", "tensorrt"]
    text = str(report)
    assert re.search(r"in each runtime +ort +rtx\n *verdict +pass +pass\n *logits +pass \S+ \(\S+\) +pass", text)
    assert '<h2 id="runners">In each runtime</h2>' in html.render(report.to_dict())
    json.dumps(report.to_dict())
    again = ValidationOptions(**{k: v for k, v in report.settings.items() if k in ("runners", "deep", "shapes")})
    assert again.runners == ("ort", "rtx")


@slow
def test_a_fault_shows_in_its_runtime_only(stand_in: StandIn, decoder_engine: DecoderEngine) -> None:
    """The stand-in's product of the logits is off, as a wrong kernel's would be."""
    stand_in.behavior.change = lambda name, value: value * np.float32(1.001) if name == "logits" else value
    report = validate(decoder_engine.folder, decoder_engine.model, runners=("ort", "rtx"), **SHAPES)
    assert (report.verdict, report.runners) == ("fail", {"ort": "pass", "rtx": "fail"})
    assert {case.partition(": ")[0] for case, row in report.rows if not row.passed} == {"rtx"}
    deep = bisect(decoder_engine.folder, decoder_engine.model, runners=("rtx",), **SHAPES)
    assert [culprit.kind for culprit in deep.culprits] == ["segment"]
    assert "logits" in deep.culprits[0].name


def test_the_file_of_a_deep_check_must_be_that_of_the_engine(
    stand_in: StandIn, decoder_engine: DecoderEngine, tmp_path: Path
) -> None:
    place = tmp_path / "model.engine"
    shutil.copy(decoder_engine.engine, place)
    record = json.loads(record_of(decoder_engine.engine).read_text(encoding="utf-8"))
    record["model"]["sha256"] = "0" * 64
    record_of(place).write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UsageError, match=r"from the .onnx file .* and .*model.onnx is not the file"):
        validate(place, decoder_engine.model, deep=True, **SHAPES)
    record["model"] = {"manifest": record["model"]["manifest"]}
    record_of(place).write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UsageError, match=r"nothing says from which it was built"):
        validate(place, decoder_engine.model, deep=True, **SHAPES)


def test_a_deployed_engine_needs_neither_folder_nor_onnx(
    stand_in: StandIn, decoder_engine: DecoderEngine, tmp_path: Path
) -> None:
    """The record has what running and validating have to know of the model."""
    place = tmp_path / "model.engine"
    shutil.copy(decoder_engine.engine, place)
    record = json.loads(record_of(decoder_engine.engine).read_text(encoding="utf-8"))
    record["model"] |= {"folder": str(tmp_path / "gone"), "end_tokens": [52]}
    record_of(place).write_text(json.dumps(record), encoding="utf-8")
    assert validate(place, decoder_engine.model, **SHAPES).verdict == "pass"
    free = generate(decoder_engine.engine, [3, 5, 7], max_new_tokens=9).ids
    assert free == generate(decoder_engine.folder, [3, 5, 7], max_new_tokens=9).ids
    assert generate(place, [3, 5, 7], max_new_tokens=9).ids == free[: free.index(52) + 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runners": ("ort", "onnx")}, "runners: expected ort, tensorrt, rtx, each at most once, got ort, onnx"),
        ({"runners": ("ort", "ort")}, "each at most once, got ort, ort"),
        ({"deep": True, "outputs_only": True}, "deep checks norms and segments"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ValidationOptions(**options)
    assert ValidationOptions(runners="rtx").runners == ("rtx",)  # type: ignore[arg-type]


def test_shapes_outside_of_the_profiles_are_not_tried(
    stand_in: StandIn, decoder_engine: DecoderEngine, tmp_path: Path
) -> None:
    """An engine with the default profiles runs prompts, and steps of one token."""
    place = build_engine(decoder_engine.folder, tmp_path / "default.engine", architectures=(89,)).path
    report = validate(place, decoder_engine.model)
    assert report.verdict == "pass"
    (untried,) = [text for text in report.untried if "profiles" in text]
    expected = r"\d+ inputs with shapes outside of the engine's profiles \(.* more\): build an engine"
    assert re.match(expected, untried), untried
    with pytest.raises(UsageError, match=r"these shapes are outside of what the engine was built for"):
        validate(place, decoder_engine.model, shapes=[(9, 5)])


def test_norms_in_the_plugin(stand_in: StandIn, decoder_engine: DecoderEngine, tmp_path: Path) -> None:
    """The values that are fed to a segment have the shapes of those that it computes: a fused residual needs both."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install 'rmsnorm-deploy[kernel]'")
    export_model(decoder_engine.model, tmp_path / "out", with_past=True, target="plugin")
    report = validate(tmp_path / "out", decoder_engine.model, runners=("rtx",), deep=True, shapes=[(2, 7)])
    assert (report.verdict, len(report.norms), len(report.segments)) == ("pass", 9, 10)
    assert "norms ran in: the plugin 9 (float32, statistics in float32)" in str(report)
