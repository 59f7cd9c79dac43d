"""Captured norms lowered: the copy, the sites, dtypes and widths, metadata, opsets and styles."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from rmsnorm_deploy.export.from_torch.lower import lower
from rmsnorm_deploy.export.graph.captured_nodes import CAPTURE_DOMAIN
from rmsnorm_deploy.export.graph.metadata import PATH_KEY, SPEC_KEY
from rmsnorm_deploy.models.errors import UnsupportedError, UsageError
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.plugins import contract
from tests.helpers.graphs.capture_graph import GraphMaker, op_counts

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
SPEC = NormSpec(0.125)
WEIGHT = torch.arange(1.0, 9.0)
DIMS = ("n", 8)


def captured(spec: NormSpec = SPEC, metadata: dict[str, str] | None = None) -> ir.Model:
    """`y = norm(-x)`."""
    maker = GraphMaker(FLOAT)
    t = maker.node("Neg", [maker.input("x", DIMS)], "t", DIMS, metadata=metadata)
    y = maker.norm(spec, [t, maker.initializer("weight", WEIGHT)], "y", DIMS, metadata=metadata)
    return maker.model([y])


def captured_residual() -> ir.Model:
    """`sum = a + b; y = norm(sum)`, and the sum goes out too."""
    maker = GraphMaker(FLOAT)
    total = maker.node("Add", [maker.input("a", DIMS), maker.input("b", DIMS)], "sum", DIMS)
    y = maker.norm(SPEC, [total, maker.initializer("weight", WEIGHT)], "y", DIMS)
    return maker.model([y, total])


def test_the_captured_graph_stays_as_it_is() -> None:
    model = captured()
    before = ir.to_proto(model)
    lowered, _ = lower(model, "ort")
    assert ir.to_proto(model) == before
    assert op_counts(lowered) == {"Neg": 1, "SimplifiedLayerNormalization": 1}
    assert lowered.graph.initializers["weight"].const_value is model.graph.initializers["weight"].const_value


def test_nothing_of_the_capture_is_left() -> None:
    lowered, (site,) = lower(captured(), "standard")
    assert CAPTURE_DOMAIN not in lowered.graph.opset_imports
    assert not any(node.domain == CAPTURE_DOMAIN for node in lowered.graph)
    assert (site.path, site.spec, site.form, site.dtype) == ("layers.0.norm", SPEC, "plain", "float32")
    assert site.node in {node.name for node in lowered.graph}


def test_sites_are_in_graph_order_with_their_paths() -> None:
    maker = GraphMaker(FLOAT)
    value = maker.input("x", DIMS)
    for index in range(3):
        value = maker.norm(SPEC.replace(scale="none"), [value], f"y{index}", DIMS, path=f"norms.{index}")
    _, sites = lower(maker.model([value]), "primitives")
    assert [site.path for site in sites] == ["norms.0", "norms.1", "norms.2"]


@pytest.mark.parametrize(
    ("target", "opset", "wanted"),
    [("primitives", None, 20), ("ort", None, 20), ("standard", None, 23), ("ort", 21, 21), ("plugin", None, 20)],
)
def test_opsets(target: str, opset: int | None, wanted: int) -> None:
    assert lower(captured(), target, opset)[0].graph.opset_imports[""] == wanted


def test_refusals() -> None:
    with pytest.raises(UsageError, match="elsewhere"):
        lower(captured(), "elsewhere")
    with pytest.raises(UnsupportedError, match="opset"):
        lower(captured(), "standard", 20)
    with pytest.raises(UsageError, match="plugin"):
        lower(captured(), "ort", style="bare")
    with pytest.raises(UsageError, match=r"plugin style: expected one of .*, got 'not_a_choice'"):
        lower(captured(), "primitives", style="not_a_choice")  # type: ignore[arg-type]


@pytest.mark.parametrize("style", ["function", "bare", "ort_trt"])
def test_styles_of_the_plugin(style: str) -> None:
    lowered, _ = lower(captured(), "plugin", style=style)  # type: ignore[arg-type]
    assert bool(lowered.functions) == (style == "function")
    wanted = contract.ORT_DOMAIN if style == "ort_trt" else contract.DOMAIN
    assert [node.domain for node in lowered.graph if node.op_type == contract.RMS_NORM] == [wanted]


def test_a_residual_add_is_taken_in_by_the_plugin_alone() -> None:
    lowered, (site,) = lower(captured_residual(), "plugin")
    assert (op_counts(lowered), site.form) == ({f"{contract.DOMAIN}::{contract.ADD_RMS_NORM}": 1}, "residual_add")
    assert [value.name for value in lowered.graph.outputs] == ["y", "sum"]
    lowered, (site,) = lower(captured_residual(), "ort")
    assert op_counts(lowered)["Add"] == 1


def test_a_norm_with_a_weight_that_nodes_compute_is_plain() -> None:
    maker = GraphMaker(FLOAT)
    total = maker.node("Add", [maker.input("a", DIMS), maker.input("b", DIMS)], "sum", DIMS)
    weight = maker.node("Neg", [maker.initializer("w", WEIGHT)], "weight", (8,))
    _, (site,) = lower(maker.model([maker.norm(SPEC, [total, weight], "y", DIMS)]), "plugin")
    assert site.form == "plain"


def test_a_norm_whose_captured_result_has_another_dtype_is_refused() -> None:
    """A float16 norm whose captured result says float32: the nodes after it were captured for float32."""
    maker = GraphMaker(HALF)
    y = maker.norm(SPEC.replace(scale="none"), [maker.input("x", DIMS)], "y", DIMS, dtype=FLOAT)
    with pytest.raises(UnsupportedError, match="returns float32, and target ort would return float16"):
        lower(maker.model([y]), "ort")


def test_the_width_that_the_module_was_recognized_with_is_written_into_the_graph() -> None:
    maker = GraphMaker(FLOAT)
    x = maker.input("x", ("n", "m", "k"))
    y = maker.norm(NormSpec(0.125, scale="none", trailing_dims=2), [x], "y", ("n", "m", "k"))
    maker.nodes[-1].attributes["width"] = ir.AttrString("width", "2x8")
    lowered, _ = lower(maker.model([y]), "primitives")
    assert lowered.graph.inputs[0].shape == ir.Shape(["n", 2, 8])


def test_a_width_does_no_harm_where_the_rank_is_unknown() -> None:
    maker = GraphMaker(FLOAT)
    x = maker.input("x", DIMS)
    x.shape = None
    y = maker.norm(SPEC.replace(scale="none"), [x], "y", DIMS)
    maker.nodes[-1].attributes["width"] = ir.AttrString("width", "8")
    lowered, _ = lower(maker.model([y]), "primitives")
    assert lowered.graph.inputs[0].shape is None


def captured_quantized() -> ir.Model:
    """`y = QuantizeLinear(norm(x))`, to int8."""
    maker = GraphMaker(FLOAT)
    norm = maker.norm(SPEC, [maker.input("x", DIMS), maker.initializer("weight", WEIGHT)], "norm", DIMS)
    scale, zero = maker.initializer("scale", torch.tensor(0.5)), maker.value("zero", (), ir.DataType.INT8)
    zero.const_value = ir.tensor(np.zeros((), np.int8), name="zero")
    maker.initializers.append(zero)
    return maker.model([maker.node("QuantizeLinear", [norm, scale, zero], "y", DIMS, dtype=ir.DataType.INT8)])


@pytest.mark.parametrize(
    ("target", "opset", "operators", "raised"),
    [
        ("plugin", None, {f"{contract.DOMAIN}::{contract.RMS_NORM_QUANT}": 1}, 21),
        ("plugin", 20, {f"{contract.DOMAIN}::{contract.RMS_NORM}": 1, "QuantizeLinear": 1}, 20),
        ("ort", None, {"SimplifiedLayerNormalization": 1, "QuantizeLinear": 1}, 20),
    ],
)
def test_a_quantization_becomes_part_of_the_plugins_operator_where_the_opset_may_rise(
    target: str, opset: int | None, operators: dict[str, int], raised: int
) -> None:
    lowered, _ = lower(captured_quantized(), target, opset)
    assert op_counts(lowered) == operators
    assert lowered.graph.opset_imports[""] == raised


def test_a_norm_whose_input_has_no_dtype_is_an_error() -> None:
    maker = GraphMaker(FLOAT)
    x = maker.input("x", DIMS)
    y = maker.norm(SPEC.replace(scale="none"), [x], "y", DIMS)
    x.type = None
    with pytest.raises(ValueError, match=r"norm 'layers\.0\.norm': expected an input with a known dtype"):
        lower(maker.model([y]), "ort")


def test_source_paths_of_the_exporting_machine_are_dropped_and_other_notes_kept() -> None:
    notes = {"pkg.torch.onnx.stack_trace": "File /home/me", "pkg.torch.onnx.fx_node": "n", "pkg.own": "kept"}
    lowered, _ = lower(captured(metadata=notes), "primitives")
    assert len(lowered.graph) > 3
    for node in lowered.graph:
        assert set(notes) & set(node.metadata_props) == {"pkg.own"}
    core = [node for node in lowered.graph if SPEC_KEY in node.metadata_props]
    assert [node.metadata_props[PATH_KEY] for node in core] == ["layers.0.norm"]


def test_initializers_that_nothing_reads_are_dropped_unless_they_are_inputs() -> None:
    maker = GraphMaker(FLOAT)
    x = maker.input("x", DIMS)
    maker.initializer("unread", WEIGHT)
    default = maker.initializer("default", WEIGHT)
    maker.inputs.append(default)
    y = maker.norm(SPEC, [x, maker.initializer("weight", WEIGHT)], "y", DIMS)
    lowered, _ = lower(maker.model([y]), "standard")
    assert sorted(lowered.graph.initializers) == ["default", "weight"]
