"""The residual add in front of a norm: two operands of x's own shape, and nothing else."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from rmsnorm_deploy.export.graph.infer_types import fill_types
from rmsnorm_deploy.export.graph.residual import residual_operands
from tests.helpers.graphs.onnx_text import parsed, values

INPUTS = "float[n, 8] a, float[n, 8] b, float[8] v, float[m, 8] z, float16[n, 8] h, bool c"


def operands(body: str, x: str = "x", y: str = "y") -> list[str] | None:
    model = parsed(f"g ({INPUTS}) => (float[n, 8] y) <float[1, 8] w = {{1., 1., 1., 1., 1., 1., 1., 1.}}> {{ {body} }}")
    fill_types(model)
    by_name = values(model)
    found = residual_operands(by_name[x], by_name[y])
    return None if found is None else [str(value.name) for value in found]


def test_a_sum_of_two_values_of_one_shape() -> None:
    assert operands("x = Add (a, b)  y = Neg (x)") == ["a", "b"]
    assert operands("x = Add (b, a)  k = Neg (x)  y = Neg (k)") == ["b", "a"]


def test_a_value_added_to_itself() -> None:
    assert operands("x = Add (a, a)  y = Neg (x)") == ["a", "a"]


@pytest.mark.parametrize(
    "add",
    [
        "x = Sub (a, b)", "x = Add (a, v)", "x = Add (v, a)", "x = Add (a, z)", "x = Add (a, w)",
        "k = Constant <value = float[1, 8] {1., 1., 1., 1., 1., 1., 1., 1.}> ()  x = Add (a, k)",
        "k = Cast <to = 10> (a)  l = Add (k, h)  x = Cast <to = 1> (l)",
    ],
)  # fmt: skip
def test_what_is_no_residual(add: str) -> None:
    assert operands(add + "  y = Neg (x)") is None


def test_a_constant_of_xs_own_shape_is_no_residual() -> None:
    model = parsed("g (float[1, 2] a) => (float[1, 2] y) <float[1, 2] w = {1., 2.}> { x = Add (a, w)  y = Neg (x) }")
    fill_types(model)
    by_name = values(model)
    assert residual_operands(by_name["x"], by_name["y"]) is None
    body = "k = Constant <value = float[1, 2] {1., 2.}> ()  x = Add (k, a)  y = Neg (x)"
    model = parsed(f"g (float[1, 2] a) => (float[1, 2] y) {{ {body} }}")
    fill_types(model)
    by_name = values(model)
    assert residual_operands(by_name["x"], by_name["y"]) is None


def test_an_input_of_the_graph_is_no_sum() -> None:
    assert operands("y = Neg (a)", x="a") is None


def test_an_add_of_another_domain_is_none() -> None:
    add = ir.node("Add", [ir.Value(name="a"), ir.Value(name="b")], domain="elsewhere")
    last = ir.node("Neg", [add.outputs[0]])
    ir.Graph([], [], nodes=[add, last])
    assert residual_operands(add.outputs[0], last.outputs[0]) is None


def test_the_norm_must_stand_in_the_graph_of_the_add() -> None:
    model = parsed(f"""g ({INPUTS}) => (float[n, 8] o) {{ x = Add (a, b)
    o = If (c) <then_branch = t () => (float[n, 8] y) {{ y = Neg (x) }},
    else_branch = e () => (float[n, 8] q) {{ q = Exp (x) }}> }}""")
    fill_types(model)
    inner = next(node.outputs[0] for node in model.graph.all_nodes() if node.outputs[0].name == "y")
    assert residual_operands(values(model)["x"], inner) is None
