"""The norms of a whole graph: in order, with their paths, what the file's notes add, and operators that add as well."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from rmsnorm_deploy.export.graph.constants import constant
from rmsnorm_deploy.export.graph.metadata import ONES, PATH_KEY, SPEC_KEY
from rmsnorm_deploy.export.graph.site import GraphSite
from rmsnorm_deploy.export.recognition.find_norms import find_graph_norms, find_norms
from rmsnorm_deploy.export.recognition.fused_ops import OTHER_PLUGIN
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.plugins import contract
from tests.helpers.graphs.onnx_text import parsed, values

CONSTANTS = """<float two = {2.0}, float eps = {0.125}, int64[1] last = {-1}, float[1] single = {2.0},
float[3] narrow = {1.0, 1.0, 1.0},
float[8] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}, float[8] w2 = {0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0}>"""
SPEC = NormSpec(0.125, root="sqrt")


def norm(x: str, weight: str, y: str) -> str:
    """The nodes of one norm; names begin with the result's."""
    return f"""{y}s = Mul ({x}, {x})  {y}m = ReduceMean ({y}s, last)  {y}e = Add ({y}m, eps)  {y}r = Sqrt ({y}e)
    {y}n = Div ({x}, {y}r)  {y} = Mul ({y}n, {weight})  """


def graph(body: str, outputs: str = "float[2, 8] y", *domains: str, opset: int = 20) -> ir.Model:
    return parsed(f"g (float[2, 8] x, float[2, 8] z) => ({outputs}) {CONSTANTS} {{ {body} }}", opset, *domains)


def only(model: ir.Model) -> GraphSite:
    found = find_graph_norms(model)
    assert found.refusals == []
    (site,) = found.sites
    return site


def test_a_site_says_what_stands_where() -> None:
    model = graph(norm("x", "w", "y"))
    by_name = values(model)
    site = only(model)
    assert (site.spec, site.form, site.target, site.node) == (SPEC, "plain", None, "node_ym")
    assert (site.x, site.weight, site.y) == (by_name["x"], by_name["w"], by_name["y"])
    assert (site.bias, site.gate, site.sum_of) == (None, None, None)
    assert (site.shape, site.dtype) == ((2, 8), ir.DataType.FLOAT)
    assert [node.outputs[0].name for node in site.nodes] == ["ys", "ym", "ye", "yr", "yn", "y"]


def test_sites_are_in_graph_order_and_an_add_in_front_is_a_residual() -> None:
    model = graph(norm("x", "w", "a") + "t = Add (a, z)  " + norm("t", "w2", "y"), "float[2, 8] y, float[2, 8] t")
    by_name = values(model)
    first, second = find_graph_norms(model).sites
    assert (first.y.name, first.form, second.y.name, second.form) == ("a", "plain", "y", "residual_add")
    assert second.sum_of == (by_name["a"], by_name["z"])
    assert by_name["t"].producer() not in second.nodes


def test_a_graph_without_norms() -> None:
    found = find_graph_norms(graph("y = Neg (x)"))
    assert (found.sites, found.refusals) == ([], [])


def test_refusals_are_in_graph_order_with_their_nodes() -> None:
    body = "c = ReduceMean (x, last)  d = Sub (x, c)  " + norm("d", "w", "a")
    body += "s = Mul (z, z)  m = ReduceSum (s, last)  k = Max (m, eps)  r = Sqrt (k)  l = Div (z, r)  y = Add (a, l)"
    found = find_graph_norms(graph(body))
    assert found.sites == []
    assert [(row.node, row.op_type) for row in found.refusals] == [("node_am", "ReduceMean"), ("node_m", "ReduceSum")]
    assert "LayerNorm" in found.refusals[0].reason
    assert "the statistic is clamped" in found.refusals[1].reason
    assert found.refusals[1].to_dict() == {
        "path": "node_m", "class": "ReduceSum", "reason": found.refusals[1].reason, "node": "node_m",
    }  # fmt: skip


def test_an_l2_norm_is_refused_once() -> None:
    found = find_graph_norms(graph("r = ReduceL2 (x, last)  y = Div (x, r)"))
    assert found.sites == []
    ((reason, node),) = [(row.reason, row.node) for row in found.refusals]
    assert (node, "an L2 norm" in reason) == ("node_r", True)


