"""Norms cut out of graphs: what goes in and out, what is carried along, and what is not touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from rmsnorm_deploy.export.graph.site import GraphSite
from rmsnorm_deploy.export.recognition.find_norms import find_graph_norms
from rmsnorm_deploy.models.errors import UnsupportedError
from rmsnorm_deploy.runtime.norms.cut import Cut, CutModel, cut_out
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from tests.helpers.graphs.graph_text import Graph, weight
from tests.helpers.spellings.norm_places import PLACES
from tests.helpers.spellings.norm_spellings import WIDTH, Way, norm

X = np.random.default_rng(0).standard_normal((2, 3, WIDTH)).astype(np.float32)


def norm_of(x: np.ndarray, scale: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    return x / np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True) + eps) * scale


def sites_of(proto: onnx.ModelProto) -> tuple[ir.Model, list[GraphSite]]:
    model = ir.from_proto(proto)
    return model, find_graph_norms(model).sites


def whole(site: GraphSite, name: str) -> Cut:
    assert site.x is not None
    return Cut(name, {"x": site.x}, {"y": site.y})


def run(cut: CutModel, feeds: dict[str, np.ndarray], folder: Path | None = None) -> dict[str, np.ndarray]:
    with OrtRunner(cut.model.SerializeToString(), weights_folder=folder) as runner:
        return runner.run(feeds)


def two_norms() -> onnx.ModelProto:
    """x, a norm, a linear layer, a residual add and another norm."""
    g = Graph()
    x = g.input("x", ["batch", 3, WIDTH])
    y, _ = norm(g, Way(), x, "first.")
    linear = g.constant(np.eye(WIDTH, dtype=np.float32), name="linear")
    y, _ = norm(g, Way(), g.op("Add", x, g.op("MatMul", y, linear)), "second.")
    g.output(y)
    return g.model()


def test_each_cut_is_its_norm_alone() -> None:
    model, sites = sites_of(two_norms())
    before = ir.to_proto(model).SerializeToString()
    cut = cut_out(model, [whole(site, str(number)) for number, site in enumerate(sites)])
    inputs = {v.name: [d.WhichOneof("value") for d in v.type.tensor_type.shape.dim] for v in cut.model.graph.input}
    assert inputs == {"0.x": [None] * 3, "1.x": [None] * 3}  # any number of rows
    assert cut.given == {}
    assert sorted(tensor.dims[0] for tensor in cut.model.graph.initializer if tensor.dims) == [1, 1, WIDTH, WIDTH]
    results = run(cut, {"0.x": X, "1.x": 2 * X[:1]})
    first, second = (np.asarray(site.weight.const_value.numpy()) for site in sites)  # type: ignore[union-attr]
    np.testing.assert_allclose(results["0.y"], norm_of(X, first), rtol=1e-5)
    np.testing.assert_allclose(results["1.y"], norm_of(2 * X[:1], second), rtol=1e-5)
    assert ir.to_proto(model).SerializeToString() == before


def test_sums_shared_nodes_and_values_that_are_wanted_twice() -> None:
    model, sites = sites_of(two_norms())
    site = sites[1]
    assert site.sum_of is not None
    assert site.x is not None
    assert site.weight is not None
    (a, b), total, scale = site.sum_of, site.x, site.weight
    added = Cut("added", {"a": a, "b": b}, {"sum": total, "again": total, "passed": a, "y": site.y, "weight": scale})
    results = run(cut_out(model, [added, whole(site, "plain")]), {"added.a": X, "added.b": 3 * X, "plain.x": 4 * X})
    assert np.array_equal(results["added.sum"], 4 * X)
    assert np.array_equal(results["added.again"], 4 * X)
    assert np.array_equal(results["added.passed"], X)
    assert np.array_equal(results["added.y"], results["plain.y"])
    assert np.array_equal(results["added.weight"], scale.const_value.numpy())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "place", ["in both branches of If, dynamo", "in a Loop, dynamo", "in a Scan, div", "groups and bias dynamo"]
)
def test_a_norm_in_a_body_becomes_a_flat_graph(place: str) -> None:
    model, sites = sites_of(PLACES[place].build())
    assert sites
    cut = cut_out(model, [whole(site, str(number)) for number, site in enumerate(sites)])
    assert not any(attribute.HasField("g") for node in cut.model.graph.node for attribute in node.attribute)
    assert cut.given == {}
    x = X if sites[0].x.shape is None or len(sites[0].x.shape) == 3 else X[0]  # type: ignore[union-attr]
    x = np.resize(x, (*x.shape[:-1], int(sites[0].shape[-1])))  # type: ignore[index, arg-type]
    results = run(cut, {f"{number}.x": x for number in range(len(sites))})
    assert [result.shape for result in results.values()] == [x.shape] * len(sites)
    assert all(np.isfinite(result).all() for result in results.values())


def test_what_comes_from_outside_is_an_input_of_its_own() -> None:
    """A weight that is an input of the model, read by two norms, and one that only a body knows."""
    g = Graph()
    x = g.input("x", ["batch", 3, WIDTH])
    w = g.input("w", [WIDTH])
    for number in range(2):
        stat = g.op("Add", g.reduce("ReduceMean", g.op("Mul", x, x), [-1]), g.constant(np.float32(1e-6)))
        x = g.op("Mul", g.op("Div", x, g.op("Sqrt", stat)), g.op("Add", w, g.constant(np.float32(number))))
    g.output(x)
    model, sites = sites_of(g.model())
    assert len(sites) == 2
    cut = cut_out(model, [whole(site, str(number)) for number, site in enumerate(sites)])
    ((name, value),) = cut.given.items()
    assert value.name == "w"
    assert {v.name for v in cut.model.graph.input} == {"0.x", "1.x", name}
    results = run(cut, {"0.x": X, "1.x": X, name: weight(WIDTH)})
    np.testing.assert_allclose(results["1.y"], norm_of(X, weight(WIDTH) + 1), rtol=1e-5)


def test_functions_are_carried_with_those_that_they_call() -> None:
    model = ir.from_proto(PLACES["in a function, nested True"].build())
    nodes = [node for node in model.graph if node.op_type == "Norm"]
    x = nodes[0].inputs[0]
    assert x is not None
    cut = cut_out(model, [Cut("f", {"x": x}, {"y": nodes[0].outputs[0]})])
    assert {function.name for function in cut.model.functions} == {"Norm", "Square"}
    scale = nodes[0].inputs[1].const_value.numpy()  # type: ignore[union-attr]
    np.testing.assert_allclose(run(cut, {"f.x": X})["f.y"], norm_of(X, scale), rtol=1e-5)
    assert len(model.functions) == 2
    relu = nodes[0].outputs[0].uses()[0].node
    assert not cut_out(model, [Cut("r", {"x": relu.inputs[0]}, {"y": relu.outputs[0]})]).model.functions  # type: ignore[dict-item]


def test_external_data_stay_where_they_are_and_are_not_read(tmp_path: Path) -> None:
    onnx.save(two_norms(), tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=64)
    model = ir.load(tmp_path / "m.onnx")
    second = find_graph_norms(model).sites[1]
    (tmp_path / "w.bin").rename(tmp_path / "elsewhere")
    cut = cut_out(model, [whole(second, "n")])
    external = [tensor for tensor in cut.model.graph.initializer if tensor.external_data]
    assert [list(tensor.dims) for tensor in external] == [[WIDTH]]
    assert {entry.key: entry.value for entry in external[0].external_data}["location"] == "w.bin"
    (tmp_path / "elsewhere").rename(tmp_path / "w.bin")
    scale = second.weight.const_value.numpy()  # type: ignore[union-attr]
    np.testing.assert_allclose(run(cut, {"n.x": X}, tmp_path)["n.y"], norm_of(X, scale), rtol=1e-5)


def test_control_flow_inside_is_refused() -> None:
    model = ir.from_proto(PLACES["in both branches of If, dynamo"].build())
    node = next(node for node in model.graph if node.op_type == "If")
    with pytest.raises(UnsupportedError, match=r"norm 'n' contains the control-flow node 'If\d+' \(If\)"):
        cut_out(model, [Cut("n", {"x": model.graph.inputs[0]}, {"y": node.outputs[0]})])


def test_a_long_chain_does_not_recurse() -> None:
    g = Graph()
    x = h = g.input("x", [WIDTH])
    for _ in range(3000):
        h = g.op("Neg", h)
    g.output(h)
    model = ir.from_proto(g.model())
    assert x == model.graph.inputs[0].name
    cut = cut_out(model, [Cut("n", {"x": model.graph.inputs[0]}, {"y": model.graph.outputs[0]})])
    assert len(cut.model.graph.node) == 3001
