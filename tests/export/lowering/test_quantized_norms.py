"""Norms with a quantized output: made of a norm and a QuantizeLinear, taken apart again, and what is left alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from rmsnorm_deploy.cli.application import run
from rmsnorm_deploy.export.from_onnx.rewrite import fuse_quantized, rewrite
from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.export.from_torch.lower import lower
from rmsnorm_deploy.export.graph.captured_nodes import CAPTURE_DOMAIN, NORM_OP
from rmsnorm_deploy.export.graph.metadata import PATH_KEY, SPEC_KEY, VALUES_KEY
from rmsnorm_deploy.export.lowering.plugin_functions import plugin_function, style_plugin_nodes
from rmsnorm_deploy.export.lowering.quantized_norms import (
    fuse_quantized_outputs,
    is_quantized_norm,
    split_quantized_outputs,
)
from rmsnorm_deploy.export.recognition.find_norms import find_graph_norms
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.plugins import contract
from rmsnorm_deploy.runtime.norms.graph_norms import GraphNorms
from rmsnorm_deploy.runtime.rewriting.rewrite_file import rewrite_model
from rmsnorm_deploy.runtime.validation.api import validate
from tests.helpers.models.families import build as build_family

WIDTH = 32
TYPES = {"int8": TensorProto.INT8, "float8_e4m3": TensorProto.FLOAT8E4M3FN}
NUMPY = {"int8": np.int8, "float8_e4m3": ml_dtypes.float8_e4m3fn, "uint8": np.uint8}


class Fragment:
    """Two layers of residual add, norm, QuantizeLinear, DequantizeLinear and MatMul, in float16, norms spelled out."""

    def __init__(self, quantized: str = "int8", opset: int = 20) -> None:
        self.quantized, self.opset = quantized, opset
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.outputs = ["sum1", "y1"]
        self.constant("two", np.array(2, np.float32)), self.constant("eps", np.array(1e-5, np.float32))
        self.constant("axes", np.array([-1], np.int64))

    def constant(self, name: str, array: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def op(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [output], f"node_{output}", **attributes))
        return output

    def norm(self, number: int, x: str, residual: str) -> str:
        """The Llama order: cast before the scale."""
        rng = np.random.default_rng(number)
        scale = self.constant(f"layers.{number}.norm.weight", rng.uniform(0.5, 1.5, WIDTH).astype(np.float16))
        total = self.op("Add", [x, residual], f"sum{number}")
        wide = self.op("Cast", [total], f"wide{number}", to=1)
        squares = self.op("Pow", [wide, "two"], f"squares{number}")
        mean = self.op("ReduceMean", [squares, "axes"], f"mean{number}", keepdims=1)
        root = self.op("Sqrt", [self.op("Add", [mean, "eps"], f"under{number}")], f"root{number}")
        back = self.op("Cast", [self.op("Div", [wide, root], f"normed{number}")], f"back{number}", to=10)
        return self.op("Mul", [back, scale], f"n{number}")

    def layer(self, number: int, x: str, residual: str, cast: bool = False) -> str:
        self.quantize(number, self.norm(number, x, residual), cast)
        return self.consume(number)

    def quantize(self, number: int, n: str, cast: bool = False) -> None:
        """By a scale of n's dtype, with a zero point of 0, as exporters of quantized models do."""
        kind = np.float32 if cast else np.float16
        scale = self.constant(f"scale{number}", np.array(0.04, kind))
        zero = self.constant(f"zero{number}", np.array(0, NUMPY[self.quantized]))
        value = self.op("Cast", [n], f"n32_{number}", to=1) if cast else n
        self.op("QuantizeLinear", [value, scale, zero], f"q{number}")

    def consume(self, number: int, **attributes: Any) -> str:
        scale = self.constant(f"scale_back{number}", np.array(0.04, np.float16))
        value = self.op("DequantizeLinear", [f"q{number}", scale], f"back_{number}", **attributes)
        weight = np.random.default_rng(9 + number).standard_normal((WIDTH, WIDTH)).astype(np.float16) / 8
        return self.op("MatMul", [value, self.constant(f"w{number}", weight)], f"y{number}")

    def model(self, outputs: Sequence[tuple[str, int]] = (("sum1", 10), ("y1", 10))) -> onnx.ModelProto:
        dims = ["batch", "sequence", WIDTH]
        graph = helper.make_graph(
            self.nodes, "fragment",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT16, dims) for name in ("x", "residual")],
            [helper.make_tensor_value_info(name, kind, dims) for name, kind in outputs], self.weights,
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model


