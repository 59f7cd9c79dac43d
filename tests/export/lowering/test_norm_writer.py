"""One norm of a graph in a target's form: what goes, what takes its place, and what is noted on it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from rmsnorm_deploy.export.graph.metadata import FORM_KEY, PATH_KEY, SPEC_KEY, TARGET_KEY, VALUES_KEY
from rmsnorm_deploy.export.graph.site import GraphSite
from rmsnorm_deploy.export.lowering.norm_writer import NormWriter
from rmsnorm_deploy.export.recognition.find_norms import find_graph_norms
from rmsnorm_deploy.models.errors import UnsupportedError
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.plugins import contract
from tests.helpers.graphs.onnx_text import op_types, parsed, values

CONSTANTS = """<float two = {2.0}, float eps = {0.125}, int64[1] last = {-1},
float[8] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}>"""
NORM = """s = Pow (t, two)  m = ReduceMean (s, last)  e = Add (m, eps)  r = Sqrt (e)  n = Div (t, r)  y = Mul (n, w)"""
PLAIN = "t = Neg (x)  " + NORM
RESIDUAL = "t = Add (x, z)  " + NORM
STANDARD = "t = Neg (x)  y = RMSNormalization <epsilon = 0.125> (t, w)"


def graph(body: str = PLAIN, outputs: str = "float[2, 8] y", opset: int = 23) -> ir.Model:
    return parsed(f"g (float[2, 8] x, float[2, 8] z) => ({outputs}) {CONSTANTS} {{ {body} }}", opset)


def sites(model: ir.Model) -> list[GraphSite]:
    return find_graph_norms(model).sites


def run(model: ir.Model) -> list[np.ndarray]:
    """The model's outputs in ONNX Runtime, for one fixed x and z."""
    rng = np.random.default_rng(5)
    feeds = {name: rng.standard_normal((2, 8)).astype(np.float32) for name in ("x", "z")}
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feeds)


def test_a_spelled_out_norm_becomes_one_operator() -> None:
    model = graph()
    before = run(model)
    (site,) = sites(model)
    writer = NormWriter(model.graph, "standard", 23)
    written = writer.write(site)
    writer.finish()
    assert op_types(model) == ["Neg", "RMSNormalization"]
    assert sorted(model.graph.initializers) == ["w"]
    norm = model.graph[1]
    assert (norm.attributes["epsilon"].as_float(), [v.name for v in norm.inputs if v]) == (0.125, ["t", "w"])
    assert (norm.outputs[0].name, norm.outputs[0].is_graph_output()) == ("y", True)
    assert written.changed
    assert (written.x, written.y) == (values(model)["t"], norm.outputs[0])
    assert writer.current(site.y) is norm.outputs[0]
    assert np.abs(run(model)[0] - before[0]).max() <= 4 * np.finfo(np.float32).eps * np.abs(before[0]).max()


def test_what_is_reported() -> None:
    model = graph()
    (site,) = sites(model)
    lowered = NormWriter(model.graph, "standard", 23).write(site).lowered
    assert (lowered.path, lowered.spec, lowered.form) == (site.path, site.spec, "plain")
    assert (lowered.node, lowered.dtype, lowered.deviations) == (model.graph[1].name, "float32", [])


def test_notes_on_the_nodes() -> None:
    model = graph()
    (site,) = sites(model)
    NormWriter(model.graph, "standard", 23).write(site, {"more": "text"})
    notes = dict(model.graph[1].metadata_props)
    assert NormSpec.from_json(notes.pop(SPEC_KEY)) == site.spec
    assert json.loads(notes.pop(VALUES_KEY)) == {"x": "t", "y": "y"}
    assert notes == {"more": "text", PATH_KEY: site.path, TARGET_KEY: "standard", FORM_KEY: "plain"}


def test_of_several_nodes_only_the_main_one_has_the_spec() -> None:
    model = graph(STANDARD)
    (site,) = sites(model)
    written = NormWriter(model.graph, "primitives", 23).write(site)
    ours = [node for node in model.graph if PATH_KEY in node.metadata_props]
    assert len(ours) > 3
    assert [node.name for node in ours if SPEC_KEY in node.metadata_props] == [written.lowered.node]
    assert {node.metadata_props[TARGET_KEY] for node in ours} == {"primitives"}
    assert "RMSNormalization" not in op_types(model)


