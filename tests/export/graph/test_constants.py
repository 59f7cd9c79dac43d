"""What is said of single values: constants that nothing can override, dims, groups, dtypes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from rmsnorm_deploy.export.graph import constants
from rmsnorm_deploy.export.graph.infer_types import fill_types
from tests.helpers.graphs.onnx_text import parsed, values

FLOAT, HALF, BFLOAT = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
DOUBLE, INT64 = ir.DataType.DOUBLE, ir.DataType.INT64
UNNAMED = ir.SymbolicDim(None)
BATCH = ir.SymbolicDim("batch")


def value(shape: list[int | ir.SymbolicDim] | None, name: str = "v") -> ir.Value:
    return ir.Value(name=name, shape=None if shape is None else ir.Shape(shape), type=ir.TensorType(FLOAT))


def of(body: str, inputs: str = "float[2, 3] x", initializers: str = "") -> ir.Value:
    """The body's `y`, with types filled in."""
    model = parsed(f"g ({inputs}) => (bool[2, 3] o) {initializers} {{ {body} o = IsNaN (x) }}", 20)
    fill_types(model)
    return values(model)["y"]


# Constants ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attribute", "array"),
    [
        ("value = float[2] {1.5, 2.0}", np.array([1.5, 2.0], np.float32)),
        ("value_float = 0.5", np.array(0.5, np.float32)),
        ("value_floats = [0.5, 1.0]", np.array([0.5, 1.0], np.float32)),
        ("value_int = 7", np.array(7, np.int64)),
        ("value_ints = [7, -1]", np.array([7, -1], np.int64)),
    ],
)
def test_constant_nodes(attribute: str, array: np.ndarray) -> None:
    found = constants.constant(of(f"y = Constant <{attribute}> ()"))
    assert found is not None
    assert (found.dtype, found.shape, found.tolist()) == (array.dtype, array.shape, array.tolist())


def test_an_initializer_is_a_constant_unless_it_is_an_input_as_well() -> None:
    model = parsed("g (float[2] x) => (float[2] o) <float[2] w = {1.0, 2.0}> { o = Add (x, w) }")
    weight = values(model)["w"]
    found = constants.constant(weight)
    assert found is not None
    assert found.tolist() == [1.0, 2.0]
    model.graph.inputs.append(weight)
    assert constants.constant(weight) is None
    assert constants.scalar(weight) is None


@pytest.mark.parametrize("body", ["y = Neg (x)", "y = ConstantOfShape <value = float[1] {1.0}> (h)"])
def test_other_values_are_no_constants(body: str) -> None:
    assert constants.constant(of("h = Shape (x)  " + body)) is None
    assert constants.constant(None) is None


def test_a_large_weight_is_not_read() -> None:
    """2^20 elements are the most; reading this one would fail."""
    made = value([1025, 1024])
    made.const_value = ir.LazyTensor(lambda: 1 / 0, dtype=FLOAT, shape=ir.Shape([1025, 1024]))
    assert constants.constant(made) is None


