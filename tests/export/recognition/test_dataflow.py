"""The formula that each operator gives its result, and why the nodes around a Reduce node are not a norm."""

from __future__ import annotations

import math

import onnx_ir as ir
import pytest

from rmsnorm_deploy.export.graph.infer_types import fill_types
from rmsnorm_deploy.export.graph.metadata import ONES
from rmsnorm_deploy.export.recognition.dataflow import GraphReader
from rmsnorm_deploy.export.recognition.terms import MOST_NODES, Activated, Normed, Squares, Statistic, Term
from tests.helpers.graphs.onnx_text import parsed, values

CONSTANTS = """<float one = {1.0}, float two = {2.0}, float three = {3.0}, float eps = {0.125}, float eighth = {0.125},
float minus = {-0.5}, float half = {0.5}, int64[1] last = {-1}, int64[1] first = {0},
float[8] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}, float[8] b = {0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0},
float[1, 8] ones = {1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0}>"""
# What most bodies begin with: (mean(x^2) + 0.125) and its root.
MEAN = "s = Mul (x, x)  m = ReduceMean (s, last)  e = Add (m, eps)  "
ROOT = MEAN + "r = Sqrt (e)  "


def read(body: str, inputs: str = "float[2, 8] x", opset: int = 20) -> tuple[GraphReader, dict[str, ir.Value]]:
    """A reader that has read `body`, and the graph's values; nothing of the body is an output of the graph."""
    model = parsed(f"g ({inputs}) => (bool[2, 8] other) {CONSTANTS} {{ {body} other = IsNaN (x) }}", opset)
    fill_types(model)
    reader = GraphReader()
    reader.read(model.graph)
    return reader, values(model)


def term_of(body: str, inputs: str = "float[2, 8] x", opset: int = 20) -> Term | None:
    """The formula of the body's `y`."""
    reader, by_name = read(body, inputs, opset)
    return reader.terms.get(by_name["y"])


# Squares and statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["y = Mul (x, x)", "y = Pow (x, two)", "c = Cast <to = 1> (x)  y = Mul (c, x)"])
def test_squares(body: str) -> None:
    reader, by_name = read(body)
    term = reader.terms[by_name["y"]]
    assert isinstance(term, Squares)
    assert (term.root, term.half) == (by_name["x"], False)
    assert term.nodes == (by_name["y"].producer(),)


@pytest.mark.parametrize("body", ["y = Pow (x, three)", "y = Mul (x, z)", "y = Pow (x, x)"])
def test_other_products_and_powers_are_no_squares(body: str) -> None:
    assert term_of(body, "float[2, 8] x, float[2, 8] z") is None


def test_squares_of_whole_numbers_are_none() -> None:
    assert term_of("y = Mul (x, x)", "int64[2, 8] x") is None


def test_squares_in_a_half_type_say_so() -> None:
    term = term_of("y = Mul (x, x)", "float16[2, 8] x")
    assert isinstance(term, Squares)
    assert term.half


