"""The heads of a token in one row: which nodes are read past, and which are not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import reference

from rmsnorm_deploy.export.lowering.builder import Builder
from rmsnorm_deploy.export.lowering.head_layout import rows_of
from tests.helpers.graphs.capture_graph import DATA_TYPES, GraphMaker

OPSET = 23


def shape_of(maker, *sizes):
    value = maker.value("sizes", [len(sizes)], ir.DataType.INT64)
    value.const_value = ir.Tensor(np.array(sizes), name="sizes")
    maker.initializers.append(value)
    return value


def rows(maker, given, value):
    """The operators that `rows_of` leaves between the input and its result, and that result for an array."""
    made = ir.Model(maker.graph([value]), ir_version=10)
    made.graph.opset_imports[""] = OPSET
    builder = Builder(made.graph, made.graph, {}, {}, OPSET)
    result = rows_of(value, builder)
    for node in builder.nodes:
        made.graph.append(node)
    before = next(iter(reference.ReferenceEvaluator(ir.to_proto(made)).run(None, given)))
    made.graph.outputs.clear()
    made.graph.outputs.append(result)
    proto = ir.to_proto(ir.Model(ir.convenience.extract(made.graph, made.graph.inputs, [result]), ir_version=10))
    after = next(iter(reference.ReferenceEvaluator(proto).run(None, given)))
    wanted = before.transpose(0, 2, 1, 3).reshape(before.shape[0], before.shape[2], -1)
    np.testing.assert_array_equal(after, wanted)
    return [node.op_type for node in proto.graph.node]


def numbers(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def turned(maker, heads, shape):
    return maker.node("Transpose", [heads], "turned", shape, {"perm": [0, 2, 1, 3]})


def test_a_projection_is_read_itself():
    maker = GraphMaker(DATA_TYPES[torch.float32])
    x = maker.input("x", ["b", "s", 12])
    projected = maker.node("Neg", [x], "projected", ["b", "s", 12])
    heads = maker.node("Reshape", [projected, shape_of(maker, 0, 0, 3, 4)], "heads", ["b", "s", 3, 4])
    assert rows(maker, {"x": numbers(2, 5, 12)}, turned(maker, heads, ["b", 3, "s", 4])) == ["Neg"]


def test_what_has_an_axis_of_heads_is_joined():
    maker = GraphMaker(DATA_TYPES[torch.float32])
    heads = maker.node("Neg", [maker.input("x", ["b", "s", 3, 4])], "heads", ["b", "s", 3, 4])
    assert rows(maker, {"x": numbers(2, 5, 3, 4)}, turned(maker, heads, ["b", 3, "s", 4])) == ["Neg", "Reshape"]


@pytest.mark.parametrize("known", [True, False])
def test_a_reshape_that_may_mix_rows_is_not_read_past(known):
    """Two tokens of one row become one token of two rows: the number of elements of a token is the same."""
    maker = GraphMaker(DATA_TYPES[torch.float32])
    x = maker.input("x", ["b", "s", 12])
    projected = maker.node("Neg", [x], "projected", ["b", "s", 12])
    shape = ["c", "t", 3, 4] if known else [None, None, 3, 4]
    heads = maker.node("Reshape", [projected, shape_of(maker, 4, -1, 3, 4)], "heads", shape)
    found = rows(maker, {"x": numbers(2, 6, 12)}, turned(maker, heads, [shape[0], 3, shape[1], 4]))
    assert found == ["Neg", "Reshape", "Reshape"]


def test_another_transpose_stays():
    maker = GraphMaker(DATA_TYPES[torch.float32])
    x = maker.input("x", ["b", 3, "s", 4])
    other = maker.node("Transpose", [x], "other", ["b", 3, "s", 4], {"perm": [0, 1, 2, 3]})
    assert rows(maker, {"x": numbers(2, 3, 5, 4)}, other) == ["Transpose", "Transpose", "Reshape"]


@pytest.mark.parametrize("rotated", [8, 4])
def test_a_rotary_embedding_reads_the_projection(rotated):
    maker = GraphMaker(DATA_TYPES[torch.float32])
    x = maker.input("x", ["b", "s", 24])
    caches = [maker.input(name, ["b", "s", rotated // 2]) for name in ("cos", "sin")]
    projected = maker.node("Neg", [x], "projected", ["b", "s", 24])
    heads = maker.node("Reshape", [projected, shape_of(maker, 0, 0, 3, 8)], "heads", ["b", "s", 3, 8])
    attributes = {} if rotated == 8 else {"rotary_embedding_dim": rotated}
    y = maker.node(
        "RotaryEmbedding", [turned(maker, heads, ["b", 3, "s", 8]), *caches], "y", ["b", 3, "s", 8], attributes
    )
    given = {"x": numbers(2, 5, 24), "cos": numbers(2, 5, rotated // 2), "sin": numbers(2, 5, rotated // 2)}
    assert rows(maker, given, y) == ["Neg", "RotaryEmbedding"]
