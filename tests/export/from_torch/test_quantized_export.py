"""Exports with quantized weights: what changes in the file, what its manifest says, what is refused, what is left."""

from __future__ import annotations

import collections
import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from rmsnorm_deploy.export.from_torch import export_model as exporting
from rmsnorm_deploy.export.from_torch.export_model import export_model, prepare
from rmsnorm_deploy.export.from_torch.save import PreparedModel, SaveOptions, save, save_all
from rmsnorm_deploy.export.graph.metadata import PATH_KEY
from rmsnorm_deploy.export.onnx_io.verify import verify_folder
from rmsnorm_deploy.models.errors import UnsupportedError, UsageError
from rmsnorm_deploy.models.weights.checkpoint import load_weights
from rmsnorm_deploy.runtime.validation.api import bisect, validate
from tests.helpers.models.small_models import Residual, residual_inputs

WIDTH = 64


def inputs() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(4))}


@pytest.fixture(scope="module")
def model() -> Residual:
    return Residual(WIDTH).eval()


@pytest.fixture(scope="module")
def prepared(model: Residual) -> PreparedModel:
    return prepare(model, inputs=inputs())


def nodes(path: Path) -> list[onnx.NodeProto]:
    return list(onnx.load(path / "model.onnx", load_external_data=False).graph.node)


@pytest.mark.parametrize("target", ["primitives", "standard", "ort"])
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_only_products_change(prepared: PreparedModel, model: Residual, target: str, name: str, tmp_path: Path) -> None:
    usual = save(prepared, tmp_path / "usual", target)
    result = save(prepared, tmp_path / "out", target, SaveOptions(quantize=name))
    narrow, wide = nodes(result.folder), nodes(usual.folder)
    kept = [node for node in wide if node.op_type not in ("MatMul", "Transpose")]
    assert [node for node in narrow if node.op_type != "MatMulNBits"] == kept
    assert [node.name for node in narrow if PATH_KEY in {row.key for row in node.metadata_props}]
    quantized = result.manifest["quantized"]
    assert (quantized["profile"], quantized["bits"], quantized["nodes"]) == (name, int(name[3:]), 2)
    assert result.manifest["requires"]["onnxruntime"] == "1.23"
    assert "quantized" not in usual.manifest
    assert sum("2 MatMuls have weights in" in note for note in result.manifest["notes"]) == 1
    assert {file.problem for file in verify_folder(result.folder)} == {None}
    report = validate(result.folder, model)
    assert (report.verdict, report.settings["lossy"], len(report.norms)) == ("pass", name, 2)


def test_validation_takes_the_manifests_profile_and_says_so(
    prepared: PreparedModel, model: Residual, tmp_path: Path
) -> None:
    folder = save(prepared, tmp_path / "out", "ort", SaveOptions(quantize="int4")).folder
    report = validate(folder, model, shapes=((2, 5),))
    said = "the manifest says that the file has int4 weights: it is judged by the limits of --lossy int4"
    assert report.notes.count(said) == 1
    assert report.summary.endswith("within the limits of int4.")
    explicit = validate(folder, model, shapes=((2, 5),), lossy="int4")
    assert {**explicit.to_dict(), "created": ""} == {**report.to_dict(), "created": ""}
    strict = validate(folder, model, shapes=((2, 5),), lossy="int8")
    assert (strict.verdict, said in strict.notes) == ("fail", False)
    assert validate(folder / "model.onnx", model, shapes=((2, 5),)).verdict == "fail"
    assert bisect(folder, model, shapes=((2, 5),)).culprits == []


def test_weights_of_another_layer_fail(prepared: PreparedModel, model: Residual, tmp_path: Path) -> None:
    folder = save(prepared, tmp_path / "out", "ort", SaveOptions(quantize="int4")).folder
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.second.weight.copy_(model.first.weight)
    report = validate(folder, wrong, shapes=((2, 5),))
    assert report.verdict == "fail"


