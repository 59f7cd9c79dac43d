"""A whole graph rewritten: sites before and after, opsets, refusals, notes, and what stays untouched."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from rmsnorm_deploy.export.from_onnx.rewrite import fuse_quantized, rewrite
from rmsnorm_deploy.export.lowering.table import HIGHEST_OPSET, TARGETS
from rmsnorm_deploy.models.errors import UnsupportedError, UsageError
from rmsnorm_deploy.plugins import contract
from tests.helpers.graphs.onnx_text import op_types, parsed, values

CONSTANTS = """<float two = {2.0}, float eps = {0.125}, int64[1] last = {-1}, float scale = {0.5}, int8 zero = {0},
float[8] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}>"""
STANDARD = "y = RMSNormalization <epsilon = 0.125> (t, w)"


def norm(x: str = "t", y: str = "y") -> str:
    """The nodes of one norm; names of values end with the result's."""
    return (
        f"s{y} = Pow ({x}, two)  m{y} = ReduceMean (s{y}, last)  e{y} = Add (m{y}, eps)  r{y} = Sqrt (e{y})  "
        f"n{y} = Div ({x}, r{y})  {y} = Mul (n{y}, w)  "
    )


def graph(body: str, opset: int = 18, *domains: str, outputs: str = "float[2, 8] y", dtype: str = "float") -> ir.Model:
    inputs = f"{dtype}[2, 8] x, {dtype}[2, 8] z"
    return parsed(f"g ({inputs}) => ({outputs}) {CONSTANTS} {{ {body} }}", opset, *domains)


def plain(opset: int = 18) -> ir.Model:
    return graph("t = Neg (x)  " + norm(), opset)


# Sites and models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "operators", "opset"),
    [
        ("standard", ["Neg", "RMSNormalization"], 23),
        ("ort", ["Neg", "SimplifiedLayerNormalization"], 18),
        ("plugin", ["Neg", contract.RMS_NORM], 18),
    ],
)
def test_a_norm_in_each_target_that_has_one_operator(target: str, operators: list[str], opset: int) -> None:
    given = plain()
    result = rewrite(given, target)
    assert op_types(result.model) == operators
    assert result.model.graph.opset_imports[""] == opset
    assert result.notes == ([f"opset import raised from 18 to {opset}"] if opset > 18 else [])
    assert (result.changed, result.refusals, result.split, result.quantized) == (True, [], 0, [])
    assert len(result.model.functions) == (1 if target == "plugin" else 0)


def test_the_site_before_and_after() -> None:
    result = rewrite(plain(), "standard")
    (site,) = result.sites
    before, after = values(result.original), values(result.model)
    assert (site.before.x, site.before.y) == (before["t"], before["y"])
    assert (site.x, site.y, site.gate, site.sum_of) == (after["t"], after["y"], None, None)
    assert site.lowered is not None
    assert site.lowered.node == result.model.graph[1].name
    assert (site.changed, site.stood) == (True, False)


def test_the_given_model_keeps_its_nodes_and_its_untyped_values() -> None:
    given = plain()
    operators = op_types(given)
    result = rewrite(given, "ort")
    assert result.original is given
    assert op_types(given) == operators
    assert given.graph.opset_imports == {"": 18}
    by_name = values(result.model)
    assert by_name["t"].dtype == ir.DataType.FLOAT


def test_types_that_the_file_did_not_have_are_taken_back_except_at_norms() -> None:
    result = rewrite(graph("k = Abs (x)  t = Neg (k)  " + norm()), "ort")
    by_name = values(result.model)
    assert (by_name["k"].dtype, by_name["k"].shape) == (None, None)
    assert (by_name["t"].dtype, by_name["y"].dtype) == (ir.DataType.FLOAT, ir.DataType.FLOAT)


def test_a_norm_that_stands_in_the_targets_form() -> None:
    result = rewrite(graph("t = Neg (x)  " + STANDARD, 23), "standard")
    (site,) = result.sites
    assert (site.changed, site.stood, result.changed) == (False, True, False)
    assert op_types(result.model) == ["Neg", "RMSNormalization"]
    assert result.notes == []


