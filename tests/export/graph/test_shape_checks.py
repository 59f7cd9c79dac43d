"""Questions about the nodes around a norm, each with a yes and its near misses."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from rmsnorm_deploy.export.graph import shape_checks
from rmsnorm_deploy.export.graph.infer_types import fill_types
from tests.helpers.graphs.onnx_text import parsed, values

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
Dims = list[int | str | None] | None


def value(shape: Dims, dtype: ir.DataType | None = FLOAT) -> ir.Value:
    return ir.Value(
        name="v", shape=None if shape is None else ir.Shape(shape), type=None if dtype is None else ir.TensorType(dtype)
    )


def read(body: str, inputs: str = "float[2, 3, 8] x", opset: int = 18) -> dict[str, ir.Value]:
    model = parsed(f"g ({inputs}) => (bool[2, 3, 8] o) <float one = {{1.0}}, int64[1] last = {{-1}}, "
                   f"float[1, 1, 1, 1] deep = {{1.0}}> {{ {body} o = IsNaN (x) }}", opset)  # fmt: skip
    fill_types(model)
    return values(model)


def producer(by_name: dict[str, ir.Value], name: str) -> ir.Node:
    node = by_name[name].producer()
    assert node is not None
    return node


def test_unreshaped() -> None:
    by_name = read("t = Constant <value_ints = [6, 8]> ()  y = Reshape (x, t)  n = Neg (y)")
    assert shape_checks.unreshaped(by_name["y"]) is by_name["x"]
    assert shape_checks.unreshaped(by_name["n"]) is None
    assert shape_checks.unreshaped(by_name["x"]) is None


@pytest.mark.parametrize(
    ("before", "target", "back"),
    [
        ("float[2, 3, 8] z", "t = Constant <value_ints = [2, 3, 8]> ()", True),
        ("float[2, 3, 8] z", "t = Constant <value_ints = [3, 2, 8]> ()", False),
        ("float[2, 3, 8] z", "t = Constant <value_ints = [6, 8]> ()", False),
        ("float[n, 3, 8] z", "t = Shape (z)", True),
        ("float[n, 3, 8] z", "t = Constant <value_ints = [-1, 3, 8]> ()", True),
        ("float[n, 4, 6] z", "t = Constant <value_ints = [-1, 3, 8]> ()", False),
        ("float[n, m, 8] z", "t = Shape (z)", True),
        ("float[n, m, 8] z", "t = Constant <value_ints = [-1, 6, 8]> ()", False),
        ("float[n, m, 8] z", "k = Neg (z)  t = Shape (k)", True),
        ("float[n, m, 8] z, float[p, q, 8] w", "t = Shape (w)", False),
    ],
)
def test_reshapes_back(before: str, target: str, back: bool) -> None:
    by_name = read(f"{target}  f = Constant <value_ints = [-1, 4]> ()  g = Reshape (z, f)  y = Reshape (g, t)",
                   f"float[2, 3, 8] x, {before}")  # fmt: skip
    assert shape_checks.reshapes_back(producer(by_name, "y"), by_name["z"], lambda v: v) is back


@pytest.mark.parametrize(
    ("body", "subtracts"),
    [
        ("m = ReduceMean (x, last)  y = Sub (x, m)", True),
        ("m = ReduceMean (x, last)  k = Neg (m)  y = Add (k, x)", True),
        ("m = ReduceMean (x, last)  k = Sub (x, m)  y = Identity (k)", True),
        ("m = ReduceMean (x, last)  k = Sub (x, m)  l = Cast <to = 11> (k)  y = Cast <to = 1> (l)", True),
        ("y = Sub (x, one)", False),
        ("y = Sub (x, v)", True),
        ("y = Add (x, x)", False),
        ("m = ReduceMean (x, last)  y = Mul (x, m)", False),
        ("m = ReduceMean (x, last)  y = Sub (m, x)", False),
        ("y = Neg (x)", False),
    ],
)
def test_subtracts_mean(body: str, subtracts: bool) -> None:
    by_name = read(body, "float[2, 3, 8] x, float[2, 3, 1] v")
    assert shape_checks.subtracts_mean(by_name["y"]) is subtracts


def test_a_mean_of_unknown_shape_is_known_by_its_reduce_node() -> None:
    by_name = read("m = ReduceMean (x, last)  k = Mul (m, one)  y = Sub (x, k)  z = Sub (x, x)")
    by_name["k"].shape = None
    assert shape_checks.subtracts_mean(by_name["y"])
    by_name["x"].shape = None
    assert not shape_checks.subtracts_mean(by_name["z"])


@pytest.mark.parametrize(
    ("shape", "like", "axes", "fitting"),
    [
        ([8], [2, 3, 8], 1, True),
        ([1, 8], [2, 3, 8], 1, True),
        ([1, 1, 8], ["n", "m", 8], 1, True),
        ([3, 8], [2, 3, 8], 2, True),
        ([1, 3, 8], [2, 3, 8], 2, True),
        ([], [2, 3, 8], 1, True),
        ([1], [2, 3, 8], 1, True),
        ([1, 1, 1], [2, 3, 8], 1, True),
        ([1, 1, 1, 1], [2, 3, 8], 1, False),
        ([1, 1, 1, 8], [2, 3, 8], 1, False),
        ([4], [2, 3, 8], 1, False),
        ([3, 1], [2, 3, 8], 1, False),
        ([3, 8], [2, 3, 8], 1, False),
        ([8], [2, 3, 8], 2, False),
        (["n"], [2, 3, "n"], 1, False),
        (None, [2, 3, 8], 1, False),
        ([8], None, 1, True),
        ([8], None, 2, False),
        ([1], None, 1, True),
        ([1, 1], None, 1, False),
    ],
)
def test_fits(shape: Dims, like: Dims, axes: int, fitting: bool) -> None:
    assert shape_checks.fits(value(shape), value(like), axes) is fitting
    assert not shape_checks.fits(value(shape, ir.DataType.INT32), value(like), axes)
    assert not shape_checks.fits(None, value(like), axes)


@pytest.mark.parametrize(
    ("shape", "like", "axes", "may"),
    [
        ([8], [2, 3, 8], 1, True),
        (None, [2, 3, 8], 1, True),
        (["w"], [2, 3, 8], 1, True),
        ([8], [2, 3, "w"], 1, True),
        ([3, "w"], [2, 3, 8], 2, True),
        ([4, "w"], [2, 3, 8], 2, False),
        ([4], [2, 3, 8], 1, False),
        ([3, 8], None, 2, True),
        ([3, 8], None, 1, False),
    ],
)
def test_may_fit(shape: Dims, like: Dims, axes: int, may: bool) -> None:
    assert shape_checks.may_fit(value(shape), value(like), axes) is may


@pytest.mark.parametrize(
    ("body", "raises"),
    [
        ("y = Mul (x, deep)", True),
        ("y = Add (deep, x)", True),
        ("y = Mul (x, one)", False),
        ("c = Constant <value = float[1, 1, 1] {2.0}> ()  y = Div (x, c)", False),
        ("c = Constant <value = float[1, 1, 1] {2.0}> ()  r = Constant <value_ints = [6, 8]> ()  k = Reshape (x, r)"
         "  y = Div (k, c)", True),
        ("y = Neg (x)", False),
        ("y = MatMul (x, deep)", False),
    ],
)  # fmt: skip
def test_raises_rank(body: str, raises: bool) -> None:
    assert shape_checks.raises_rank(producer(read(body), "y")) is raises


def test_a_constant_of_rank_two_may_raise_an_unknown_rank() -> None:
    by_name = read("c = Constant <value = float[1, 1] {2.0}> ()  y = Mul (x, c)")
    by_name["x"].shape = None
    assert shape_checks.raises_rank(producer(by_name, "y"))


def test_both_ways_and_the_other_input() -> None:
    a, b = value([8]), value([8])
    node = ir.node("Add", [a, b])
    assert list(shape_checks.both_ways(node)) == [(a, b), (b, a)]
    assert list(shape_checks.both_ways(ir.node("Neg", [a]))) == [(a, None), (None, a)]
    assert (shape_checks.other_input(node, a), shape_checks.other_input(node, b)) == (b, a)


@pytest.mark.parametrize(
    ("inputs", "said", "dtype"),
    [
        ([HALF, FLOAT], FLOAT, FLOAT),
        ([HALF], None, HALF),
        ([None, HALF], None, HALF),
        ([None], None, FLOAT),
    ],
)
def test_result_dtype(inputs: list[ir.DataType | None], said: ir.DataType | None, dtype: ir.DataType) -> None:
    node = ir.node("Mul", [value([8], kind) for kind in inputs])
    node.outputs[0].dtype = said
    assert shape_checks.result_dtype(node) == dtype
    assert node.outputs[0].dtype == (dtype if inputs != [None] else None)


def test_is_ones() -> None:
    by_name = read("a = Constant <value = float[2] {1.0, 1.0}> ()  b = Constant <value = float[2] {1.0, 0.5}> ()")
    found = {name: shape_checks.is_ones(by_name[name]) for name in ("a", "b", "x", "one")}
    assert found == {"a": True, "b": False, "x": False, "one": True}


def test_copies_dims() -> None:
    node = {
        text: ir.node("Reshape", [value([8])], {} if text is None else {"allowzero": text}) for text in (None, 0, 1)
    }
    assert {text: shape_checks.copies_dims(made, [8]) for text, made in node.items()} == {None: True, 0: True, 1: False}
    assert not shape_checks.copies_dims(node[None], None)