def two_layers(quantized: str, cast: bool = False, opset: int = 20) -> onnx.ModelProto:
    fragment = Fragment(quantized, opset)
    fragment.layer(1, fragment.layer(0, "x", "residual", cast), "sum0", cast)
    return fragment.model()


def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {name: (3 * rng.standard_normal((2, 7, WIDTH))).astype(np.float16) for name in ("x", "residual")}


def ran(model: onnx.ModelProto) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds())


def fused(model: onnx.ModelProto) -> tuple[Any, ir.Model]:
    """The file in the plugin's form, before its norms are fused with their quantization, and after."""
    result = rewrite(ir.from_proto(model), "plugin")
    before = ir.to_proto(result.model)
    fuse_quantized(result, "plugin")
    return before, result.model


@pytest.mark.parametrize("cast", [False, True], ids=["half scale", "cast"])
@pytest.mark.parametrize("quantized", TYPES)
def test_a_norm_and_its_quantization_become_one_operator(quantized: str, cast: bool) -> None:
    before, model = fused(two_layers(quantized, cast))
    nodes = [node for node in model.graph if is_quantized_norm(node)]
    assert [node.op_type for node in nodes] == [contract.ADD_RMS_NORM_QUANT] * 2
    assert [node.metadata_props[PATH_KEY] for node in nodes] == ["layers.0.norm", "layers.1.norm"]
    for number, node in enumerate(nodes):
        kinds = {**contract.OPERATOR_ATTRIBUTES[node.op_type], **contract.PARSER_ATTRIBUTES}
        assert sorted(node.attributes) == sorted(kinds)
        assert node.attributes["quant_type"].as_int() == TYPES[quantized]
        assert [value.name for value in node.outputs] == [f"q{number}", f"sum{number}"]
        assert node.outputs[0].dtype == ir.DataType(TYPES[quantized])
        assert json.loads(node.metadata_props[VALUES_KEY]) == {"x": f"sum{number}", "y": f"q{number}"}
        assert SPEC_KEY in node.metadata_props
        scale = node.inputs[-1]
        assert scale is not None
        assert scale.is_initializer()
        assert scale.const_value is not None
        assert (scale.dtype, tuple(scale.const_value.shape)) == (ir.DataType.FLOAT, ())
        assert scale.const_value.numpy() == np.float32(np.float32(0.04) if cast else np.float16(0.04))
    assert not {"QuantizeLinear", "Cast"} & {node.op_type for node in model.graph}
    assert sum(node.op_type == "DequantizeLinear" for node in model.graph) == 2
    assert not {"zero0", "zero1"} & set(model.graph.initializers)
    assert model.graph.opset_imports[""] == 21
    assert [key[:2] for key in model.functions] == [(contract.DOMAIN, contract.ADD_RMS_NORM_QUANT)]
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    if not cast:
        # ONNX Runtime leaves out the rounding between a cast to float16 and one back, so the file before is compared
        # with the Cast that quantizes alike; see the next test.
        split_quantized_outputs(model)
        style_plugin_nodes(model, "function")
        before = ir.to_proto(model)
        assert [node.op_type for node in before.graph.node].count("QuantizeLinear") == 2
    for one, other in zip(ran(before), ran(after), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("quantized", TYPES)
@pytest.mark.parametrize("scale", [0.04, 0.0123, 0.3, 3.0])
def test_a_scale_in_float16_quantizes_as_in_float32(quantized: str, scale: float) -> None:
    """Every float16, by a scale of float16: fusing may take the scale in float32."""
    kind = TYPES[quantized]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["half"], output_dtype=kind),
        helper.make_node("Cast", ["x"], ["x32"], to=1), helper.make_node("Cast", ["s"], ["s32"], to=1),
        helper.make_node("QuantizeLinear", ["x32", "s32"], ["wide"], output_dtype=kind),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n"])],
        [helper.make_tensor_value_info(name, kind, ["n"]) for name in ("half", "wide")],
        [numpy_helper.from_array(np.array(scale, np.float16), "s")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    half, wide = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x[np.isfinite(x)]})
    assert half.tobytes() == wide.tobytes()