def test_onnx_runtimes_own_operator_is_left_for_its_own_target() -> None:
    body = "y = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.125> (x, z, w)"
    given = graph(body, 18, "com.microsoft")
    (site,) = rewrite(given, "ort").sites
    assert (site.changed, site.stood, site.lowered, site.x) == (False, True, None, None)
    result = rewrite(given, "primitives")
    assert "SkipSimplifiedLayerNormalization" not in op_types(result.model)
    assert result.sites[0].sum_of == (values(result.model)["x"], values(result.model)["z"])


def test_skip_leaves_norms_by_their_number() -> None:
    given = graph("t = Neg (x)  " + norm("t", "a") + norm("a", "y"))
    result = rewrite(given, "ort", skip={0})
    assert [site.changed for site in result.sites] == [False, True]
    assert op_types(result.model) == ["Neg", "Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul",
                                      "SimplifiedLayerNormalization"]  # fmt: skip
    assert result.sites[1].x is values(result.model)["a"]


def test_values_of_a_site_follow_the_norms_written_after_it() -> None:
    """The second norm reads the first one's result: `x` of the second is the first's new result."""
    result = rewrite(graph("t = Neg (x)  " + norm("t", "a") + norm("a", "y")), "ort")
    first, second = result.sites
    assert first.y is second.x
    assert first.y is result.model.graph[1].outputs[0]


def test_a_graph_without_norms_stays_and_keeps_its_opset() -> None:
    result = rewrite(graph("y = Neg (x)"), "standard")
    assert (result.sites, result.changed, result.notes) == ([], False, [])
    assert result.model.graph.opset_imports == {"": 18}


def test_nodes_in_another_order_are_sorted() -> None:
    given = plain()
    nodes = list(given.graph)
    for node in nodes:
        given.graph.remove(node)
    given.graph.extend(reversed(nodes))
    result = rewrite(given, "ort")
    assert op_types(result.model) == ["Neg", "SimplifiedLayerNormalization"]


def test_functions_with_norms_are_inlined_and_named() -> None:
    given = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 18, "f" : 1]> g (float[2, 8] x) => (float[2, 8] y) { y = f.norm (x) }'
        '<domain: "f", opset_import: ["" : 18]> norm (v) => (u) { last = Constant <value_ints = [-1]> ()'
        "  s = Mul (v, v)  m = ReduceMean (s, last)  r = Sqrt (m)  u = Div (v, r) }"
    )
    result = rewrite(given, "ort")
    assert result.notes == ["inlined, because they contain norms: f::norm"]
    assert result.original is not given
    assert op_types(given) == ["norm"]
    assert [site.changed for site in result.sites] == [True]


def test_an_ir_version_before_4_is_raised_for_new_constants() -> None:
    given = plain()
    given.ir_version = 3
    assert rewrite(given, "ort").model.ir_version == 4
    assert rewrite(graph("y = Neg (x)"), "ort").model.ir_version == 8


# Opsets and refusals --------------------------------------------------------------------------------------------------


def test_an_opset_may_be_asked_for() -> None:
    result = rewrite(plain(), "ort", opset=21)
    assert result.model.graph.opset_imports[""] == 21
    assert result.notes == ["opset import raised from 18 to 21"]


def test_a_file_of_a_higher_opset_keeps_it() -> None:
    assert rewrite(plain(20), "ort").model.graph.opset_imports[""] == 20