def test_float16_is_quantized_and_bfloat16_refused(model: Residual, tmp_path: Path) -> None:
    half = copy.deepcopy(model).half()
    result = export_model(half, tmp_path / "out", inputs={"x": inputs()["x"].half()}, target="ort", quantize="int4")
    tensors = {tensor.name: tensor for tensor in onnx.load(result.folder / "model.onnx").graph.initializer}
    scales = [tensor for name, tensor in tensors.items() if name.endswith("_scales")]
    assert [tensor.data_type for tensor in scales] == [onnx.TensorProto.FLOAT16] * 2
    assert validate(result.folder, half).verdict == "pass"
    for dtype in ("bfloat16", "float64"):
        with pytest.raises(UnsupportedError, match=f"no MatMulNBits for {dtype}"):
            export_model(model, tmp_path / "no", inputs=inputs(), dtype=dtype, quantize="int8")
    assert not (tmp_path / "no").exists()


def test_refusals_come_before_the_capture(
    monkeypatch: pytest.MonkeyPatch, model: Residual, prepared: PreparedModel, tmp_path: Path
) -> None:
    monkeypatch.setattr(exporting, "find_norms", None)
    with pytest.raises(UnsupportedError, match="TensorRT does not have"):
        export_model(model, tmp_path / "out", inputs=inputs(), target="ort,plugin", quantize="int4")
    with pytest.raises(UsageError, match="expected one of int4, int8, got 'int2'"):
        export_model(model, tmp_path / "out", inputs=inputs(), quantize="int2")
    with pytest.raises(UnsupportedError, match="TensorRT does not have"):
        save(prepared, tmp_path / "out", "plugin", SaveOptions(quantize="int4"))
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_such_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"to int4 \(left: 2 because the weight has fewer than 32 inputs\)"):
        export_model(Residual().eval(), tmp_path / "out", inputs=residual_inputs(), quantize="int4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("calls", [1, 4])
def test_a_quantizer_that_fails_leaves_the_earlier_export(
    monkeypatch: pytest.MonkeyPatch, prepared: PreparedModel, calls: int, tmp_path: Path
) -> None:
    save(prepared, tmp_path / "out", "ort")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    process, count = MatMulNBitsQuantizer.process, [0]

    def failing(self: Any) -> None:
        count[0] += 1
        if count[0] >= calls:
            raise MemoryError("no room")
        process(self)

    monkeypatch.setattr(MatMulNBitsQuantizer, "process", failing)
    with pytest.raises(UnsupportedError, match=r"failed on the weight .*: no room"):
        save(prepared, tmp_path / "out", "ort", SaveOptions(quantize="int4"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_weights_at_rest_give_the_same_constants(model: Residual, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "m").mkdir()
    save_file(model.state_dict(), tmp_path / "m" / "m.safetensors")
    rest = Residual(WIDTH).eval()
    load_weights(rest, tmp_path / "m" / "m.safetensors")
    options: dict[str, Any] = {"inputs": inputs(), "target": "ort", "quantize": "int8"}
    folders = [
        export_model(rest, tmp_path / "rest", **options).folder,
        export_model(model, tmp_path / "memory", **options).folder,
        export_model(rest, tmp_path / "m", weights="reference", **options).folder,
    ]
    assert not list(folders[0].glob("*.safetensors"))  # the checkpoint is not in the folder
    kinds = [collections.Counter(node.op_type for node in nodes(folder)) for folder in folders]
    assert kinds[0] == kinds[1] == kinds[2]
    constants = []
    for folder in folders:
        graph = onnx.load(folder / "model.onnx").graph
        tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        read = [name for node in graph.node if node.op_type == "MatMulNBits" for name in node.input[1:]]
        constants.append([tensors[name] for name in read])
    assert len(constants[0]) == 4
    for other in constants[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(constants[0], other, strict=True))


def test_parts_are_quantized_where_they_have_such_weights(prepared: PreparedModel, tmp_path: Path) -> None:
    small = prepare(Residual().eval(), inputs=residual_inputs())
    options, parts = SaveOptions(quantize="int8"), {"encoder": prepared, "embedding": small, "decoder": prepared}
    result = save_all(parts, tmp_path / "out", "ort", options, "function", None)
    kinds = {part: {node.op_type for node in nodes(result.folder / part)} for part in parts}
    assert [part for part, found in kinds.items() if "MatMulNBits" in found] == ["encoder", "decoder"]
    quantized = result.manifest["quantized"]
    assert (quantized["nodes"], quantized["left"]) == (4, {"the weight has fewer than 32 inputs": 2})
    assert {file.problem for file in verify_folder(result.folder)} == {None}
    with pytest.raises(UnsupportedError, match="no MatMul of the model has a constant weight"):
        save_all({"encoder": small, "decoder": small}, tmp_path / "no", "ort", options, "function", None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