@pytest.mark.parametrize(
    ("body", "formula"),
    [
        ("s = Mul (x, x)  y = ReduceMean (s, last)", (1, 0, 1, 1)),
        ("s = Mul (x, x)  y = ReduceSum (s, last)", (8, 0, 1, 1)),
        ("y = ReduceSumSquare (x, last)", (8, 0, 1, 1)),
        ("y = ReduceL2 (x, last)", (8, 0, 1, 0.5)),
        (MEAN + "y = Identity (e)", (1, 0.125, 1, 1)),
        (MEAN + "y = Sub (e, eighth)", (1, 0, 1, 1)),
        (MEAN + "y = Mul (e, two)", (2, 0.25, 1, 1)),
        (MEAN + "y = Div (e, two)", (0.5, 0.0625, 1, 1)),
        (MEAN + "y = Pow (e, minus)", (1, 0.125, 1, -0.5)),
        (MEAN + "y = Div (one, e)", (1, 0.125, 1, -1)),
        (ROOT + "y = Identity (r)", (1, 0.125, 1, 0.5)),
        (ROOT + "y = Mul (r, r)", (1, 0.125, 1, 1)),
        (ROOT + "y = Reciprocal (r)", (1, 0.125, 1, -0.5)),
        (ROOT + "y = Div (two, r)", (1, 0.125, 2, -0.5)),
        (ROOT + "y = Mul (half, r)", (1, 0.125, 0.5, 0.5)),
        ("s = Mul (x, x)  m = ReduceSum (s, last)  n = Mul (m, eighth)  y = Add (eps, n)", (1, 0.125, 1, 1)),
    ],
)
def test_statistics(body: str, formula: tuple[float, float, float, float]) -> None:
    """The four numbers of c * (a * mean(x^2) + b)^p, in the order a, b, c, p."""
    reader, by_name = read(body)
    term = reader.terms[by_name["y"]]
    assert isinstance(term, Statistic)
    assert (term.a, term.b, term.c, term.p) == formula
    assert (term.root, term.taken, term.axes, term.reduced) == (by_name["x"], by_name["x"], 1, True)
    assert not term.half
    assert not term.factor_half


@pytest.mark.parametrize(
    ("body", "axes", "reduced"),
    [
        ("s = Mul (x, x)  y = ReduceMean <keepdims = 0> (s, last)", 1, False),
        ("s = Mul (x, x)  m = ReduceMean <keepdims = 0> (s, last)  y = Unsqueeze (m, last)", 1, True),
        ("s = Mul (x, x)  m = ReduceMean <keepdims = 0> (s, last)  t = Constant <value = int64[2] {-1, 1}> ()"
         "  y = Reshape (m, t)", 1, True),
        ("s = Mul (x, x)  a = Constant <value = int64[2] {0, 1}> ()  y = ReduceMean (s, a)", 2, True),
    ],
)  # fmt: skip
def test_reduced_dims(body: str, axes: int, reduced: bool) -> None:
    term = term_of(body)
    assert isinstance(term, Statistic)
    assert (term.axes, term.reduced) == (axes, reduced)


def test_a_row_is_the_only_dim_where_a_reduce_node_names_none() -> None:
    term = term_of("s = Mul (x, x)  y = ReduceMean (s)", "float[8] x")
    assert isinstance(term, Statistic)
    assert term.axes == 1


@pytest.mark.parametrize(
    ("shape", "target", "statistic"),
    [
        ("n, 8", "{-1, 1}", True),
        ("n, m, 8", "{-1, 1}", False),
        ("n, m, 8", "{0, 0, 1}", True),
        ("n, m, 8", "{-1, 1, 1}", False),
    ],
)
def test_a_statistic_is_reshaped_to_columns(shape: str, target: str, statistic: bool) -> None:
    """No dim of rows is known; two of them would be lost in one column."""
    count = target.count(",") + 1
    body = f"t = Constant <value = int64[{count}] {target}> ()  s = Mul (x, x)  "
    term = term_of(body + "m = ReduceMean <keepdims = 0> (s, last)  y = Reshape (m, t)", f"float[{shape}] x")
    assert isinstance(term, Statistic) is statistic
    if isinstance(term, Statistic):
        assert term.reduced


def test_zeros_in_a_reshape_copy_dims_that_are_there() -> None:
    body = "t = Constant <value = int64[3] {0, 0, 1}> ()  s = Mul (x, x)  "
    assert isinstance(term_of(body + "m = ReduceMean (s, last)  y = Reshape (m, t)", "float[n, m, 8] x"), Statistic)


def test_an_expanded_statistic_is_still_one() -> None:
    term = term_of(ROOT + "h = Shape (x)  y = Expand (r, h)")
    assert isinstance(term, Statistic)
    assert (term.p, len(term.nodes)) == (0.5, 5)