def test_names_of_nodes_begin_with_the_path_and_are_unique() -> None:
    body = PLAIN + "  s2 = Pow (y, two)  m2 = ReduceMean (s2, last)  r2 = Sqrt (m2)  n2 = Div (y, r2)  o = Mul (n2, w)"
    model = graph(body, "float[2, 8] o")
    found = sites(model)
    assert len(found) == 2
    writer = NormWriter(model.graph, "standard", 23)
    names = [writer.write(dataclasses.replace(site, path="layer.norm")).lowered.node for site in found]
    assert names == ["layer.norm/RMSNormalization", "layer.norm/RMSNormalization_1"]


def test_a_value_that_others_read_keeps_its_nodes() -> None:
    model = graph(PLAIN + "  q = Neg (r)", "float[2, 8] y, float[2, 1] q")
    (site,) = sites(model)
    writer = NormWriter(model.graph, "standard", 23)
    writer.write(site)
    writer.finish()
    assert sorted(op_types(model)) == sorted(["Neg", "Pow", "ReduceMean", "Add", "Sqrt", "RMSNormalization", "Neg"])
    assert sorted(model.graph.initializers) == ["eps", "last", "two", "w"]


def test_a_norm_in_the_targets_form_gets_notes_only() -> None:
    model = graph(STANDARD)
    node = model.graph[1]
    (site,) = sites(model)
    written = NormWriter(model.graph, "standard", 23).write(site)
    assert not written.changed
    assert list(model.graph)[1] is node
    assert (written.lowered.node, written.x, written.y) == (node.name, site.x, site.y)
    assert node.metadata_props[TARGET_KEY] == "standard"
    assert NormSpec.from_json(node.metadata_props[SPEC_KEY]) == site.spec
    assert sorted(model.graph.initializers) == ["eps", "last", "two", "w"]


def test_writing_twice_changes_nothing() -> None:
    model = graph()
    for changed in (True, False):
        (site,) = sites(model)
        writer = NormWriter(model.graph, "ort", 23)
        assert writer.write(site).changed is changed
        writer.finish()
    assert len(op_types(model)) == 2


def test_a_refusal_leaves_the_graph_as_it_was() -> None:
    model = graph(opset=20)
    (site,) = sites(model)
    before = ir.to_proto(model)
    with pytest.raises(UnsupportedError, match="opset"):
        NormWriter(model.graph, "standard", 20).write(site)
    assert ir.to_proto(model) == before


def test_a_result_of_another_dtype_is_refused() -> None:
    model = graph()
    (site,) = sites(model)
    site.y.dtype = ir.DataType.FLOAT16
    with pytest.raises(UnsupportedError, match="returns float16, and target standard would return float32"):
        NormWriter(model.graph, "standard", 23).write(site)


def test_a_norm_outside_of_any_graph_is_an_error() -> None:
    model = graph()
    (site,) = sites(model)
    node = ir.node("Neg", [site.x])
    with pytest.raises(ValueError, match="is outside of any graph"):
        NormWriter(model.graph, "standard", 23).write(GraphSite(
            "p", site.spec, "plain", site.x, None, None, None, node.outputs[0], None, (node,), "", None, site.dtype
        ))  # fmt: skip


# Residual adds --------------------------------------------------------------------------------------------------------


def test_the_plugin_takes_the_residual_add_in() -> None:
    model = graph(RESIDUAL + "  o = Neg (t)", "float[2, 8] y, float[2, 8] o")
    (site,) = sites(model)
    assert site.form == "residual_add"
    writer = NormWriter(model.graph, "plugin", 20)
    written = writer.write(site)
    writer.finish()
    assert op_types(model) == [contract.ADD_RMS_NORM, "Neg"]
    node = model.graph[0]
    assert [value.name for value in node.inputs if value is not None][:3] == ["x", "z", "w"]
    assert [value.name for value in node.outputs] == ["y", "t"]
    assert written.x is node.outputs[1]
    assert written.lowered.form == "residual_add"
    assert json.loads(node.metadata_props[VALUES_KEY]) == {"x": "t", "y": "y"}


