"""Operators that are a whole norm: what each says it computes, and which are refused."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from rmsnorm_deploy.export.recognition.fused_ops import FUSED, OTHER_PLUGIN, QUANTIZED_OUTPUT, fused_norm
from rmsnorm_deploy.export.recognition.terms import Normed
from rmsnorm_deploy.plugins import contract

HALF, FLOAT, DOUBLE = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE
ONNX, ORT = ("", "RMSNormalization"), ("com.microsoft", "SimplifiedLayerNormalization")
OURS, TRT = (contract.DOMAIN, contract.RMS_NORM), (contract.ORT_DOMAIN, contract.RMS_NORM)


def value(name: str, shape: list[int] | None, dtype: ir.DataType | None) -> ir.Value:
    return ir.Value(
        name=name, shape=None if shape is None else ir.Shape(shape),
        type=None if dtype is None else ir.TensorType(dtype),
    )  # fmt: skip


def node(
    kind: tuple[str, str], dtype: ir.DataType | None = FLOAT, shape: list[int] | None = [2, 3, 8],  # noqa: B006
    scale: ir.Value | None = None, out: ir.DataType | None = None, outputs: int = 1, **attributes: Any,
) -> ir.Node:  # fmt: skip
    scale = scale if scale is not None else value("scale", [8], dtype)
    made = ir.node(kind[1], [value("x", shape, dtype), scale], attributes, domain=kind[0], num_outputs=outputs)
    made.outputs[0].dtype = dtype if out is None else out
    return made


def read(made: ir.Node) -> Normed | str | None:
    return fused_norm(made, lambda value: value)


def steps(found: Normed | str | None) -> list[tuple[str, ir.DataType]]:
    assert isinstance(found, Normed)
    return [(step.kind, step.dtype) for step in found.steps]


def test_the_table_has_every_operator_and_no_composite() -> None:
    assert {ONNX, ORT, ("", "SimplifiedLayerNormalization"), OURS, TRT} <= FUSED
    assert not any(op_type == contract.ADD_RMS_NORM for _, op_type in FUSED)
    assert all((contract.DOMAIN, op_type) in FUSED for op_type in contract.UNQUANTIZED)


@pytest.mark.parametrize("kind", [ONNX, ORT, ("", "SimplifiedLayerNormalization")])
def test_a_float32_norm(kind: tuple[str, str]) -> None:
    made = node(kind, epsilon=0.25)
    found = read(made)
    assert isinstance(found, Normed)
    assert (found.value, found.root, found.operand) == (made.outputs[0], made.inputs[0], made.inputs[0])
    assert (found.eps, found.coefficient, found.axes, found.divided) == (0.25, 1.0, 1, True)
    assert (found.half, found.factor_half, found.offset) == (False, False, 0.0)
    assert (found.reduce, found.nodes) == (made, (made,))
    assert steps(found) == [("scale", FLOAT)]
    assert found.steps[0].operand is made.inputs[1]


def test_epsilon_is_1e_5_where_it_is_left_out() -> None:
    found = read(node(ONNX))
    assert isinstance(found, Normed)
    assert found.eps == 1e-5


@pytest.mark.parametrize(("axis", "axes"), [(-1, 1), (-2, 2), (2, 1), (1, 2), (0, 3)])
def test_axis(axis: int, axes: int) -> None:
    found = read(node(ONNX, axis=axis, scale=value("scale", [2, 3, 8][3 - axes :], FLOAT)))
    assert isinstance(found, Normed)
    assert found.axes == axes


def test_onnx_rounds_a_half_type_before_the_scale() -> None:
    assert steps(read(node(ONNX, HALF))) == [("cast", HALF), ("scale", HALF)]


def test_onnx_scales_in_float32_where_the_scale_is_float32() -> None:
    made = node(ONNX, HALF, scale=value("scale", [8], FLOAT), out=FLOAT)
    assert steps(read(made)) == [("scale", FLOAT)]


def test_onnx_runtime_scales_a_half_type_in_float32() -> None:
    assert steps(read(node(ORT, HALF))) == [("scale", FLOAT), ("cast", HALF)]


@pytest.mark.parametrize(
    ("scale_type", "wanted"),
    [(FLOAT, [("scale", FLOAT), ("cast", HALF)]), (HALF, [("cast", HALF), ("scale", HALF)])],
)
def test_our_operator_says_where_it_rounds(scale_type: ir.DataType, wanted: list[tuple[str, ir.DataType]]) -> None:
    attributes = {"plugin_namespace": contract.PLUGIN_NAMESPACE, "scale_type": int(scale_type)}
    assert steps(read(node(OURS, HALF, **attributes))) == wanted


def test_our_plugin_is_read_in_the_domain_of_onnx_runtime_too() -> None:
    found = read(node(TRT, epsilon=0.25, plugin_namespace=contract.PLUGIN_NAMESPACE))
    assert isinstance(found, Normed)
    assert found.eps == 0.25


def test_our_operator_may_add_one_to_its_scale() -> None:
    found = read(node(OURS, plugin_namespace=contract.PLUGIN_NAMESPACE, scale_offset=1.0))
    assert isinstance(found, Normed)
    assert found.offset == 1.0


def test_a_scale_of_ones_is_no_scale() -> None:
    ones = value("ones", [8], FLOAT)
    ones.const_value = ir.tensor([1.0] * 8)
    assert steps(read(node(ONNX, scale=ones))) == []
    found = read(node(OURS, scale=ones, plugin_namespace=contract.PLUGIN_NAMESPACE, scale_offset=1.0))
    assert steps(found) == [("scale", FLOAT)]


def test_float64_is_computed_in_float64() -> None:
    found = read(node(ONNX, DOUBLE))
    assert isinstance(found, Normed)
    assert found.inner == DOUBLE


def test_an_output_without_dtype_gets_the_one_that_the_operator_gives() -> None:
    onnx, ort = node(ONNX, HALF, scale=value("scale", [8], FLOAT)), node(ORT, HALF)
    for made in (onnx, ort):
        made.outputs[0].type = None
        read(made)
    assert (onnx.outputs[0].dtype, ort.outputs[0].dtype) == (FLOAT, HALF)


@pytest.mark.parametrize("dtype", [None, ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN])
def test_an_input_of_another_dtype_is_no_norms(dtype: ir.DataType | None) -> None:
    assert read(node(ONNX, dtype)) is None


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (node(TRT, plugin_namespace="someone.else"), OTHER_PLUGIN),
        (node(TRT), OTHER_PLUGIN),
        (node((contract.DOMAIN, next(iter(contract.UNQUANTIZED))), plugin_namespace=contract.PLUGIN_NAMESPACE),
         QUANTIZED_OUTPUT),
        (node(ONNX, shape=None, axis=1), "the rank of its input is unknown"),
        (node(ONNX, axis=-4), "its axis is out of range for the rank of its input"),
        (node(ONNX, axis=3), "its axis is out of range for the rank of its input"),
        (node(ONNX, shape=None, axis=-9), "its axis is out of range for the rank of its input"),
        (node(ONNX, scale=value("scale", [3], FLOAT)), "the shape of its scale differs"),
        (node(OURS, plugin_namespace=contract.PLUGIN_NAMESPACE, scale_offset=0.5), "it adds 0.5 to its scale"),
        (node(ONNX, stash_type=int(HALF)), "its statistics have a half type"),
    ],
)  # fmt: skip
def test_refusals(made: ir.Node, reason: str) -> None:
    found = read(made)
    assert isinstance(found, str)
    assert reason in found


def test_statistics_that_are_read_are_refused() -> None:
    made = node(ORT, outputs=2)
    assert isinstance(read(made), Normed)
    ir.node("Neg", [made.outputs[1]])
    assert read(made) == "its statistics have a half type, or are used elsewhere"


@pytest.mark.parametrize("epsilon", [float("nan"), float("inf"), -1.0])
def test_an_epsilon_that_no_norm_has(epsilon: float) -> None:
    assert read(node(ONNX, epsilon=epsilon)) == f"its epsilon is {epsilon:g}, expected a finite number of at least 0"


def test_statistics_that_are_an_output_of_the_graph() -> None:
    made = node(("", "SimplifiedLayerNormalization"), outputs=2)
    assert isinstance(read(made), Normed)
    ir.Graph(list(made.inputs), [made.outputs[0], made.outputs[1]], nodes=[made])
    assert read(made) == "its statistics have a half type, or are used elsewhere"
