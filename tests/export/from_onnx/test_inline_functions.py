"""Functions that hold norms, or parts of one, are inlined; all others stay."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from rmsnorm_deploy.export.from_onnx.inline_functions import inline_norm_functions
from rmsnorm_deploy.export.recognition.find_norms import find_graph_norms
from rmsnorm_deploy.plugins import contract
from tests.helpers.graphs.onnx_text import op_types

CONSTANTS = "<float two = {2.0}, float eps = {0.125}, int64[1] last = {-1}>"
NORM = """(v) => (u) { two = Constant <value_float = 2.0> ()  last = Constant <value_ints = [-1]> ()
s = Pow (v, two)  m = ReduceMean (s, last)  r = Sqrt (m)  u = Div (v, r) }"""
HELPER = '<domain: "f", opset_import: ["" : 18]> act (v) => (u) { u = Tanh (v) }'


def model(body: str, *functions: str, opset: int = 18) -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : {opset}, "f" : 1, "{contract.DOMAIN}" : 1]>'
        f"g (float[2, 8] x) => (float[2, 8] y) {CONSTANTS} {{ {body} }} " + " ".join(functions)
    )


def function(name: str, body: str, imports: str = '"" : 18, "f" : 1', domain: str = "f") -> str:
    return f'<domain: "{domain}", opset_import: [{imports}]> {name} {body}'


def test_a_model_without_functions_is_given_back() -> None:
    given = model("y = Neg (x)")
    assert inline_norm_functions(given) == (given, [])


def test_functions_without_norms_stay() -> None:
    given = model("y = f.act (x)", HELPER)
    found, names = inline_norm_functions(given)
    assert (found, names) == (given, [])


def test_a_function_that_is_a_norm_is_inlined_on_a_copy() -> None:
    given = model("k = f.act (x)  y = f.norm (k)", HELPER, function("norm", NORM))
    found, names = inline_norm_functions(given)
    assert names == ["f::norm"]
    assert found is not given
    assert op_types(given) == ["act", "norm"]
    assert op_types(found) == ["act", "Constant", "Constant", "Pow", "ReduceMean", "Sqrt", "Div"]
    assert [f.name for f in found.functions.values()] == ["act"]
    assert len(find_graph_norms(found).sites) == 1
    assert not any("rmsnorm_deploy.function" in node.metadata_props for node in found.graph)


def test_a_function_that_is_part_of_a_norm_is_inlined() -> None:
    given = model(
        "s = f.square (x)  m = ReduceMean (s, last)  e = Add (m, eps)  r = Sqrt (e)  y = Div (x, r)",
        function("square", "(v) => (u) { u = Mul (v, v) }"),
    )
    found, names = inline_norm_functions(given)
    assert names == ["f::square"]
    assert op_types(found) == ["Mul", "ReduceMean", "Add", "Sqrt", "Div"]


def test_what_calls_such_a_function_is_inlined_too() -> None:
    given = model(
        "y = f.block (x)", HELPER, function("norm", NORM),
        function("block", "(v) => (u) { k = f.norm (v)  u = f.act (k) }"),
    )  # fmt: skip
    found, names = inline_norm_functions(given)
    assert names == ["f::block", "f::norm"]
    assert op_types(found)[-2:] == ["Div", "act"]


def test_a_function_of_another_opset_stays() -> None:
    given = model("y = f.norm (x)", function("norm", NORM, '"" : 20'))
    found, names = inline_norm_functions(given)
    assert (found, names) == (given, [])


def test_nothing_is_inlined_into_a_function_of_another_opset() -> None:
    """ReduceMean's axes are an attribute at opset 17 and an input at 18: in block's body norm's nodes are invalid."""
    nodes = "{ last = Constant <value_ints = [-1]> ()  s = Mul (v, v)  m = ReduceMean <axes = [-1]> (s)  r = Sqrt (m)"
    norm = function("norm", f"(v) => (u) {nodes}  u = Div (v, r) }}", '"" : 17')
    caller = function("block", "(v) => (u) { u = f.norm (v) }", '"" : 18, "f" : 1')
    given = model("k = f.block (x)  y = f.norm (k)", norm, caller, opset=17)
    onnx.checker.check_model(ir.to_proto(given))
    onnx.checker.check_model(ir.to_proto(inline_norm_functions(given)[0]))


def test_the_stand_ins_for_our_plugin_stay() -> None:
    given = model(
        f"k = {contract.DOMAIN}.{contract.RMS_NORM} (x)  y = f.norm (k)",
        function(contract.RMS_NORM, NORM, '"" : 18', contract.DOMAIN), function("norm", NORM),
    )  # fmt: skip
    found, names = inline_norm_functions(given)
    assert names == ["f::norm"]
    assert op_types(found)[0] == contract.RMS_NORM
    assert [f.name for f in found.functions.values()] == [contract.RMS_NORM]