def test_other_targets_keep_the_add() -> None:
    model = graph(RESIDUAL)
    (site,) = sites(model)
    writer = NormWriter(model.graph, "standard", 23)
    written = writer.write(site)
    assert op_types(model)[0] == "Add"
    assert written.x is not None
    assert written.x.name == "t"


def test_a_second_norm_of_the_same_sum_is_plain() -> None:
    second = NORM
    for name in ("s", "m", "e", "r", "n", "y"):
        second = second.replace(f"{name} = ", f"{name}2 = ").replace(f"({name},", f"({name}2,")
        second = second.replace(f"({name})", f"({name}2)").replace(f", {name})", f", {name}2)")
    model = graph(RESIDUAL + "  " + second, "float[2, 8] y, float[2, 8] y2")
    found = sites(model)
    assert [site.form for site in found] == ["residual_add", "residual_add"]
    writer = NormWriter(model.graph, "plugin", 20)
    forms = [writer.write(site).lowered.form for site in found]
    assert forms == ["residual_add", "plain"]
    assert op_types(model) == [contract.ADD_RMS_NORM, contract.RMS_NORM]
    assert model.graph[1].inputs[0] is model.graph[0].outputs[1]


def test_a_composite_is_taken_apart() -> None:
    body = "y = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.125> (x, z, w)"
    model = parsed(f"g (float[2, 8] x, float[2, 8] z) => (float[2, 8] y) {CONSTANTS} {{ {body} }}", 23, "com.microsoft")
    before = run(model)
    (site,) = sites(model)
    writer = NormWriter(model.graph, "standard", 23)
    written = writer.write(site)
    writer.finish()
    assert op_types(model) == ["Add", "RMSNormalization"]
    assert written.x is model.graph[0].outputs[0]
    assert np.abs(run(model)[0] - before[0]).max() <= 4 * np.finfo(np.float32).eps * np.abs(before[0]).max()


def test_readers_of_a_composites_sum_read_the_add() -> None:
    body = "k, a, b, t = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.125> (x, z, w)  y = Add (k, t)"
    model = parsed(f"g (float[2, 8] x, float[2, 8] z) => (float[2, 8] y) {CONSTANTS} {{ {body} }}", 23, "com.microsoft")
    (site,) = sites(model)
    writer = NormWriter(model.graph, "standard", 23)
    written = writer.write(site)
    assert op_types(model) == ["Add", "RMSNormalization", "Add"]
    assert written.x is model.graph[0].outputs[0]
    assert list(model.graph[2].inputs) == [model.graph[1].outputs[0], written.x]
    assert (written.x.name, writer.current(site.x)) == ("t", written.x)


def test_a_result_keeps_the_shape_that_the_file_tells() -> None:
    model = graph(STANDARD)
    (site,) = sites(model)
    assert site.x is not None
    site.x.shape = None
    assert NormWriter(model.graph, "primitives", 23).write(site).y.shape == ir.Shape([2, 8])


def test_current_follows_values_through_several_norms() -> None:
    model = graph()
    (site,) = sites(model)
    writer = NormWriter(model.graph, "standard", 23)
    assert writer.current(None) is None
    assert writer.current(site.x) is site.x
    first = writer.write(site).y
    (again,) = sites(model)
    second = NormWriter(model.graph, "ort", 23).write(again).y
    assert writer.current(site.y) is first
    assert second.name == "y"


def test_finish_drops_constants_of_norms_that_were_refused_after_all() -> None:
    model = graph(STANDARD)
    (site,) = sites(model)
    site.y.dtype = ir.DataType.FLOAT16
    writer = NormWriter(model.graph, "primitives", 23)
    with pytest.raises(UnsupportedError):
        writer.write(site)
    writer.finish()
    assert sorted(model.graph.initializers) == ["eps", "last", "two", "w"]