@pytest.mark.parametrize(
    ("casts", "half", "factor_half"),
    [
        ("f = Reciprocal (r)  y = Cast <to = 10> (f)", False, True),
        ("h = Cast <to = 10> (e)  y = Sqrt (h)", True, False),
        ("h = Cast <to = 10> (r)  y = Reciprocal (h)", False, True),
    ],
)
def test_where_a_statistic_was_rounded_to_a_half_type(casts: str, half: bool, factor_half: bool) -> None:
    body = "x = Cast <to = 1> (h0)  " + ROOT
    term = term_of(body + casts, "float16[2, 8] h0")
    assert isinstance(term, Statistic)
    assert (term.half, term.factor_half) == (half, factor_half)


def test_a_statistic_of_float64_is_lost_with_a_cast() -> None:
    assert term_of("s = Mul (x, x)  m = ReduceMean (s, last)  y = Cast <to = 1> (m)", "double[2, 8] x") is None


def test_a_formula_of_more_nodes_than_a_norm_has_is_dropped() -> None:
    chain = "s = Mul (x, x)  n0 = ReduceMean (s, last)  "
    chain += "  ".join(f"n{i + 1} = Mul (n{i}, one)" for i in range(MOST_NODES))
    reader, by_name = read(chain)
    assert by_name[f"n{MOST_NODES - 2}"] in reader.terms
    assert by_name[f"n{MOST_NODES - 1}"] not in reader.terms
    assert by_name[f"n{MOST_NODES}"] not in reader.terms


# Roots ----------------------------------------------------------------------------------------------------------------


def test_a_root_is_what_stands_before_casts_that_lose_nothing() -> None:
    reader, by_name = read(
        "wide = Cast <to = 1> (x)  wider = Cast <to = 11> (wide)  same = Identity (wider)  back = Cast <to = 10> (same)"
        "  low = Cast <to = 16> (x)",
        "float16[2, 8] x",
    )  # fmt: skip
    x = by_name["x"]
    assert [reader.root(by_name[name]) for name in ("wide", "wider", "same", "back")] == [x, x, x, x]
    assert reader.root(by_name["low"]) is by_name["low"]
    assert reader.root(x) is x


# Activations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("y = Sigmoid (z)", "sigmoid"),
        ("a = Sigmoid (z)  y = Mul (z, a)", "silu"),
        ("a = Sigmoid (z)  y = Mul (a, z)", "silu"),
        ("y = Swish (z)", "silu"),
        ("y = Swish <alpha = 1.0> (z)", "silu"),
    ],
)
def test_activations(body: str, kind: str) -> None:
    reader, by_name = read(body, "float[2, 8] x, float[2, 8] z", 24)
    term = reader.terms[by_name["y"]]
    assert isinstance(term, Activated)
    assert (term.kind, term.root, term.taken) == (kind, by_name["z"], by_name["z"])


@pytest.mark.parametrize("body", ["y = Swish <alpha = 2.0> (z)", "a = Sigmoid (z)  y = Mul (x, a)", "y = Tanh (z)"])
def test_other_activations_have_no_formula(body: str) -> None:
    assert term_of(body, "float[2, 8] x, float[2, 8] z", 24) is None


# Normalized values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "divided"),
    [
        (ROOT + "y = Div (x, r)", True),
        (ROOT + "f = Reciprocal (r)  y = Mul (x, f)", False),
        (MEAN + "f = Pow (e, minus)  y = Mul (f, x)", False),
    ],
)
def test_normalized_values(body: str, divided: bool) -> None:
    reader, by_name = read(body)
    term = reader.terms[by_name["y"]]
    assert isinstance(term, Normed)
    assert (term.value, term.root, term.operand) == (by_name["y"], by_name["x"], by_name["x"])
    assert (term.eps, term.coefficient, term.divided, term.inner) == (0.125, 1.0, divided, ir.DataType.FLOAT)
    assert (term.reduce, term.steps, term.previous) == (by_name["m"].producer(), (), None)
    assert reader.refusals == {}