def test_external_data_is_read_at_its_offset(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32)
    (tmp_path / "data").write_bytes(b"skip" + array.tobytes() + b"rest")
    made = value([2, 3])
    made.const_value = ir.ExternalTensor("data", 4, 24, FLOAT, shape=ir.Shape([2, 3]), name="w", base_dir=tmp_path)
    found = constants.constant(made)
    assert found is not None
    assert (found.dtype, found.tolist()) == (np.float32, [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize("dtype", [ir.DataType.INT4, ir.DataType.STRING])
def test_external_data_that_has_no_whole_bytes_is_left(dtype: ir.DataType, tmp_path: Path) -> None:
    made = value([2])
    made.const_value = ir.ExternalTensor("none", 0, 2, dtype, shape=ir.Shape([2]), name="w", base_dir=tmp_path)
    assert constants.constant(made) is None


@pytest.mark.parametrize(
    ("body", "number"),
    [
        ("y = Constant <value = float[1, 1] {2.5}> ()", 2.5),
        ("c = Constant <value = double {0.1}> ()  y = Cast <to = 1> (c)", float(np.float32(0.1))),
        ("c = Constant <value = float {2.5}> ()  y = Cast <to = 7> (c)", 2.0),
        ("c = Constant <value = float[1] {2.5}> ()  d = Identity (c)  t = Constant <value_ints = [1, 1]> ()"
         "  y = Reshape (d, t)", 2.5),
        ("h = Shape (x)  c = Constant <value_int = 1> ()  y = Gather (h, c)", 3.0),
        ("h = Shape (x)  c = Constant <value_int = -2> ()  g = Gather (h, c)  y = Cast <to = 1> (g)", 2.0),
    ],
)  # fmt: skip
def test_scalars_also_behind_casts_and_reshapes(body: str, number: float) -> None:
    assert constants.scalar(of(body)) == number


@pytest.mark.parametrize(
    "body",
    [
        "y = Constant <value = float[2] {1.0, 1.0}> ()",
        'y = Constant <value = string {"1"}> ()',
        "c = Constant <value_float = 1.0> ()  y = Neg (c)",
        "h = Shape <start = 1> (x)  c = Constant <value_int = 1> ()  y = Gather (h, c)",
        "h = Shape (x)  c = Constant <value_int = 2> ()  y = Gather (h, c)",
        "y = Cast <to = 10> (x)",
    ],
)
def test_no_scalar(body: str) -> None:
    assert constants.scalar(of(body)) is None


def test_a_dim_that_is_not_fixed_is_no_scalar() -> None:
    body = "h = Shape (x)  c = Constant <value_int = 0> ()  y = Gather (h, c)"
    assert constants.scalar(of(body, "float[n, 3] x")) is None


def test_casts_in_a_long_chain_are_not_followed() -> None:
    chain = "c0 = Constant <value_float = 1.0> ()  " + "".join(f"c{i + 1} = Identity (c{i})  " for i in range(9))
    assert constants.scalar(of(chain + "y = Identity (c7)")) == 1.0
    assert constants.scalar(of(chain + "y = Identity (c9)")) is None


def test_a_bfloat16_constant_is_cast() -> None:
    assert constants.scalar(of("c = Constant <value = bfloat16[1] {16256}> ()  y = Cast <to = 1> (c)")) == 1.0


COMPUTED = """h = Shape (x)  one = Constant <value_int = 1> ()  two = Constant <value_int = 2> ()
v = Constant <value_ints = [4, -7, 2, 9, -3]> ()  at = Constant <value_ints = [1]> ()
to = Constant <value_ints = [-1]> ()
back = Constant <value_ints = [-9]> ()  ends = Constant <value_ints = [3, -1]> ()  zero = Constant <value_ints = [0]> ()
"""


@pytest.mark.parametrize(
    "body",
    [
        "y = Shape <start = -2, end = 3> (x)",
        "r = Size (h)  y = Range (one, r, one)",
        "n = Constant <value_int = -2> ()  r = Size (h)  a = Add (n, r)  y = Range (a, r, one)",
        "y = Size (x)",
        "m = Neg (one)  a = Mul (m, two)  y = Range (two, a, m)",
        "y = Div (v, two)",
        "n = Neg (two)  y = Div (v, n)",
        "a = Sub (v, two)  m = Mul (a, v)  y = Neg (m)",
        "y = Gather (v, ends)",
        "y = Gather <axis = -1> (v, to)",
        "y = Slice (v, at, to)",
        "y = Slice (v, to, back, zero, to)",
        "y = Slice (h, to, back, zero, to)",
        "y = Slice (v, back, to, zero, at)",
        "y = Concat <axis = 0> (at, h, to)",
        "u = Unsqueeze (v, zero)  s = Squeeze (u, zero)  y = Concat <axis = -1> (s, at)",
        "y = Unsqueeze (two, zero)",
        "n = Sub (two, one)  u = Reshape (n, at)  y = Concat <axis = 0> (u, u)",
        "y = ConstantOfShape <value = int64[1] {1}> (at)",
        "c = Cast <to = 6> (h)  d = CastLike (c, two)  y = Add (d, d)",
    ],
)
def test_integers_that_nodes_compute_are_those_of_onnx(body: str) -> None:
    made = of(COMPUTED + body, "float[2, 3, 5] x")
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 20]> g (float[2, 3, 5] x) => (int64 y) {{ {COMPUTED} {body} }}'
    )
    (wanted,) = ReferenceEvaluator(model).run(None, {"x": np.zeros((2, 3, 5), np.float32)})
    assert constants.integers(made) == wanted.reshape(-1).tolist()


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("y = Shape (x)", None),
        ("y = Gather (h, to)", [5]),
        ("y = Gather (h, zero)", None),
        ("y = Slice (h, at, ends)", None),
        ("k = Shape <start = 1> (x)  y = Add (k, k)", [6, 10]),
        ("r = Size (h)  y = Range (one, r, one)", [1, 2]),
        ("y = Size (x)", None),
        ("z = Sub (one, one)  y = Div (v, z)", None),
        ("z = Sub (one, one)  y = Range (one, two, z)", None),
        ("big = Constant <value_int = 100> ()  y = Range (one, big, one)", None),
        ("big = Constant <value_ints = [100]> ()  y = ConstantOfShape <value = int64[1] {1}> (big)", None),
        ("y = Gather (v, back)", None),
        ("f = Cast <to = 1> (two)  y = Add (f, f)", None),
    ],
)
def test_integers_of_a_shape_that_is_known_in_part(body: str, found: list[int] | None) -> None:
    assert constants.integers(of(COMPUTED + body, "float[batch, 3, 5] x")) == found


def test_integers() -> None:
    assert constants.integers(of("y = Constant <value = int64[2, 2] {1, -1, 0, 4}> ()")) == [1, -1, 0, 4]
    assert constants.integers(of("y = Constant <value = float[1] {1.0}> ()")) is None
    assert constants.integers(of("y = Identity (x)")) is None
    assert constants.integers(None) is None
    many = ", ".join(["0"] * 65)
    assert constants.integers(of(f"y = Constant <value = int64[65] {{{many}}}> ()")) is None