def test_a_norm_across_bodies_is_refused() -> None:
    body = """m0 = Mul (x, x)  m = ReduceMean (m0, last)  e = Add (m, eps)  r = Sqrt (e)
    c = Constant <value_int = 1> ()
    k = Cast <to = 9> (c)
    y = If (k) <then_branch = t () => (float[2, 8] p) { p = Div (x, r) },
    else_branch = u () => (float[2, 8] q) { q = Neg (x) }>"""
    found = find_graph_norms(graph(body))
    assert found.sites == []
    assert [row.reason for row in found.refusals] == ["it is spread over several subgraphs of control flow"]


def test_find_graph_norms_fills_in_the_types_that_find_norms_needs() -> None:
    model = graph("k = Neg (x)  " + norm("k", "w", "y"))
    assert find_norms(model).sites == []
    assert [site.spec for site in find_graph_norms(model).sites] == [SPEC]
    assert [site.spec for site in find_norms(model).sites] == [SPEC]


# Paths ----------------------------------------------------------------------------------------------------------------


def renamed(nodes: dict[str, str] | None = None, weight: str = "w", metadata: dict[str, str] | None = None) -> str:
    """The path of one norm whose nodes (by output), weight and notes are as given."""
    model = graph(norm("x", "w", "y"))
    by_name = values(model)
    by_name["w"].name = weight
    for name, text in (nodes or {}).items():
        by_name[name].producer().name = text  # type: ignore[union-attr]
    by_name["y"].producer().metadata_props.update(metadata or {})  # type: ignore[union-attr]
    return only(model).path


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ({"metadata": {PATH_KEY: "layers.3.norm"}, "weight": "other.weight"}, "layers.3.norm"),
        ({"weight": "layers.1.norm.weight"}, "layers.1.norm"),
        ({"weight": "blk.ln.gamma"}, "blk.ln"),
        ({"weight": "blk.ln.scale_quantized"}, "blk.ln"),
        ({"metadata": {"pkg.torch.onnx.name_scopes": "['', 'layers.2', 'layers.2.norm', 'mul']"}}, "layers.2.norm"),
        ({"nodes": {"ys": "/model/layers.0/norm/Mul"}}, "model.layers.0.norm"),
        ({}, "node_ys"),
    ],
)
def test_paths(arguments: dict[str, Any], path: str) -> None:
    assert renamed(**arguments) == path


def test_a_weight_of_several_norms_names_none_of_them() -> None:
    model = graph(norm("x", "w", "a") + norm("z", "w", "b") + "y = Add (a, b)")
    values(model)["w"].name = "layers.0.norm.weight"
    assert [site.path for site in find_graph_norms(model).sites] == ["layers.0.norm", "layers.0.norm"]
    for name in ("as", "bs"):
        values(model)[name].producer().name = f"/{name}/Mul"  # type: ignore[union-attr]
    assert [site.path for site in find_graph_norms(model).sites] == ["as", "bs"]


# Notes ----------------------------------------------------------------------------------------------------------------


def noted(text: str) -> GraphSite:
    model = graph(norm("x", "w", "y"))
    values(model)["y"].producer().metadata_props[SPEC_KEY] = text  # type: ignore[union-attr]
    return only(model)


@pytest.mark.parametrize(
    "spec",
    [SPEC.replace(order="cast_then_scale"), SPEC.replace(root="rsqrt"), SPEC.replace(statistics="promoted")],
)
def test_notes_tell_what_a_graph_does_not_show(spec: NormSpec) -> None:
    assert noted(spec.to_json()).spec == spec


def test_notes_of_one_plus_weight_give_the_weight_before_one_was_added() -> None:
    site = noted(SPEC.replace(scale="one_plus_weight").to_json())
    array = constant(site.weight)
    assert array is not None
    assert (site.spec.scale, array.tolist()) == ("one_plus_weight", [0, 1, 2, 3, 4, 5, 6, 7])


