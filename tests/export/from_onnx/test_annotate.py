"""Notes on the nodes of somebody else's file, as an export writes them."""

from __future__ import annotations

import json

import onnx_ir as ir

from rmsnorm_deploy.export.from_onnx.annotate import annotate
from rmsnorm_deploy.export.graph.metadata import FORM_KEY, PATH_KEY, SPEC_KEY, TARGET_KEY, VALUES_KEY
from rmsnorm_deploy.models.spec import NormSpec
from tests.helpers.graphs.onnx_text import parsed, values

CONSTANTS = """<float two = {2.0}, float eps = {0.125}, int64[1] last = {-1},
float[8] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}>"""
NORM = "s = Pow (t, two)  m = ReduceMean (s, last)  e = Add (m, eps)  r = Sqrt (e)  n = Div (t, r)  y = Mul (n, w)"


def graph(body: str = "t = Neg (x)  " + NORM + "  o = Neg (y)", inputs: str = "float[2, 8] x") -> ir.Model:
    model = parsed(f"g ({inputs}) => (float[2, 8] o) {CONSTANTS} {{ {body} }}")
    values(model)["w"].name = "layer.norm.weight"
    return model


def notes(model: ir.Model) -> dict[str, dict[str, str]]:
    return {str(n.outputs[0].name): dict(n.metadata_props) for n in model.graph if n.metadata_props}


def test_each_node_has_path_and_form_and_the_last_one_spec_and_values() -> None:
    model = graph()
    annotate(model)
    found = notes(model)
    assert set(found) == {"s", "m", "e", "r", "n", "y"}
    core = found.pop("y")
    plain = {PATH_KEY: "layer.norm", FORM_KEY: "plain"}
    assert all(row == plain for row in found.values())
    assert NormSpec.from_json(core.pop(SPEC_KEY)) == NormSpec(0.125, root="sqrt")
    assert json.loads(core.pop(VALUES_KEY)) == {"x": "t", "y": "y"}
    assert core == plain
    assert not any(TARGET_KEY in node.metadata_props for node in model.graph)


def test_a_residual_add_is_not_part_of_the_norm() -> None:
    model = graph("t = Add (x, z)  " + NORM + "  o = Add (y, t)", "float[2, 8] x, float[2, 8] z")
    annotate(model)
    assert set(notes(model)) == {"s", "m", "e", "r", "n", "y"}


def test_casts_between_x_and_the_norm_belong_to_it() -> None:
    text = "h = Neg (x)  t = Cast <to = 1> (h)  " + NORM + "  o = Cast <to = 10> (y)"
    model = parsed(f"g (float16[2, 8] x) => (float16[2, 8] o) {CONSTANTS} {{ {text} }}")
    annotate(model)
    found = notes(model)
    assert set(found) == {"t", "s", "m", "e", "r", "n", "y", "o"}
    assert json.loads(found["o"][VALUES_KEY]) == {"x": "h", "y": "o"}


def test_a_gate_is_noted() -> None:
    text = "t = Neg (x)  " + NORM + "  a = Sigmoid (z)  o = Mul (y, a)"
    model = graph(text, "float[2, 8] x, float[2, 8] z")
    annotate(model)
    assert json.loads(notes(model)["o"][VALUES_KEY]) == {"x": "t", "y": "o", "gate": "z"}


def test_a_model_with_notes_is_left_as_it_is() -> None:
    model = graph()
    model.graph[0].metadata_props[SPEC_KEY] = "anything"
    before = ir.to_proto(model)
    annotate(model)
    assert ir.to_proto(model) == before


def test_nodes_without_a_name_get_a_free_one() -> None:
    model = graph()
    for node in model.graph:
        node.name = "layer.norm/Pow" if node.op_type == "Neg" else None
    annotate(model)
    names = [node.name for node in model.graph if PATH_KEY in node.metadata_props]
    assert names == ["layer.norm/Pow_1", *(f"layer.norm/{op}" for op in ("ReduceMean", "Add", "Sqrt", "Div", "Mul"))]


def test_a_norm_inside_a_body_of_control_flow_is_left() -> None:
    inner = NORM.replace("(t", "(x")
    model = parsed(f"g (float[2, 8] x, bool c) => (float[2, 8] o) {CONSTANTS} {{ o = If (c) <"
                   f"then_branch = a () => (float[2, 8] y) {{ {inner} }},"
                   "else_branch = b () => (float[2, 8] q) { q = Neg (x) }> }")  # fmt: skip
    annotate(model)
    assert [node for node in model.graph.all_nodes() if node.metadata_props] == []


def test_an_operator_that_keeps_its_sum_to_itself_is_left() -> None:
    body = "o = com.microsoft.SkipSimplifiedLayerNormalization (x, z, w)"
    model = parsed(f"g (float[2, 8] x, float[2, 8] z) => (float[2, 8] o) {CONSTANTS} {{ {body} }}", 18, "com.microsoft")
    annotate(model)
    assert notes(model) == {}
