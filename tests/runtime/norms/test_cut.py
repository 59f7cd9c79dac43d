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
from rmsnorm_deploy.runtime.norms.access import NormFeed
from rmsnorm_deploy.runtime.norms.cut import Cut, CutModel, NormPlace, cut_out, run_alone
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from tests.helpers.graphs.graph_text import Graph, weight
from tests.helpers.graphs.onnx_text import parsed, values
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


# ------------------------------------------------------------------------------------ a norm's place, and running it

# `y` is what a norm would make of `total`, here its negative; `product` what it would make with a gate.
SUMS = """g (float[n,4] a, float[n,4] b, float[n,4] gate, float[4] w) => (float[n,4] y, float[n,4] product) {
    total = Add(a, b)
    twice = Add(a, a)
    scaled = Mul(a, w)
    y = Neg(total)
    product = Mul(total, gate)
    from_one = Mul(a, gate)
    with_a = Mul(total, a)
    with_b = Mul(total, b)
    with_itself = Mul(total, total)
    negative = Neg(twice)
}"""
ROWS = np.random.default_rng(3).standard_normal((3, 4)).astype(np.float32)
GATES = np.random.default_rng(4).standard_normal((3, 4)).astype(np.float32)


def placed(y: str, *operands: str, gate: str | None = None, **more: str | None) -> tuple[ir.Model, NormPlace]:
    """A norm in `SUMS`, from the values of these names."""
    model = parsed(SUMS)
    by_name = values(model)
    total, role = more.pop("total", None), more.pop("gate_role", None)
    return model, NormPlace(
        "norm", tuple(by_name[name] for name in operands), None if gate is None else by_name[gate], by_name[y],
        None if total is None else by_name[total], role, {name: by_name[str(value)] for name, value in more.items()},
    )  # fmt: skip


def alone(model: ir.Model, place: NormPlace, feed: NormFeed) -> tuple[NormFeed, dict[str, np.ndarray]]:
    """What a norm is run on, and what it gives."""
    fed, arrays = place.split(feed)
    with run_alone(cut_out(model, [place.cut()]), "cpu", None) as run_cuts:
        return fed, run_cuts({place.name: arrays})[place.name]


def test_one_operand_is_x_itself() -> None:
    model, place = placed("from_one", "a", gate="gate")
    cut = place.cut()
    assert (cut.name, list(cut.inputs), list(cut.outputs)) == ("norm", ["x0", "gate"], ["y"])
    fed, arrays = place.split(NormFeed(ROWS, GATES))
    assert (fed.x is ROWS, fed.gate is GATES, arrays["x0"] is ROWS, arrays["gate"] is GATES) == (True,) * 4
    assert set(arrays) == {"x0", "gate"}
    _, found = alone(model, place, NormFeed(ROWS, GATES))
    assert list(found) == ["y"]
    assert np.array_equal(found["y"], ROWS * GATES)


def test_two_operands_sum_to_x_to_the_bit() -> None:
    model, place = placed("y", "a", "b", total="total")
    assert [list(part) for part in (place.cut().inputs, place.cut().outputs)] == [["x0", "x1"], ["y", "sum"]]
    fed, arrays = place.split(NormFeed(ROWS))
    assert fed.x is ROWS
    assert fed.gate is None
    assert np.array_equal(arrays["x0"] + arrays["x1"], ROWS)
    assert np.array_equal(arrays["x0"] != 0, np.tile([True, False], 6).reshape(3, 4))
    assert not (arrays["x0"] * arrays["x1"]).any()
    _, found = alone(model, place, NormFeed(ROWS))
    assert np.array_equal(found["sum"], ROWS)
    assert np.array_equal(found["y"], -ROWS)


def test_two_operands_keep_what_is_not_finite() -> None:
    x = np.array([[np.nan, np.inf, -np.inf, 1.0]], np.float32)
    _, place = placed("y", "a", "b")
    _, arrays = place.split(NormFeed(x))
    assert np.array_equal(arrays["x0"] + arrays["x1"], x, equal_nan=True)


def test_an_operand_added_to_itself_is_half_of_x() -> None:
    model, place = placed("negative", "a", "a", total="twice")
    assert list(place.cut().inputs) == ["x0"]
    fed, found = alone(model, place, NormFeed(ROWS))
    assert np.array_equal(fed.x, ROWS)  # halves are exact
    assert np.array_equal(found["sum"], ROWS)
    assert np.array_equal(found["y"], -ROWS)