@pytest.mark.parametrize(
    "text",
    [
        SPEC.replace(eps=0.25, order="cast_then_scale").to_json(),
        SPEC.replace(bias=True, order="cast_then_scale").to_json(),
        SPEC.replace(scale="none", order="cast_then_scale").to_json(),
        SPEC.replace(group_size=4, order="cast_then_scale").to_json(),
        "{}", "no json",
    ],
)  # fmt: skip
def test_notes_that_the_graph_contradicts_are_not_believed(text: str) -> None:
    assert noted(text).spec == SPEC


# Operators that add and normalize -------------------------------------------------------------------------------------

ORT = "com.microsoft"


def skip_norm(inputs: str = "x, z, w", outputs: str = "y", rest: str = "", attributes: str = "epsilon = 0.125") -> Any:
    body = f"{outputs} = {ORT}.SkipSimplifiedLayerNormalization <{attributes}> ({inputs})  {rest}"
    return graph(body, "float[2, 8] " + ("y" if not rest else rest.partition(" ")[0]), ORT)


def test_onnx_runtimes_operator_without_its_sum() -> None:
    model = skip_norm()
    by_name = values(model)
    site = only(model)
    assert (site.spec, site.form, site.target) == (SPEC, "residual_add", "ort")
    assert (site.x, site.sum_of) == (None, (by_name["x"], by_name["z"]))
    assert (site.weight, site.y, site.nodes) == (by_name["w"], by_name["y"], (by_name["y"].producer(),))


def test_onnx_runtimes_operator_with_its_sum() -> None:
    site = only(skip_norm(outputs="y, a, b, t", rest="q = Add (y, t)"))
    assert site.x is not None
    assert site.x.name == "t"


def test_epsilon_of_an_operator_is_1e_5_where_it_is_left_out() -> None:
    body = f"y = {ORT}.SkipSimplifiedLayerNormalization (x, z, w)"
    assert only(graph(body, "float[2, 8] y", ORT)).spec.eps == 1e-5


def test_our_operator() -> None:
    body = f"y, t = {contract.DOMAIN}.{contract.ADD_RMS_NORM} <epsilon = 0.125, scale_offset = 1.0> (x, z, w)"
    site = only(graph(body, "float[2, 8] y", contract.DOMAIN))
    assert (site.spec, site.target) == (SPEC.replace(scale="one_plus_weight"), "plugin")
    assert site.x is not None
    assert site.x.name == "t"


def test_our_own_ones_are_no_weight() -> None:
    model = skip_norm()
    values(model)["w"].name = f"{ONES}.8"
    site = only(model)
    assert (site.spec.scale, site.weight) == ("none", None)


PLUGIN = f"{contract.ORT_DOMAIN}.{contract.ADD_RMS_NORM}"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (skip_norm("x, z, w, w2"), "it adds a bias to the sum"),
        (skip_norm("x, w, w"), "the shapes of its two inputs are not known to be equal"),
        (skip_norm("x, z, single"), "the shape of its scale differs"),
        (skip_norm("x, z, narrow"), "the shape of its scale differs"),
        (skip_norm(outputs="y, a, b, t", rest="q = Neg (a)"), "its statistics are used elsewhere"),
        (skip_norm("x, z, last"), "the shape of its scale differs"),
        (graph(f"k = Cast <to = 10> (w)  y = {ORT}.SkipSimplifiedLayerNormalization (x, z, k)", "float[2, 8] y", ORT),
         "the dtype of its scale differs from that of its input"),
        (graph(f"k = Cast <to = 7> (x)  y = {ORT}.SkipSimplifiedLayerNormalization (k, z, w)", "float[2, 8] y", ORT),
         "the dtype of its inputs is unknown"),
        (graph(f'y = {PLUGIN} <plugin_namespace = "theirs"> (x, z, w)', "float[2, 8] y", contract.ORT_DOMAIN),
         OTHER_PLUGIN),
        (graph(f"y = {contract.DOMAIN}.{contract.ADD_RMS_NORM} <scale_offset = 0.5> (x, z, w)", "float[2, 8] y",
               contract.DOMAIN), "it adds 0.5 to its scale"),
    ],
)  # fmt: skip
def test_operators_that_are_refused(model: ir.Model, reason: str) -> None:
    found = find_graph_norms(model)
    assert found.sites == []
    (row,) = found.refusals
    assert reason in row.reason
    assert row.op_type in (contract.ADD_RMS_NORM, "SkipSimplifiedLayerNormalization")