@pytest.mark.parametrize("quantized", TYPES)
@pytest.mark.parametrize("cast", [False, True], ids=["half scale", "cast"])
def test_a_rewritten_file_is_proven_norm_by_norm_and_as_a_whole(quantized: str, cast: bool, tmp_path: Path) -> None:
    onnx.save(two_layers(quantized, cast), tmp_path / "model.onnx")
    result = rewrite_model(tmp_path / "model.onnx", tmp_path / "out", target="plugin")
    assert result.proof is not None
    assert (result.proof.verdict, len(result.proof.sites), result.proof.unproven) == ("pass", 2, "")
    assert result.proof.model is not None
    assert len(result.proof.model) == 4
    assert [row.dtype for row in result.rewritten.quantized] == [quantized] * 2
    assert any("2 of its norms have a quantized output" in note for note in result.manifest["notes"])
    assert "opset import raised from 20 to 21, for norms with a quantized output" in result.manifest["notes"]
    assert {node.op_type for node in onnx.load(result.model).graph.node} == {
        "AddRMSNormQuant", "DequantizeLinear", "MatMul"}  # fmt: skip


@pytest.mark.parametrize("quantized", TYPES)
@pytest.mark.parametrize("target", ["primitives", "standard", "ort", "plugin"])
def test_every_target_takes_the_operators_apart(target: str, quantized: str, tmp_path: Path) -> None:
    onnx.save(two_layers(quantized), tmp_path / "model.onnx")
    first = rewrite_model(tmp_path / "model.onnx", tmp_path / "fused", target="plugin")
    again = rewrite_model(first.model, tmp_path / "again", target=target)
    assert again.proof is not None
    assert again.proof.verdict == "pass"
    assert len(again.rewritten.sites) == 2
    ops = [node.op_type for node in onnx.load(again.model).graph.node]
    assert ("QuantizeLinear" in ops) == (target != "plugin")
    assert ops.count("AddRMSNormQuant") == 2 * (target == "plugin")
    if target == "plugin":
        before, after = (ir.load(place.model) for place in (first, again))
        rows = [[(n.op_type, [v and v.name for v in n.inputs], [v.name for v in n.outputs]) for n in m.graph]
                for m in (before, after)]  # fmt: skip
        assert rows[0] == rows[1]


