"""The builder of nodes: dtypes, shapes, shared constants, promotion, and that nothing stays when it is taken back."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from rmsnorm_deploy.export.graph.constants import HALF_TYPES, constant
from rmsnorm_deploy.export.graph.metadata import ONES
from rmsnorm_deploy.export.lowering.builder import Builder, promote

FLOAT, HALF, BFLOAT, DOUBLE = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE


class Place:
    """A graph `y = Neg(x)` and builders for it."""

    def __init__(self, dtype: ir.DataType = FLOAT) -> None:
        self.x = ir.Value(name="x", shape=ir.Shape(["n", 8]), type=ir.TensorType(dtype))
        self.last = ir.node("Neg", [self.x], name="last")
        self.root = ir.Graph([self.x], [self.last.outputs[0]], nodes=[self.last], opset_imports={"": 18})
        self.constants: dict[Any, ir.Value] = {}

    def builder(self, metadata: dict[str, str] | None = None) -> Builder:
        return Builder(self.root, self.root, metadata or {}, self.constants, 18)


def test_op_gives_every_output_dtype_and_shape_and_every_node_the_metadata() -> None:
    place = Place()
    builder = place.builder({"key": "text"})
    first = builder.op("Split", [place.x], {"axis": 1}, dtype=HALF, shape=ir.Shape(["n", 4]), outputs=2, domain="d")
    (node,) = builder.nodes
    assert (node.op_type, node.domain, node.attributes["axis"].as_int()) == ("Split", "d", 1)
    assert node.metadata_props == {"key": "text"}
    assert first is node.outputs[0]
    assert [(o.dtype, o.shape) for o in node.outputs] == [(HALF, ir.Shape(["n", 4]))] * 2
    assert node.outputs[0].shape is not node.outputs[1].shape
    second = builder.op("Neg", [first], dtype=FLOAT, shape=None)
    assert (second.shape, len(builder.nodes[1].outputs)) == (None, 1)


def test_nodes_come_into_the_graph_with_insert_before_in_order() -> None:
    place = Place()
    builder = place.builder()
    a = builder.op("Abs", [place.x], dtype=FLOAT, shape=place.x.shape)
    builder.op("Sqrt", [a], dtype=FLOAT, shape=place.x.shape)
    assert [node.op_type for node in place.root] == ["Neg"]
    builder.insert_before(place.last)
    assert [node.op_type for node in place.root] == ["Abs", "Sqrt", "Neg"]


def test_equal_constants_are_made_once_in_the_main_graph() -> None:
    place = Place()
    one, other = place.builder(), place.builder()
    a = one.constant(np.array(1e-6), FLOAT, "eps")
    b = other.constant(np.array(1e-6, np.float32), FLOAT, "another name")
    assert a is b
    assert place.root.initializers == {"rmsnorm_deploy.eps.float": a}
    array = constant(a)
    assert array is not None
    assert (array.dtype, array.shape, float(array)) == (np.float32, (), float(np.float32(1e-6)))


@pytest.mark.parametrize(
    ("array", "dtype"),
    [(np.array(1e-6), HALF), (np.array([1e-6]), FLOAT), (np.array(2e-6), FLOAT), (np.array(1e-6), DOUBLE)],
)
def test_constants_that_differ_in_value_shape_or_dtype_are_two(array: np.ndarray, dtype: ir.DataType) -> None:
    place = Place()
    builder = place.builder()
    a, b = builder.constant(np.array(1e-6), FLOAT, "eps"), builder.constant(array, dtype, "eps")
    assert a is not b
    assert len(place.root.initializers) == 2
    assert a.name != b.name


def test_zero_and_minus_zero_are_two_constants() -> None:
    builder = Place().builder()
    assert builder.constant(np.array(0.0), FLOAT, "c") is not builder.constant(np.array(-0.0), FLOAT, "c")


def test_names_of_constants_are_free_and_do_not_grow() -> None:
    place = Place()
    builder = place.builder()
    names = [builder.constant(np.array(float(number)), FLOAT, "eps").name for number in range(3)]
    assert names == ["rmsnorm_deploy.eps.float", "rmsnorm_deploy.eps.float.1", "rmsnorm_deploy.eps.float.2"]
    again = builder.constant(np.array(7.0), HALF, str(names[2]))
    assert again.name == "rmsnorm_deploy.eps.float16"
    deep = builder.constant(np.array(8.0), FLOAT, "rmsnorm_deploy.layers.0.weight.float16.3")
    assert deep.name == "rmsnorm_deploy.layers.0.weight.float"
    assert builder.constant(np.ones(8), FLOAT, ONES).name == "rmsnorm_deploy.ones.float"


def test_cast() -> None:
    place = Place(HALF)
    builder = place.builder()
    assert builder.cast(place.x, HALF) is place.x
    number = builder.constant(np.array(0.5), FLOAT, "half")
    converted = builder.cast(number, HALF)
    assert builder.nodes == []
    assert (converted.dtype, converted.is_initializer()) == (HALF, True)
    cast = builder.cast(place.x, FLOAT)
    (node,) = builder.nodes
    assert (node.op_type, node.attributes["to"].as_int(), cast.dtype) == ("Cast", int(FLOAT), FLOAT)
    assert cast.shape == place.x.shape


@pytest.mark.parametrize(
    ("a", "b", "result"),
    [
        (FLOAT, FLOAT, FLOAT),
        (HALF, HALF, HALF),
        (HALF, FLOAT, FLOAT),
        (BFLOAT, FLOAT, FLOAT),
        (HALF, BFLOAT, FLOAT),
        (FLOAT, DOUBLE, DOUBLE),
        (BFLOAT, DOUBLE, DOUBLE),
    ],
)
def test_promotion_is_pytorchs(a: ir.DataType, b: ir.DataType, result: ir.DataType) -> None:
    import torch

    kinds = {FLOAT: torch.float32, HALF: torch.float16, BFLOAT: torch.bfloat16, DOUBLE: torch.float64}
    assert promote(a, b) == promote(b, a) == result
    assert torch.promote_types(kinds[a], kinds[b]) == kinds[result]


def test_promotion_needs_dtypes() -> None:
    with pytest.raises(ValueError, match="has no dtype"):
        promote(None, FLOAT)
    with pytest.raises(ValueError, match="has no dtype"):
        promote(FLOAT, None)


def test_binary_casts_the_narrower_side() -> None:
    place = Place(HALF)
    builder = place.builder()
    wide = builder.op("Cast", [place.x], {"to": FLOAT}, dtype=FLOAT, shape=place.x.shape)
    y = builder.binary("Mul", place.x, wide, place.x.shape)
    assert [node.op_type for node in builder.nodes] == ["Cast", "Cast", "Mul"]
    assert y.dtype == FLOAT
    product = y.producer()
    assert product is not None
    assert [value.dtype for value in product.inputs if value is not None] == [FLOAT, FLOAT]


def test_withdraw_takes_back_nodes_uses_and_its_own_constants() -> None:
    place = Place()
    kept = place.builder().constant(np.array(1.0), FLOAT, "kept")
    builder = place.builder()
    shared = builder.constant(np.array(1.0), FLOAT, "kept")
    builder.op("Add", [place.x, builder.constant(np.array(2.0), FLOAT, "two")], dtype=FLOAT, shape=None)
    builder.op("Add", [builder.nodes[0].outputs[0], shared], dtype=FLOAT, shape=None)
    builder.withdraw()
    assert builder.nodes == []
    assert list(place.root.initializers.values()) == [kept]
    assert [use.node for use in place.x.uses()] == [place.last]
    assert kept.uses() == ()
    two = place.builder().constant(np.array(2.0), FLOAT, "two")
    assert place.root.initializers["rmsnorm_deploy.two.float"] is two


def test_half_types() -> None:
    assert set(HALF_TYPES) == {HALF, BFLOAT}