# Dims -----------------------------------------------------------------------------------------------------------------


def test_dims() -> None:
    assert constants.dims(value([2, BATCH])) == [2, BATCH]
    assert constants.dims(value(None)) is None
    assert constants.dims(None) is None
    made = value(None)
    made.const_value = ir.tensor(np.zeros((2, 3), np.float32))
    assert constants.dims(made) == [2, 3]
    model = parsed("g (float[1] x) => (float[1] o) { y = Constant <value = float[4] {1., 1., 1., 1.}> () o = Neg (x) }")
    assert constants.dims(values(model)["y"]) == [4]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ([2, 3], [2, 3], True),
        ([BATCH, 3], [ir.SymbolicDim("batch"), 3], True),
        ([], [], True),
        ([2, 3], [3, 2], False),
        ([2, 3], [3], False),
        ([UNNAMED], [UNNAMED], False),
        ([BATCH], [ir.SymbolicDim("sequence")], False),
        (None, [2], False),
        (None, None, False),
    ],
)
def test_same_dims(a: list[constants.Dim] | None, b: list[constants.Dim] | None, same: bool) -> None:
    assert constants.same_dims(a, b) is same
    assert constants.same_dims(b, a) is same


@pytest.mark.parametrize(
    ("shape", "count", "tail"),
    [
        ([BATCH, 4, 8], 1, [8]),
        ([BATCH, 4, 8], 2, [4, 8]),
        ([BATCH, 4, 8], 3, None),
        ([8], 2, None),
        ([2, 0], 1, None),
        ([1 << 20], 1, [1 << 20]),
        ([2, 1 << 20], 2, None),
        (None, 1, None),
    ],
)
def test_static(shape: list[constants.Dim] | None, count: int, tail: list[int] | None) -> None:
    assert constants.static(shape, count) == tail


@pytest.mark.parametrize(
    ("before", "after", "axes", "found"),
    [
        ([2, 32], [2, 4, 8], 1, (8, 1)),
        ([BATCH, 32], [UNNAMED, 8], 1, (8, 1)),
        ([2, 8], [16, 1], 1, (1, 1)),
        ([2, 4, 8], [2, 32], 1, (None, 2)),
        ([3, 2, 4, 8], [3, 64], 1, (None, 3)),
        ([2, 8], [1, 2, 8], 1, (None, 1)),
        ([2, 4, 8], [2, 32], 2, None),
        ([2, 12], [3, 8], 1, None),
        ([BATCH, 4], [8], 1, None),
        ([2, BATCH], [2, 8], 1, None),
        ([2, 8], [2, BATCH], 1, None),
        (None, [2, 8], 1, None),
        ([], [1], 1, None),
    ],
)
def test_regrouping(
    before: list[constants.Dim] | None, after: list[constants.Dim], axes: int, found: tuple[int | None, int] | None
) -> None:
    assert constants.regrouping(value(before), value(after), axes) == found
    assert constants.regrouping(None, value(after), axes) is None


@pytest.mark.parametrize(
    ("body", "initializers", "axes"),
    [
        ("y = ReduceMean (x, a)", "<int64[2] a = {-1, 0}>", [-1, 0]),
        ("y = ReduceMean (x)", "", None),
        ("h = Shape (x)  y = ReduceMean (x, h)", "", [2, 3]),
        ("y = Unsqueeze (x, a)", "<int64[1] a = {1}>", [1]),
    ],
)
def test_axes_as_input(body: str, initializers: str, axes: list[int] | None) -> None:
    node = of(body, initializers=initializers).producer()
    assert node is not None
    assert constants.axes_of(node) == axes


def test_axes_as_attribute() -> None:
    assert constants.axes_of(ir.node("ReduceMean", [value([2, 3])], {"axes": [-1]})) == [-1]


# Dtypes ---------------------------------------------------------------------------------------------------------------


def test_dtypes() -> None:
    assert [d for d in (FLOAT, HALF, BFLOAT, DOUBLE, INT64, None) if constants.is_half(d)] == [HALF, BFLOAT]
    floating = [
        d for d in (FLOAT, HALF, BFLOAT, DOUBLE, INT64, ir.DataType.FLOAT8E5M2, None) if constants.is_floating(d)
    ]
    assert floating == [FLOAT, HALF, BFLOAT, DOUBLE]


def test_widens_is_what_loses_nothing() -> None:
    order = (HALF, BFLOAT, FLOAT, DOUBLE)
    wider = {(a, b) for a in order for b in order if constants.widens(a, b)}
    same = {(a, a) for a in order}
    assert wider - same == {(HALF, FLOAT), (BFLOAT, FLOAT), (HALF, DOUBLE), (BFLOAT, DOUBLE), (FLOAT, DOUBLE)}
    assert same <= wider
    assert not constants.widens(None, FLOAT)
    assert not constants.widens(INT64, INT64)