def test_a_plain_norm_is_fused_too() -> None:
    """Without a residual add, in float32, and where the quantized value is an output of the graph."""
    model = ir.from_proto(onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21, "rmsnorm_deploy": 1]>
        g (float[n, 4] x) => (int8[n, 4] q) <float[4] w = {1, 1, 1, 1}, float s = {0.05}> {
        n = rmsnorm_deploy.RMSNorm <epsilon = 1e-5, scale_offset = 0.0, scale_type = 1,
            plugin_namespace = "rmsnorm_deploy", plugin_version = "1"> (x, w)
        q = QuantizeLinear <output_dtype = 3> (n, s)
    }"""))  # fmt: skip
    (row,) = fuse_quantized_outputs(model)
    assert (row.dtype, row.reason) == ("int8", "")
    (node,) = model.graph
    assert node.op_type == contract.RMS_NORM_QUANT
    assert [value.name for value in model.graph.outputs] == ["q"]
    assert list(model.graph.initializers) == ["w", "s"]
    style_plugin_nodes(model, "function")
    x = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    (q,) = session.run(None, {"x": x})
    wide = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)
    assert np.array_equal(q, np.clip(np.rint(wide / np.float32(0.05)), -128, 127))
    assert len(split_quantized_outputs(model)) == 1
    assert [node.op_type for node in model.graph] == ["RMSNorm", "QuantizeLinear"]


def projections(scales: Sequence[float], cast: bool, quantized: str = "int8") -> onnx.ModelProto:
    """A norm whose result is quantized once for each of query, key and value, as quantizing tools write it."""
    fragment = Fragment(quantized, opset=21)
    n = fragment.norm(0, "x", "residual")
    outputs = []
    for name, scale in zip("qkv", scales, strict=True):
        value = fragment.op("Cast", [n], f"{name}32", to=1) if cast else n
        kind = np.float32 if cast else np.float16
        given = [fragment.constant(f"{name}_scale", np.array(scale, kind)),
                 fragment.constant(f"{name}_zero", np.array(0, NUMPY[quantized]))]  # fmt: skip
        back = fragment.constant(f"{name}_back", np.array(scale, np.float16))
        whole = fragment.op("QuantizeLinear", [value, *given], f"{name}_quantized")
        value = fragment.op("DequantizeLinear", [whole, back], f"{name}_dequantized")
        weight = np.random.default_rng(len(outputs)).standard_normal((WIDTH, WIDTH)).astype(np.float16) / 8
        outputs.append(fragment.op("MatMul", [value, fragment.constant(f"{name}_weight", weight)], f"{name}_out"))
    return fragment.model([("sum0", 10), *((name, 10) for name in outputs)])


@pytest.mark.parametrize("quantized", TYPES)
def test_equal_quantizations_of_one_result_are_one(quantized: str) -> None:
    before, model = fused(projections((0.04, 0.04, 0.04), cast=True, quantized=quantized))
    assert [node.op_type for node in before.graph.node].count("QuantizeLinear") == 3
    operators = [node.op_type for node in model.graph]
    assert operators.count(contract.ADD_RMS_NORM_QUANT) == 1
    assert (operators.count("QuantizeLinear"), operators.count("DequantizeLinear")) == (0, 3)
    for one, other in zip(ran(before), ran(ir.to_proto(model)), strict=True):
        assert np.array_equal(one, other)
    without_casts = fused(projections((0.04, 0.04, 0.04), cast=False, quantized=quantized))[1]
    assert [node.op_type for node in without_casts.graph] == operators


@pytest.mark.parametrize("cast", [False, True])
def test_different_quantizations_of_one_result_stay(cast: bool) -> None:
    result = rewrite(ir.from_proto(projections((0.04, 0.04, 0.05), cast)), "plugin")
    fuse_quantized(result, "plugin")
    (row,) = result.quantized
    assert (row.dtype, row.reason) == (None, "its result has 3 readers")
    operators = [node.op_type for node in result.model.graph]
    assert (operators.count(contract.ADD_RMS_NORM), operators.count("QuantizeLinear")) == (1, 3)


def _two_readers(f: Fragment) -> None:
    f.quantize(0, f.norm(0, "x", "residual"))
    f.op("Mul", ["n0", "n0"], "y1")


def _cast_of_two_readers(f: Fragment) -> None:
    f.quantize(0, f.norm(0, "x", "residual"), cast=True)
    f.op("Cast", ["n32_0"], "y1", to=10)


def _output(f: Fragment) -> None:
    f.quantize(0, f.norm(0, "x", "residual"))
    f.op("Identity", ["sum0"], "y1")
    f.outputs = ["n0", "y1"]


def _per_channel(f: Fragment) -> None:
    n = f.norm(0, "x", "residual")
    f.constant("s", np.full(WIDTH, 0.05, np.float16))
    f.op("QuantizeLinear", [n, "s", f.constant("z", np.zeros(WIDTH, np.int8))], "q0", axis=-1)
    f.op("Identity", ["sum0"], "y1")


def _zero_point(f: Fragment) -> None:
    _quantize(f, np.array(3, np.int8))


def _unsigned(f: Fragment) -> None:
    _quantize(f, np.array(0, np.uint8))


def _default_type(f: Fragment) -> None:
    _quantize(f, None)


def _negative(f: Fragment) -> None:
    _quantize(f, np.array(0, np.int8), scale=-0.05)


def _unsaturated(f: Fragment) -> None:
    _quantize(f, np.array(0, ml_dtypes.float8_e4m3fn), saturate=0)


def _quantize(f: Fragment, zero: np.ndarray | None, scale: float = 0.05, **attributes: Any) -> None:
    n = f.norm(0, "x", "residual")
    zeros = [] if zero is None else [f.constant("z", zero)]
    f.op("QuantizeLinear", [n, f.constant("s", np.array(scale, np.float16)), *zeros], "q0", **attributes)
    f.op("Identity", ["sum0"], "y1")


def _computed(f: Fragment) -> None:
    n = f.norm(0, "x", "residual")
    f.constant("first", np.zeros(1, np.int64))
    s = f.op("Abs", [f.op("ReduceMax", ["sum0"], "most", keepdims=0)], "s")
    f.op("QuantizeLinear", [n, s, f.constant("z", np.array(0, np.int8))], "q0")
    f.op("Identity", ["sum0"], "y1")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_two_readers, "its result has 3 readers"),
        (_cast_of_two_readers, "its result has 2 readers"),
        (_output, "its result is also an output of the graph"),
        (_per_channel, "it is quantized by 32 scales, but the kernel supports one for the whole tensor"),
        (_zero_point, "the zero point of its quantization is not 0"),
        (_unsigned, "it is quantized to uint8, but the kernel supports int8 and float8_e4m3"),
        (_default_type, "it is quantized to uint8, but the kernel supports int8 and float8_e4m3"),
        (_negative, "the scale of its quantization is -0.0499878; expected a finite number above 0"),
        (_unsaturated, "it is quantized in blocks, or without saturation"),
        (_computed, "the scale of its quantization is not constant"),
    ],
)
def test_what_is_left_as_it_is(make: Any, reason: str) -> None:
    fragment = Fragment(opset=21)
    fragment.outputs = ["sum0", "y1"]
    make(fragment)
    fragment.op("Identity", ["q0"], "q_out")
    kinds = {v.name: v.data_type for v in fragment.weights}
    out = kinds.get("zero0", kinds.get("z", TensorProto.UINT8))
    proto = fragment.model([(fragment.outputs[0], 10), ("y1", 10), ("q_out", out)])
    result = rewrite(ir.from_proto(proto), "plugin")
    before = ir.to_proto(result.model).SerializeToString()
    fuse_quantized(result, "plugin")
    assert ir.to_proto(result.model).SerializeToString() == before
    (row,) = result.quantized
    assert row.dtype is None
    assert row.reason.startswith(reason)
    assert any(note.startswith("the quantization of layers.0.norm remains a separate node: ") for note in result.notes)


def test_an_opset_that_was_asked_for_stays() -> None:
    result = rewrite(ir.from_proto(two_layers("int8")), "plugin", 20)
    fuse_quantized(result, "plugin", 20)
    assert [row.reason for row in result.quantized] == [
        "the function of a quantized norm requires opset 21, and the requested opset is 20"
    ] * 2
    assert result.model.graph.opset_imports[""] == 20
    other = rewrite(ir.from_proto(two_layers("int8")), "ort")
    fuse_quantized(other, "ort")
    assert other.quantized == []


def hand_made(opset: int, initializers: str = "float s = {0.05}", inputs: str = "") -> ir.Model:
    """The operator as anyone may write it: without notes, and in opset 20 without a function."""
    text = f"""<ir_version: 10, opset_import: ["": {opset}, "rmsnorm_deploy": 1]>
        g (float[n, 4] x{inputs}) => (int8[n, 4] q) <float[4] w = {{1, 1, 1, 1}}, {initializers}> {{
        q = rmsnorm_deploy.RMSNormQuant <epsilon = 1e-5, scale_offset = 0.0, scale_type = 1, quant_type = 3,
            plugin_namespace = "rmsnorm_deploy", plugin_version = "1"> (x, w, s)
    }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


def test_an_operator_of_an_older_opset_is_taken_apart() -> None:
    model = hand_made(20)
    result = rewrite(model, "primitives")
    assert [node.op_type for node in result.model.graph][-1] == "QuantizeLinear"
    assert (result.split, len(result.sites), result.changed) == (1, 1, True)
    assert result.model.graph.opset_imports[""] == 21
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    assert [node.op_type for node in model.graph] == ["RMSNormQuant"]  # the given model is as it was
    assert model.graph.opset_imports[""] == 20


@pytest.mark.parametrize("target", ["primitives", "plugin"])
def test_a_scale_at_run_time_is_left_with_the_reason(target: str) -> None:
    result = rewrite(hand_made(21, "float other = {0.05}", ", float s"), target)
    fuse_quantized(result, target)
    assert [node.op_type for node in result.model.graph] == ["RMSNormQuant"]
    assert [refusal.reason for refusal in result.refusals] == ["its output is quantized"]
    assert (result.sites, result.changed) == ([], False)


@pytest.mark.parametrize("style", ["bare", "ort_trt"])
def test_other_styles_have_no_function(style: Any, tmp_path: Path) -> None:
    onnx.save(two_layers("float8_e4m3"), tmp_path / "model.onnx")
    result = rewrite_model(
        tmp_path / "model.onnx", tmp_path / "out", target="plugin", function=style != "bare", ort_trt=style == "ort_trt"
    )
    assert result.proof is not None
    assert result.proof.verdict == "pass"
    model = onnx.load(result.model)
    domain = contract.ORT_DOMAIN if style == "ort_trt" else contract.DOMAIN
    assert [n.domain for n in model.graph.node if n.op_type == "AddRMSNormQuant"] == [domain] * 2
    assert not model.functions
    back = rewrite_model(result.model, tmp_path / "back", target="primitives")
    assert back.proof is not None
    assert back.proof.verdict == "pass"


def test_a_norm_with_a_quantized_output_is_not_judged(tmp_path: Path) -> None:
    onnx.save(two_layers("int8"), tmp_path / "model.onnx")
    path = rewrite_model(tmp_path / "model.onnx", tmp_path / "out", target="plugin").model
    norms = GraphNorms(path)
    assert norms.norms == {}
    reason = "its output is quantized, so it has no unquantized result to compare"
    assert norms.problems == {"layers.0.norm": reason, "layers.1.norm": reason}
    found = find_graph_norms(ir.load(path))
    assert found.sites == []
    assert [refusal.reason for refusal in found.refusals] == ["its output is quantized"] * 2


def test_inspect_shows_the_norms_in_the_operators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(two_layers("int8"), tmp_path / "model.onnx")
    path = rewrite_model(tmp_path / "model.onnx", tmp_path / "out", target="plugin").model
    assert run(["inspect", str(path), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [site["path"] for site in content["sites"]] == ["layers.0.norm", "layers.1.norm"]
    assert content["refusals"] == []


@pytest.mark.parametrize("op_type", contract.INPUTS)
def test_functions_have_what_the_contract_says(op_type: str) -> None:
    function = plugin_function(op_type)
    assert [value.name for value in function.inputs] == list(contract.INPUTS[op_type])
    assert [value.name for value in function.outputs] == list(contract.OUTPUTS[op_type])
    kinds = {**contract.OPERATOR_ATTRIBUTES[op_type], **contract.PARSER_ATTRIBUTES}
    assert list(function.attributes) == list(kinds)
    last = function.outputs[0].producer()
    assert last is not None
    assert (last.op_type == "QuantizeLinear") == (op_type in contract.UNQUANTIZED)


def captured() -> ir.Model:
    """A captured norm and a QuantizeLinear behind it, as an export of a quantized module has them."""
    x = ir.Value(name="x", shape=ir.Shape(["rows", WIDTH]), type=ir.TensorType(ir.DataType.FLOAT))
    constants = [
        ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                 const_value=ir.Tensor(array, name=name))
        for name, array in (("w", np.ones(WIDTH, np.float32)), ("s", np.array(0.05, np.float32)),
                            ("z", np.array(0, np.int8)))
    ]  # fmt: skip
    spec = NormSpec(eps=1e-5, scale="weight", order="scale_then_cast")
    attributes = {"spec": spec.to_json(), "path": "norm", "width": str(WIDTH)}
    norm = ir.node(NORM_OP, [x, constants[0]], attributes, domain=CAPTURE_DOMAIN, name="norm")
    quantize = ir.node("QuantizeLinear", [norm.outputs[0], *constants[1:]], name="quantize")
    norm.outputs[0].name, norm.outputs[0].type, norm.outputs[0].shape = "n", x.type, x.shape
    quantize.outputs[0].name, quantize.outputs[0].type = "q", ir.TensorType(ir.DataType.INT8)
    graph = ir.Graph(
        [x], [quantize.outputs[0]], nodes=[norm, quantize], initializers=constants,
        opset_imports={"": 18, CAPTURE_DOMAIN: 1}, name="captured",
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


def test_an_exported_norm_is_fused_for_the_plugin_only() -> None:
    lowered, sites = lower(captured(), "plugin")
    assert [(node.op_type, node.name) for node in lowered.graph] == [("RMSNormQuant", sites[0].node)]
    assert lowered.graph.opset_imports[""] == 21
    assert [key[:2] for key in lowered.functions] == [(contract.DOMAIN, contract.RMS_NORM_QUANT)]
    onnx.checker.check_model(ir.to_proto(lowered), full_check=True)
    asked, _ = lower(captured(), "plugin", 20)
    assert [node.op_type for node in asked.graph] == ["RMSNorm", "QuantizeLinear"]
    assert asked.graph.opset_imports[""] == 20
    for target in ("primitives", "standard", "ort"):
        other, _ = lower(captured(), target)
        assert next(reversed(other.graph)).op_type == "QuantizeLinear"


@pytest.mark.parametrize("all_of_them", [False, True])
def test_validation_says_what_it_could_not_check(all_of_them: bool, tmp_path: Path) -> None:
    """The outputs are far off, as 8 bits are; no norm with a quantized output counts as checked."""
    model = build_family("llama", torch.float32)
    export = export_model(model, tmp_path / "model", target="plugin")
    path = export.folder / "model.onnx"
    proto = onnx.load(path)
    norms = [node for node in proto.graph.node if node.op_type in contract.INPUTS]
    chosen = {node.output[0] for node in (norms if all_of_them else norms[1:2])}
    nodes = []
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = f"{name}.back" if name in chosen else name
        nodes.append(node)
        if node.output[0] in chosen:
            name = node.output[0]
            nodes.append(helper.make_node("QuantizeLinear", [name, "qs", "qz"], [f"{name}.q"], f"{name}.quantize"))
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}.q", "qs", "qz"], [f"{name}.back"]))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(0.03), "qs"))
    proto.graph.initializer.append(numpy_helper.from_array(np.int8(0), "qz"))
    onnx.save(proto, path)
    result = rewrite_model(path, tmp_path / "fused", target="plugin")
    assert result.proof is not None
    assert result.proof.verdict == "pass"
    assert result.proof.reason == "no norm was rewritten; the whole model, 2 outputs"
    report = validate(tmp_path / "fused", model)
    assert len(report.norms) == len(norms) - len(chosen)
    assert all(check.passed for check in report.norms)
    unchecked = [note for note in report.notes if "could not be checked alone: its output is quantized" in note]
    assert len(unchecked) == len(chosen)
    inside = [name for segment in report.segments for name in segment.contains]
    assert inside == ([] if all_of_them else ["model.layers.0.post_attention_layernorm"])
    assert not all(verdict.passed for _, verdict in report.rows)
