"""How messages and reports name a node."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from rmsnorm_deploy.export.graph.site import node_name
from rmsnorm_deploy.export.recognition.find_norms import find_graph_norms
from tests.helpers.graphs.onnx_text import parsed

NORM = """<float two = {2.0}, float eps = {0.125}, int64[1] last = {-1}>
    { s = Mul (x, x)  m = ReduceMean (s, last)  e = Add (m, eps)  r = Sqrt (e)  y = Div (x, r) }"""


@pytest.mark.parametrize(
    ("name", "outputs", "shown"),
    [("n", ["a"], "n"), ("", ["a", "b"], "a"), (None, ["", "b"], "b"), ("", [""], ""), (None, [], "")],
)
def test_a_node_without_a_name_is_shown_by_its_first_output(name: str | None, outputs: list[str], shown: str) -> None:
    node = ir.Node("", "Split", [], outputs=[ir.Value(name=output) for output in outputs], name=name)
    assert node_name(node) == shown


def test_norms_and_refusals_without_names_are_shown_by_outputs() -> None:
    model = parsed(f"g (float[2, 8] x) => (float[2, 8] y) {NORM}")
    for node in model.graph:
        node.name = None
    (site,) = find_graph_norms(model).sites
    assert (site.node, site.path) == ("m", "y")
    other = parsed(f"g (float[2, 8] x) => (float[2, 8] y) {NORM.replace('{-1}', '{0}')}")
    for node in other.graph:
        node.name = None
    (refusal,) = find_graph_norms(other).refusals
    assert (refusal.node, refusal.path, refusal.op_type) == ("m", "m", "ReduceMean")