def test_a_factor_on_the_statistic_moves_into_epsilon_and_the_coefficient() -> None:
    """Sum of squares: (8 m + 0.125)^(-1/2) = 8^(-1/2) (m + 0.125/8)^(-1/2), and 2 for the factor."""
    body = "s = Mul (x, x)  m = ReduceSum (s, last)  e = Add (m, eps)  r = Sqrt (e)  f = Div (two, r)  y = Mul (x, f)"
    term = term_of(body)
    assert isinstance(term, Normed)
    assert term.eps == 0.125 / 8
    assert term.coefficient == 2 / math.sqrt(8)


STEPS = ROOT + "n = Div (x, r)  "


@pytest.mark.parametrize(
    ("body", "steps"),
    [
        ("y = Mul (n, w)", [("scale", "w")]),
        ("y = Mul (w, n)", [("scale", "w")]),
        ("v = Mul (n, w)  y = Add (v, b)", [("scale", "w"), ("bias", "b")]),
        ("a = Sigmoid (z)  y = Mul (n, a)", [("gate", "z")]),
        ("v = Mul (n, w)  a = Swish (z)  y = Mul (a, v)", [("scale", "w"), ("gate", "z")]),
        ("y = Mul (n, ones)", [("scale", "ones")]),
        ("y = Identity (n)", []),
    ],
)
def test_steps(body: str, steps: list[tuple[str, str]]) -> None:
    reader, by_name = read(STEPS + body, "float[2, 8] x, float[2, 8] z", 24)
    term = reader.terms[by_name["y"]]
    assert isinstance(term, Normed)
    wanted = [(kind, ir.DataType.FLOAT, by_name[name]) for kind, name in steps]
    assert [(step.kind, step.dtype, step.operand) for step in term.steps] == wanted
    assert by_name["n"] in reader.continued
    assert by_name["y"] not in reader.continued


def test_a_cast_is_a_step() -> None:
    term = term_of(STEPS + "y = Cast <to = 10> (n)")
    assert isinstance(term, Normed)
    ((kind, dtype),) = [(step.kind, step.dtype) for step in term.steps]
    assert (kind, dtype) == ("cast", ir.DataType.FLOAT16)


def test_our_own_ones_are_no_weight() -> None:
    model = parsed(f"g (float[2, 8] x) => (bool[2, 8] other) {CONSTANTS} {{ {STEPS} y = Mul (n, ones) "
                   "other = IsNaN (x) }")  # fmt: skip
    fill_types(model)
    by_name = values(model)
    by_name["ones"].name = f"{ONES}.8"
    reader = GraphReader()
    reader.read(model.graph)
    term = reader.terms[by_name["y"]]
    assert isinstance(term, Normed)
    assert term.steps == ()


def test_a_constant_is_taken_into_a_coefficient_that_is_not_yet_one() -> None:
    body = MEAN + "r = Sqrt (e)  f = Div (two, r)  n = Mul (x, f)  y = Div (n, two)"
    term = term_of(body)
    assert isinstance(term, Normed)
    assert (term.coefficient, term.steps) == (1.0, ())


def test_a_weight_may_be_multiplied_with_x_or_with_the_factor_first() -> None:
    for body in ("v = Mul (x, w)  y = Div (v, r)", "f = Reciprocal (r)  g = Mul (f, w)  y = Mul (x, g)"):
        reader, by_name = read(ROOT + body)
        term = reader.terms[by_name["y"]]
        assert isinstance(term, Normed)
        (step,) = term.steps
        assert (step.kind, step.operand) == ("scale", by_name["w"])


def test_groups_are_reshaped_back() -> None:
    body = """t = Constant <value = int64[3] {2, 2, 4}> ()  x = Reshape (z, t)
    s = Mul (x, x)  m = ReduceMean (s, last)  r = Sqrt (m)  n = Div (x, r)  u = Shape (z)  y = Reshape (n, u)"""
    reader, by_name = read(body, "float[2, 8] z")
    term = reader.terms[by_name["y"]]
    assert isinstance(term, Normed)
    assert [step.kind for step in term.steps] == ["reshape"]


