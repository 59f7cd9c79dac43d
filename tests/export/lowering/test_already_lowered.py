"""Whether the nodes that would be written stand in the graph already: the same operators, attributes and constants."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from rmsnorm_deploy.export.lowering.already_lowered import counterparts

X = ir.Value(name="x", shape=ir.Shape([2, 8]), type=ir.TensorType(ir.DataType.FLOAT))
OTHER = ir.Value(name="other", shape=ir.Shape([2, 8]), type=ir.TensorType(ir.DataType.FLOAT))


def number(value: float = 0.5, dtype: Any = np.float32, shape: tuple[int, ...] = ()) -> ir.Value:
    array = np.full(shape, value, dtype)
    return ir.Value(
        name="c", shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array),
    )  # fmt: skip


def chain(
    x: ir.Value | None = X, constant: ir.Value | None = None, op_type: str = "Add", domain: str = "", **attributes: Any
) -> list[ir.Node]:
    """`reduce(x * x) op constant`."""
    square = ir.node("Mul", [x, x])
    reduce = ir.node("ReduceMean", [square.outputs[0]], attributes)
    return [
        square,
        reduce,
        ir.node(op_type, [reduce.outputs[0], constant if constant is not None else number()], domain=domain),
    ]


def match(written: list[ir.Node], there: list[ir.Node]) -> dict[ir.Node, ir.Node] | None:
    return counterparts(written, written[-1].outputs[0], there[-1].outputs[0])


def test_each_node_is_matched_with_its_counterpart() -> None:
    written, there = chain(), chain()
    assert match(written, there) == dict(zip(written, there, strict=True))


@pytest.mark.parametrize(
    "there",
    [
        chain(keepdims=1),
        chain(noop_with_empty_axes=0),
        chain(domain="ai.onnx"),
        chain(constant=ir.node("Constant", [], {"value": ir.tensor(np.array(0.5, np.float32))}).outputs[0]),
    ],
    ids=["default attribute", "another default", "the domain's other name", "constant node"],
)
def test_what_means_the_same_is_the_same(there: list[ir.Node]) -> None:
    assert match(chain(), there) is not None


@pytest.mark.parametrize(
    "there",
    [
        chain(OTHER),
        chain(op_type="Sub"),
        chain(domain="elsewhere"),
        chain(keepdims=0),
        chain(constant=number(0.25)),
        chain(constant=number(dtype=np.float64)),
        chain(constant=number(shape=(1,))),
        chain(constant=OTHER),
        chain(None),
    ],
    ids=["input", "operator", "domain", "attribute", "number", "dtype", "shape", "no constant", "missing input"],
)
def test_one_difference_is_enough(there: list[ir.Node]) -> None:
    assert match(chain(), there) is None


def test_floats_are_compared_as_float32() -> None:
    def norm(epsilon: float) -> list[ir.Node]:
        return [ir.node("RMSNormalization", [X, OTHER], {"epsilon": epsilon})]

    assert match(norm(1e-6), norm(float(np.float32(1e-6)))) is not None
    assert match(norm(1e-5), [ir.node("RMSNormalization", [X, OTHER])]) is not None
    assert match(norm(1e-6), [ir.node("RMSNormalization", [X, OTHER])]) is None


def test_another_output_is_another_value() -> None:
    written = [ir.node("Split", [X], num_outputs=2)]
    there = [ir.node("Split", [X], num_outputs=2)]
    assert counterparts(written, written[0].outputs[1], there[0].outputs[1]) == {written[0]: there[0]}
    assert counterparts(written, written[0].outputs[0], there[0].outputs[1]) is None


def test_all_written_nodes_must_be_there() -> None:
    written = [*chain(), ir.node("Neg", [X])]
    assert counterparts(written, written[2].outputs[0], chain()[-1].outputs[0]) is None


def test_a_node_has_one_counterpart() -> None:
    """`a * a` is not `b * c` with b and c made alike."""
    a, b, c = (ir.node("Neg", [X]) for _ in range(3))
    one = ir.node("Mul", [a.outputs[0], a.outputs[0]])
    two = ir.node("Mul", [b.outputs[0], c.outputs[0]])
    assert match([a, one], [b, c, two]) is None


def test_other_counts_of_inputs_differ() -> None:
    assert match([ir.node("Op", [X])], [ir.node("Op", [X, X])]) is None


def test_an_input_of_the_graph_is_no_counterpart() -> None:
    written = chain()
    assert counterparts(written, written[-1].outputs[0], X) is None