def test_what_no_half_can_hold_is_rounded_to_twice_a_half() -> None:
    """3 times the smallest float16: its half, 1.5 of them, is rounded to 2, so the norm is run on 4."""
    smallest = np.float16(2.0**-24)
    _, place = placed("negative", "a", "a")
    fed, arrays = place.split(NormFeed(np.array([[3 * smallest]], np.float16)))
    assert arrays["x0"] == 2 * smallest
    assert fed.x == 4 * smallest
    assert fed.x.dtype == np.float16


@pytest.mark.parametrize(("y", "gate", "index"), [("with_a", "a", 0), ("with_b", "b", 1)])
def test_a_gate_that_is_an_operand_goes_in_once(y: str, gate: str, index: int) -> None:
    model, place = placed(y, "a", "b", gate=gate, gate_role=f"x{index}")
    assert list(place.cut().inputs) == ["x0", "x1"]
    fed, found = alone(model, place, NormFeed(ROWS, GATES))
    assert fed.x is ROWS
    part = np.where((np.arange(12).reshape(3, 4) + index) % 2 == 0, ROWS, np.float32(0))
    assert np.array_equal(fed.gate, part)  # type: ignore[arg-type]
    assert np.array_equal(found["y"], ROWS * part)


def test_a_gate_that_is_the_sum_is_no_input() -> None:
    model, place = placed("with_itself", "a", "b", gate="total", gate_role="x")
    assert list(place.cut().inputs) == ["x0", "x1"]
    fed, found = alone(model, place, NormFeed(ROWS, GATES))
    assert fed.gate is ROWS
    assert np.array_equal(found["y"], ROWS * ROWS)


def test_a_gate_that_is_half_of_the_sum() -> None:
    _, place = placed("negative", "a", "a", gate="a", gate_role="x0")
    fed, arrays = place.split(NormFeed(ROWS, GATES))
    assert np.array_equal(fed.gate, ROWS * np.float32(0.5))  # type: ignore[arg-type]
    assert np.array_equal(arrays["gate"], arrays["x0"])
    assert list(place.cut().inputs) == ["x0"]


def test_a_gate_of_its_own_beside_two_operands() -> None:
    model, place = placed("product", "a", "b", gate="gate")
    assert list(place.cut().inputs) == ["x0", "x1", "gate"]
    fed, found = alone(model, place, NormFeed(ROWS, GATES))
    assert fed.gate is GATES
    assert np.array_equal(found["y"], ROWS * GATES)


def test_further_values_are_computed_by_role() -> None:
    model, place = placed("y", "a", "b", double="twice")
    _, found = alone(model, place, NormFeed(ROWS))
    assert set(found) == {"y", "double"}
    assert np.array_equal(found["double"], 2 * np.where(np.arange(12).reshape(3, 4) % 2 == 0, ROWS, np.float32(0)))


def test_norms_in_one_session_and_what_is_given_to_them() -> None:
    """Two norms whose names hold dots, one of which reads an input of the model."""
    model, _ = placed("y", "a")
    by_name = values(model)
    first = NormPlace("a.b.0", (by_name["a"],), None, by_name["scaled"])
    second = NormPlace("a.b.1", (by_name["total"],), None, by_name["y"])
    cut = cut_out(model, [first.cut(), second.cut()])
    assert {value.name for value in cut.given.values()} == {"w"}
    scale = np.array([1, 2, 3, 4], np.float32)
    with run_alone(cut, "cpu", None, {"w": scale, "unused": scale}) as run_cuts:
        found = run_cuts({"a.b.0": {"x0": ROWS}, "a.b.1": {"x0": ROWS[:1], "nobody": ROWS}})
    assert np.array_equal(found["a.b.0"]["y"], ROWS * scale)
    assert np.array_equal(found["a.b.1"]["y"], -ROWS[:1])


def test_what_is_not_given_is_a_key_error() -> None:
    model, place = placed("scaled", "a")
    with pytest.raises(KeyError, match="w"), run_alone(cut_out(model, [place.cut()]), "cpu", None):
        pass