@pytest.mark.parametrize("second", ["k = Neg (n)", "k = Add (n, x)"])
def test_nothing_goes_on_from_a_value_that_others_read_too(second: str) -> None:
    reader, by_name = read(STEPS + f"y = Mul (n, w)  {second}")
    assert by_name["n"] in reader.terms
    assert by_name["y"] not in reader.terms
    assert reader.continued == set()


@pytest.mark.parametrize("operand", ["v", "z"])
def test_what_is_no_vector_of_the_row_is_no_weight(operand: str) -> None:
    assert term_of(STEPS + f"y = Mul (n, {operand})", "float[2, 8] x, float[2, 8] z, float[2, 1] v") is None


def test_bodies_of_control_flow_are_read() -> None:
    branch = "{ x2 = Identity (x)  s = Mul (x2, x2)  m = ReduceMean (s, last)  r = Sqrt (m)  y = Div (x2, r) }"
    model = parsed(
        f"g (float[2, 8] x, bool c) => (float[2, 8] out) {CONSTANTS} {{ out = If (c) <"
        f"then_branch = t () => (float[2, 8] y) {branch}, else_branch = e () => (float[2, 8] k) {{ k = Neg (x) }}> }}"
    )
    fill_types(model)
    reader = GraphReader()
    reader.read(model.graph)
    assert [term.value.name for term in reader.terms.values() if isinstance(term, Normed)] == ["y"]


def test_a_whole_operator_is_read() -> None:
    reader, by_name = read("y = RMSNormalization <epsilon = 0.125> (x, w)", opset=23)
    term = reader.terms[by_name["y"]]
    assert isinstance(term, Normed)
    assert (term.eps, term.reduce, len(term.nodes)) == (0.125, by_name["y"].producer(), 1)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("c = ReduceMean (z, last)  x = Sub (z, c)  " + ROOT + "y = Div (x, r)", "it is a LayerNorm"),
        ("s = Mul (x, x)  m = ReduceMean (s, last)  r = Sqrt (m)  e = Add (r, eps)  y = Div (x, e)",
         "epsilon is added outside of the root"),
        ("s = Mul (x, x)  m = ReduceSum (s, last)  n = Div (m, z)  y = Sqrt (n)",
         "divided by a value that is not constant"),
        ("s = Mul (x, x)  m = ReduceSum (s, last)  n = Max (m, eps)  r = Sqrt (n)  y = Div (x, r)",
         "the statistic is clamped"),
        (MEAN + "y = Div (x, e)", "another power of the statistic than -1/2"),
        (ROOT + "y = Mul (x, r)", "another power of the statistic than -1/2"),
        ("s = Mul (x, x)  m = ReduceMean <keepdims = 0> (s, last)  r = Sqrt (m)  y = Div (x, r)",
         "the reduced dims are removed"),
        (ROOT + "y = Div (z, r)", "the value that is squared is not the value that is scaled"),
        ("s = Mul (x, x)  m = ReduceMean (s, last)  y = Add (m, v)", "a value that is not constant is added"),
        ("s = Mul (x, x)  m = ReduceMean (s)", "reduces over axes that are not constant"),
        ("s = Mul (x, x)  m = ReduceMean (s, first)", "axes [-2], which are not the trailing ones"),
        ("s = Mul (u, u)  m = ReduceSum (s, last)", "sums squares over a dynamic width"),
        ("s = Mul (x, x)  m = ReduceMean (s, last)  e = Sub (m, eps)  r = Sqrt (e)  y = Div (x, r)",
         "its mean of squares or its epsilon is negative or not finite"),
    ],
)  # fmt: skip
def test_refusals(body: str, reason: str) -> None:
    given = "float[8, 8] z, float[8, 1] v, float[8, n] u" + ("" if "x = Sub" in body else ", float[8, 8] x")
    reader, by_name = read(body, given)
    ((node, said),) = reader.refusals.items()
    assert node is by_name["m"].producer()
    assert reason in said
    assert not any(isinstance(term, Normed) for term in reader.terms.values())