@pytest.mark.parametrize(
    ("target", "opset", "kind", "message"),
    [
        ("ort", HIGHEST_OPSET + 1, UnsupportedError, "expected at most 23, got 24"),
        ("ort", 18, UsageError, "expected at least 20, the opset of the file, got 18"),
        ("standard", 20, UnsupportedError, "target 'standard' requires opset 23, got opset 20"),
        ("elsewhere", None, UsageError, "elsewhere"),
    ],
)
def test_opsets_and_targets_that_cannot_be(target: str, opset: int | None, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        rewrite(plain(20), target, opset)


def double(eps: str) -> ir.Model:
    return parsed(
        f"""g (double[2, 8] x) => (double[2, 8] y) <double eps = {{{eps}}}, int64[1] last = {{-1}}>
    {{ s = Mul (x, x)  m = ReduceMean (s, last)  e = Add (m, eps)  r = Sqrt (e)  y = Div (x, r) }}""",
        20,
    )


def test_an_epsilon_that_float32_does_not_hold_is_refused_where_it_would_be_rounded() -> None:
    with pytest.raises(
        UnsupportedError, match=r"none of the 1 norms can be written: .*which cannot represent 1e-06 exactly"
    ):
        rewrite(double("0.000001"), "ort")
    assert rewrite(double("0.125"), "ort").changed
    (site,) = rewrite(double("0.000001"), "primitives").sites
    assert site.before.spec.eps == 1e-6


def test_a_target_that_can_do_none_of_the_norms_is_an_error_and_one_that_can_do_some_is_not() -> None:
    with pytest.raises(UnsupportedError, match="none of the 1 norms can be written"):
        rewrite(double("0.125"), "plugin")
    given = parsed("""g (double[2, 8] x, float[2, 8] z) => (double[2, 8] y, float[2, 8] o) <int64[1] last = {-1}>
    { s = Mul (x, x)  m = ReduceMean (s, last)  r = Sqrt (m)  y = Div (x, r)
    s2 = Mul (z, z)  m2 = ReduceMean (s2, last)  r2 = Sqrt (m2)  o = Div (z, r2) }""")
    result = rewrite(given, "plugin")
    assert [site.changed for site in result.sites] == [False, True]
    assert [(row.node, "float64" in row.reason) for row in result.refusals] == [("node_m", True)]
    assert result.sites[0].lowered is None
    assert not result.sites[0].stood


def test_what_only_looks_like_a_norm_is_reported_and_left() -> None:
    given = graph("t = Neg (x)  " + norm() + "r = ReduceL2 (z, last)  o = Div (z, r)",
                  outputs="float[2, 8] y, float[2, 8] o")  # fmt: skip
    result = rewrite(given, "ort")
    assert [(row.node, "L2 norm" in row.reason) for row in result.refusals] == [("node_r", True)]
    assert op_types(result.model) == ["Neg", "SimplifiedLayerNormalization", "ReduceL2", "Div"]


# Plugins and quantized outputs ----------------------------------------------------------------------------------------


def test_plugin_nodes_in_the_domain_of_onnx_runtime_move_and_get_a_function() -> None:
    attributes = f'epsilon = 0.125, plugin_namespace = "{contract.PLUGIN_NAMESPACE}"'
    given = graph(f"y = {contract.ORT_DOMAIN}.{contract.RMS_NORM} <{attributes}> (x, w)", 18, contract.ORT_DOMAIN)
    result = rewrite(given, "plugin")
    (node,) = result.model.graph
    assert (node.domain, node.op_type) == (contract.DOMAIN, contract.RMS_NORM)
    assert [f.name for f in result.model.functions.values()] == [contract.RMS_NORM]
    assert given.graph[0].domain == contract.ORT_DOMAIN


QUANTIZED = "t = Neg (x)  " + norm("t", "k") + "y = QuantizeLinear (k, scale, zero)"


def quantized() -> ir.Model:
    return graph(QUANTIZED, 19, outputs="int8[2, 8] y")


def test_a_norm_with_a_quantize_node_becomes_one_operator_on_request() -> None:
    result = rewrite(quantized(), "plugin")
    assert op_types(result.model) == ["Neg", contract.RMS_NORM, "QuantizeLinear"]
    fuse_quantized(result, "plugin")
    assert op_types(result.model) == ["Neg", contract.RMS_NORM_QUANT]
    (row,) = result.quantized
    assert row.dtype == "int8"
    assert "opset import raised from 19 to 21, for norms with a quantized output" in result.notes


def test_only_the_plugin_quantizes() -> None:
    result = rewrite(quantized(), "ort")
    fuse_quantized(result, "ort")
    assert (op_types(result.model)[-1], result.quantized) == ("QuantizeLinear", [])


def test_a_quantization_that_cannot_be_taken_in_stays_and_is_noted() -> None:
    result = rewrite(quantized(), "plugin", opset=19)
    fuse_quantized(result, "plugin", opset=19)
    assert op_types(result.model)[-1] == "QuantizeLinear"
    assert any(note.startswith("the quantization of ") and "remains a separate node" in note for note in result.notes)


def test_an_operator_with_a_quantized_output_is_taken_apart_and_put_together() -> None:
    first = rewrite(quantized(), "plugin")
    fuse_quantized(first, "plugin")
    again = rewrite(first.model, "plugin")
    assert (again.split, len(again.sites)) == (1, 1)
    assert op_types(again.original) == ["Neg", contract.RMS_NORM, "QuantizeLinear"]
    assert op_types(first.model) == ["Neg", contract.RMS_NORM_QUANT]
    fuse_quantized(again, "plugin")
    assert op_types(again.model) == ["Neg", contract.RMS_NORM_QUANT]


@pytest.mark.parametrize("target", TARGETS)
def test_rewriting_twice_changes_nothing(target: str) -> None:
    once = rewrite(plain(), target)
    again = rewrite(once.model, target)
    assert not again.changed
    assert all(site.stood for site in again.sites)
    assert op_types(again.model) == op_types(once.model)


INNER = """g (float[2, 8] x) => (float[2, 8] y, float[2, k] {output}) <float two = {{2.0}}, float eps = {{0.125}},
    int64[1] last = {{-1}}, float[8] w = {{1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}}>
    {{ s = Pow (x, two)  m = ReduceMean (s, last)  e = Add (m, eps)  r = Sqrt (e)  i = Reciprocal (r)
    n = Mul (x, i)  y = Mul (n, w) }}"""


@pytest.mark.parametrize("target", ["primitives", "standard", "ort", "plugin"])
@pytest.mark.parametrize("output", ["s", "m", "e", "r", "i", "n"])
def test_an_inner_value_that_is_an_output_is_still_computed(output: str, target: str) -> None:
    given = INNER.format(output=output)
    result = rewrite(parsed(given), target)
    assert ([site.changed for site in result.sites], result.refusals) == ([True], [])
    x = {"x": np.linspace(-3.0, 4.0, 16, dtype=np.float32).reshape(2, 8)}
    before, after = (
        onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, x)
        for model in (parsed(given), result.model)
    )
    for left, right in zip(before, after, strict=True):
        np.testing.assert_allclose(right, left, rtol=1e-6)


# A bias ---------------------------------------------------------------------------------------------------------------


def biased() -> ir.Model:
    body = "y, a, b, t = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.125> (x, z, w, w)"
    return graph(body, 18, "com.microsoft", outputs="float[2, 8] y, float[2, 8] t")


@pytest.mark.parametrize(
    ("target", "operators"),
    [
        ("standard", ["Add", "Add", "RMSNormalization"]),
        ("plugin", ["Add", contract.ADD_RMS_NORM]),
        ("ort", ["SkipSimplifiedLayerNormalization"]),
    ],
)
def test_the_bias_of_onnx_runtimes_operator_is_an_add_of_its_own(target: str, operators: list[str]) -> None:
    given = biased()
    result = rewrite(given, target)
    assert op_types(result.model) == operators
    assert op_types(given) == ["SkipSimplifiedLayerNormalization"]
    assert any("are an Add of their own" in note for note in result.notes) == (target != "ort")
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((2, 8)).astype(np.float32) for name in "xz"}
    wanted, got = (
        onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)
        for model in (given, result.model)
    )
    for a, b in zip(wanted, got, strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-6, atol=1e-6)
