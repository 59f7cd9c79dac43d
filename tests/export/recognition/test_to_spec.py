"""From formulas to a NormSpec: where each cast, scale and gate puts it, and the formulas that no spec has."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from rmsnorm_deploy.export.graph.constants import constant
from rmsnorm_deploy.export.graph.infer_types import fill_types
from rmsnorm_deploy.export.recognition.dataflow import GraphReader
from rmsnorm_deploy.export.recognition.find_norms import find_graph_norms
from rmsnorm_deploy.export.recognition.terms import Normed
from rmsnorm_deploy.export.recognition.to_spec import Reading, reading, shortest, unfolded
from rmsnorm_deploy.models.spec import NormSpec
from tests.helpers.graphs.onnx_text import parsed, values

# 1.0 to 2.75 in steps of a quarter, as bits of float16.
WEIGHT = "{15360, 15616, 15872, 16128, 16384, 16512, 16640, 16768}"
CONSTANTS = f"""<float one = {{1.0}}, float16 one16 = {{15360}}, float two = {{2.0}}, float eps = {{0.125}},
float16 two16 = {{16384}}, float16 eps16 = {{12288}}, float root8 = {{2.8284271}}, int64[1] last = {{-1}},
float16[8] w16 = {WEIGHT}, float[8] w = {{1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}},
float[8] thirds = {{0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8}}, float[1] single = {{3.0}},
float[8] b = {{0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0}}, float16[8] b16 = {WEIGHT}>"""
FACTOR = "s = Pow (h, two)  m = ReduceMean (s, last)  e = Add (m, eps)  r = Sqrt (e)  f = Reciprocal (r)  "
FLOAT = "h = Identity (x)  " + FACTOR
WIDENED = "h = Cast <to = 1> (x)  " + FACTOR
HALVES = """s = Pow (x, two16)  m = ReduceMean (s, last)  e = Add (m, eps16)  r = Sqrt (e)  f = Reciprocal (r)  """


def read(body: str, dtype: str = "float", inputs: str = "") -> tuple[Reading | str, dict[str, ir.Value]]:
    """The reading of the body's `y`, and the graph's values."""
    text = f"g ({dtype}[2, 8] x, {dtype}[2, 8] z{inputs}) => (bool[2, 8] o) {CONSTANTS} {{ {body} o = IsNaN (x) }}"
    model = parsed(text, 20)
    fill_types(model)
    reader = GraphReader()
    reader.read(model.graph)
    by_name = values(model)
    term = reader.terms[by_name["y"]]
    assert isinstance(term, Normed)
    return reading(term, reader), by_name


def found(body: str, dtype: str = "float", inputs: str = "") -> tuple[Reading, dict[str, ir.Value]]:
    read_, by_name = read(body, dtype, inputs)
    assert isinstance(read_, Reading), read_
    return read_, by_name


@pytest.mark.parametrize(
    ("dtype", "body", "spec"),
    [
        ("float", FLOAT + "y = Mul (h, f)", NormSpec(0.125, scale="none")),
        ("float", FLOAT + "y = Div (h, r)", NormSpec(0.125, scale="none", root="sqrt")),
        ("float", FLOAT + "n = Mul (h, f)  y = Mul (n, w)", NormSpec(0.125)),
        ("float", FLOAT + "n = Mul (h, f)  v = Add (w, one)  y = Mul (n, v)", NormSpec(0.125, scale="one_plus_weight")),
        ("float", FLOAT + "n = Mul (h, f)  v = Mul (n, w)  y = Add (v, b)", NormSpec(0.125, bias=True)),
        ("float16", WIDENED + "n = Mul (h, f)  y = Cast <to = 10> (n)", NormSpec(0.125, scale="none")),
        ("float16", WIDENED + "n = Mul (h, f)  c = Cast <to = 10> (n)  y = Mul (c, w16)",
         NormSpec(0.125, order="cast_then_scale")),
        ("float16", WIDENED + "n = Mul (h, f)  k = Cast <to = 1> (w16)  v = Mul (n, k)  y = Cast <to = 10> (v)",
         NormSpec(0.125)),
        ("float16", WIDENED + "n = Mul (h, f)  k = Cast <to = 1> (w16)  q = Add (k, one)  v = Mul (n, q)"
         "  y = Cast <to = 10> (v)", NormSpec(0.125, scale="one_plus_weight")),
        ("float16", WIDENED + "n = Mul (h, f)  c = Cast <to = 10> (n)  q = Add (w16, one16)  y = Mul (c, q)",
         NormSpec(0.125, scale="one_plus_weight", order="cast_then_scale", offset_in_float32=False)),
        ("float16", WIDENED + "g = Cast <to = 10> (f)  n = Mul (x, g)  y = Mul (n, w16)",
         NormSpec(0.125, order="cast_factor")),
        ("float16", HALVES + "n = Mul (x, f)  y = Mul (n, w16)",
         NormSpec(0.125, order="no_upcast", statistics="input")),
        ("float16", HALVES + "n = Div (x, r)  v = Mul (n, w16)  y = Add (v, b16)",
         NormSpec(0.125, order="no_upcast", statistics="input", root="sqrt", bias=True)),
    ],
)  # fmt: skip
def test_specs(dtype: str, body: str, spec: NormSpec) -> None:
    read_, by_name = found(body, dtype)
    assert read_.spec == spec
    assert (read_.x, read_.y) == (by_name["x"], by_name["y"])
    assert (read_.weight is None, read_.bias is None, read_.gate) == (not spec.has_weight, not spec.bias, None)


@pytest.mark.parametrize(
    ("body", "gate", "activation"),
    [
        (FLOAT + "n = Mul (h, f)  v = Mul (n, w)  a = Sigmoid (z)  y = Mul (v, a)", "after", "sigmoid"),
        (FLOAT + "n = Mul (h, f)  v = Mul (n, w)  a = Sigmoid (z)  k = Mul (z, a)  y = Mul (v, k)", "after", "silu"),
        ("a = Sigmoid (z)  k = Mul (z, a)  h = Mul (x, k)  " + FACTOR + "n = Mul (h, f)  y = Mul (n, w)",
         "before", "silu"),
    ],
)  # fmt: skip
def test_gates(body: str, gate: str, activation: str) -> None:
    read_, by_name = found(body)
    assert (read_.spec.gate, read_.spec.activation) == (gate, activation)
    assert (read_.x, read_.gate, read_.weight) == (by_name["x"], by_name["z"], by_name["w"])
    assert by_name["a"].producer() in read_.inside


def test_a_product_that_others_read_too_is_what_is_normalized() -> None:
    body = "a = Sigmoid (z)  k = Mul (z, a)  h = Mul (x, k)  other = Neg (h)  " + FACTOR + "n = Mul (h, f)  "
    read_, by_name = found(body + "y = Mul (n, w)")
    assert (read_.spec.gate, read_.x, read_.gate) == ("none", by_name["h"], None)


def test_groups() -> None:
    body = """t = Constant <value = int64[3] {2, 2, 4}> ()  h = Reshape (x, t)
    s = Pow (h, two)  m = ReduceMean (s, last)  e = Add (m, eps)  r = Sqrt (e)  n = Div (h, r)
    u = Shape (x)  k = Reshape (n, u)  y = Mul (k, w)"""
    read_, by_name = found(body)
    assert read_.spec == NormSpec(0.125, root="sqrt", group_size=4)
    assert (read_.x, read_.weight) == (by_name["x"], by_name["w"])


def test_a_float16_weight_folded_into_float32_is_narrowed_again() -> None:
    read_, by_name = found(WIDENED + "n = Mul (h, f)  v = Mul (n, w)  y = Cast <to = 10> (v)", "float16")
    array = constant(read_.weight)
    assert array is not None
    assert (read_.spec.scale, array.dtype) == ("weight", np.float16)
    assert array.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert read_.weight is not by_name["w"]


def test_a_float32_weight_that_float16_does_not_hold_stays() -> None:
    read_, by_name = found(WIDENED + "n = Mul (h, f)  v = Mul (n, thirds)  y = Cast <to = 10> (v)", "float16")
    assert (read_.spec.scale, read_.weight) == ("weight", by_name["thirds"])


def test_a_weight_of_one_element_is_spread_over_the_row() -> None:
    read_, _ = found(FLOAT + "n = Mul (h, f)  y = Mul (n, single)")
    array = constant(read_.weight)
    assert array is not None
    assert array.tolist() == [3.0] * 8


def test_a_weight_that_nodes_compute_is_taken_before_its_reshape() -> None:
    body = "t = Constant <value = int64[2] {1, 8}> ()  v = Reshape (k, t)  "
    read_, by_name = found(body + FLOAT + "n = Mul (h, f)  y = Mul (n, v)", inputs=", float[8] k")
    assert read_.weight is by_name["k"]


def test_the_longest_part_that_a_spec_has_is_taken() -> None:
    """A bias before the scale is in no spec: the norm ends before it."""
    read_, by_name = found(FLOAT + "n = Mul (h, f)  v = Add (n, b)  y = Mul (v, w)")
    assert read_.spec == NormSpec(0.125, scale="none", bias=True)
    assert read_.y is by_name["v"]
    assert by_name["y"].producer() not in read_.inside


def test_sum_of_squares_and_root_of_the_width_are_an_rms_norm() -> None:
    body = "s = ReduceSumSquare (x, last)  r = Sqrt (s)  n = Div (x, r)  y = Mul (n, root8)"
    read_, _ = found(body)
    assert read_.spec == NormSpec(0.0, scale="none", root="sqrt")


@pytest.mark.parametrize(
    ("dtype", "body", "reason"),
    [
        ("float", "r = ReduceL2 (x, last)  y = Div (x, r)", "not of their mean: an L2 norm"),
        ("float", FLOAT + "g = Div (two, r)  y = Mul (h, g)", "its result is 2 times that of an RMSNorm"),
        ("float16", HALVES + "h = Cast <to = 1> (x)  k = Cast <to = 1> (f)  y = Mul (h, k)",
         "its squares pass through float16, where large values overflow (Pow 'node_s')"),
    ],
)  # fmt: skip
def test_refusals(dtype: str, body: str, reason: str) -> None:
    read_, _ = read(body, dtype)
    assert isinstance(read_, str)
    assert reason in read_


def test_a_product_scaled_in_float32_and_never_cast_is_no_norm_of_a_half_type() -> None:
    read_, _ = read(WIDENED + "n = Mul (h, f)  y = Mul (n, thirds)", "float16")
    assert isinstance(read_, Reading)
    assert read_.x.name == "h"
    assert read_.spec == NormSpec(0.125)


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 1e-8, 0.1, 1.1920928955078125e-7, 0.0])
def test_shortest(eps: float) -> None:
    """A decimal that a person wrote comes back from its float32 value."""
    assert shortest(float(np.float32(eps))) == (1.1920929e-7 if eps == 1.1920928955078125e-7 else eps)


def value(array: np.ndarray, dtype: ir.DataType) -> ir.Value:
    made = ir.Value(name="w", shape=ir.Shape(array.shape), type=ir.TensorType(dtype))
    made.const_value = ir.Tensor(array, dtype=dtype)
    return made


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (np.dtype(np.float32), ir.DataType.FLOAT),
        (np.dtype(np.float16), ir.DataType.FLOAT16),
        (np.dtype(ml_dtypes.bfloat16), ir.DataType.BFLOAT16),
    ],
)
def test_unfolded_is_the_weight_before_one_was_added(kind: np.dtype, dtype: ir.DataType) -> None:
    before = unfolded(value(np.array([1.5, 0.75, 1.0, 3.0]).astype(kind), dtype), ir.DataType.FLOAT)
    assert before is not None
    assert (before.dtype, before.name) == (dtype, "w")
    array = constant(before)
    assert array is not None
    assert array.astype(np.float64).tolist() == [0.5, -0.25, 0.0, 2.0]


def test_unfolded_refuses_what_no_weight_gives() -> None:
    """1e-10 - 1 is -1 in float32, and 1 added to that is 0."""
    assert unfolded(value(np.array([1e-10], np.float32), ir.DataType.FLOAT), ir.DataType.FLOAT) is None


def test_unfolded_needs_a_constant() -> None:
    given = ir.Value(name="x", shape=ir.Shape([8]), type=ir.TensorType(ir.DataType.FLOAT))
    assert unfolded(given, ir.DataType.FLOAT) is None


# A norm as float16 converters write it: x is float16, and each operator that stays in float32 stands between casts.
BLOCKED = """g (float16[2, 8] x) => (float16[2, 8] y)
    <float two = {{2.0}}, float eps = {{0.125}}, int64[1] last = {{-1}}>
    {{ w = Cast <to = 1> (x)  {squares}  m = ReduceMean (s, last)  {mean}  e = Add (k, eps)  r = Sqrt (e)
    q = Div (w, r)  y = Cast <to = 10> (q) }}"""
WHOLE, IN_HALF = "s = Pow (w, two)", "h = Mul (x, x)  s = Cast <to = 1> (h)"
CAST_SQUARES = "p = Pow (w, two)  h = Cast <to = {to}> (p)  s = Cast <to = 1> (h)"
CAST_MEAN = "c = Cast <to = 10> (m)  k = Cast <to = 1> (c)"


@pytest.mark.parametrize(
    ("squares", "mean", "reason"),
    [
        (CAST_SQUARES.format(to=10), "k = Identity (m)",
         "its squares pass through float16, where large values overflow (Cast 'node_h')"),
        (IN_HALF, "k = Identity (m)", "its squares pass through float16, where large values overflow (Mul 'node_h')"),
        (WHOLE, CAST_MEAN, "its mean of squares passes through float16, where large values overflow (Cast 'node_c')"),
        (CAST_SQUARES.format(to=16), "k = Identity (m)", "its squares pass through bfloat16 (Cast 'node_h')"),
    ],
)  # fmt: skip
def test_statistics_that_pass_through_a_half_type_are_refused_with_the_node(
    squares: str, mean: str, reason: str
) -> None:
    found = find_graph_norms(parsed(BLOCKED.format(squares=squares, mean=mean)))
    assert ([site.path for site in found.sites], [refusal.reason for refusal in found.refusals]) == ([], [reason])


def test_statistics_between_casts_that_stay_in_float32_are_a_norm() -> None:
    found = find_graph_norms(parsed(BLOCKED.format(squares=WHOLE, mean="k = Identity (m)")))
    assert ([site.path for site in found.sites], found.refusals) == (["node_s"], [])
