"""Which matrix products of a graph get quantized weights, and that they compute what they did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from rmsnorm_deploy.export.graph.metadata import PATH_KEY
from rmsnorm_deploy.export.lowering.quantized_weights import quantize_weights, summed
from rmsnorm_deploy.export.lowering.weight_quantizer import SCHEMES
from tests.helpers.graphs.onnx_text import op_types, parsed


def graph(text: str, weights: dict[str, np.ndarray]) -> ir.Model:
    """A parsed graph of which these inputs are constants."""
    model = parsed(text)
    for value in [value for value in model.graph.inputs if value.name in weights]:
        model.graph.inputs.remove(value)
        value.const_value = ir.Tensor(weights[str(value.name)], name=value.name)
        model.graph.register_initializer(value)
    return model


def numbers(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


def run(model: ir.Model, path: Path, x: np.ndarray) -> list[np.ndarray]:
    ir.save(model, path)
    return onnxruntime.InferenceSession(path).run(None, {"x": x})  # type: ignore[no-any-return]


@pytest.mark.parametrize(("name", "most"), [("int4", 0.15), ("int8", 0.02)])
def test_a_product_with_a_constant_is_quantized(tmp_path: Path, name: str, most: float) -> None:
    # The second product reads a transposed weight, twice; 40 is not a multiple of a block.
    model = graph(
        "g (float[2,3,64] x, float[64,40] u, float[8,40] v) => (float[2,3,8] a, float[2,3,8] b) "
        "{ h = MatMul(x, u) t = Transpose<perm=[1,0]>(v) a = MatMul(h, t) n = Neg(h) b = MatMul(n, t) }",
        {"u": numbers(64, 40), "v": numbers(8, 40)},
    )
    x = numbers(2, 3, 64)
    wanted = run(model.clone(), tmp_path / "wide.onnx", x)
    for node in model.graph:
        if node.op_type in ("MatMul", "Neg"):
            node.outputs[0].shape = ir.Shape([2, 3, 8 if node.outputs[0].is_graph_output() else 40])
    found = quantize_weights(model, SCHEMES[name])
    assert (found.nodes, found.weights, found.left) == (3, 2, {})
    assert op_types(model) == ["MatMulNBits", "MatMulNBits", "Neg", "MatMulNBits"]
    assert sorted(model.graph.initializers) == sorted(f"{w}{s}" for w in "uv" for s in (f"_Q{name[3:]}", "_scales"))
    assert model.graph.opset_imports["com.microsoft"] == 1
    assert [node.name for node in model.graph] == ["node_h", "node_a", "node_n", "node_b"]
    got = run(model, tmp_path / "narrow.onnx", x)
    for a, b in zip(got, wanted, strict=True):
        assert 0 < np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)) < most


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", SCHEMES)
def test_products_of_one_factor_become_one_operator_with_their_bits(tmp_path: Path, name: str, dtype: type) -> None:
    word = {np.float32: "float", np.float16: "float16"}[dtype]
    model = graph(
        f"g ({word}[2,3,64] x, {word}[64,48] u, {word}[16,64] v, {word}[64,32] w, {word}[64,24] odd, "
        f"{word}[64,32] tied) => ({word}[2,3,48] a, {word}[2,3,16] b, {word}[2,3,32] c, {word}[2,3,24] d, "
        f"{word}[2,3,32] e, {word}[2,3,32] f) "
        "{ a = MatMul(x, u) t = Transpose<perm=[1,0]>(v) b = MatMul(x, t) h = Neg(x) c = MatMul(x, w) "
        "d = MatMul(x, odd) e = MatMul(x, tied) f = MatMul(h, tied) }",
        {"u": numbers(64, 48, dtype=dtype), "v": numbers(16, 64, dtype=dtype), "w": numbers(64, 32, dtype=dtype),
         "odd": numbers(64, 24, dtype=dtype), "tied": numbers(64, 32, dtype=dtype)},
    )  # fmt: skip
    model.graph.node("node_h").outputs[0].shape = ir.Shape([2, 3, 64])
    alone = model.clone()
    model.graph.node("node_a").metadata_props["kept"] = "yes"
    found = quantize_weights(model, SCHEMES[name])
    assert (found.nodes, found.weights) == (6, 5)
    assert op_types(model) == ["MatMulNBits", "Split", "Neg", "MatMulNBits", "MatMulNBits", "MatMulNBits"]
    first, split = list(model.graph)[:2]
    assert (first.name, first.attributes["N"].as_int(), first.metadata_props["kept"]) == ("node_a", 96, "yes")
    assert first.outputs[0].shape == ir.Shape([2, 3, 96])
    assert [value.name for value in split.outputs] == ["a", "b", "c"]
    x = numbers(2, 3, 64, dtype=dtype)
    got = run(model, tmp_path / "joined.onnx", x)
    for index, node in enumerate([node for node in alone.graph if node.op_type == "MatMul"]):
        one = alone.clone()
        one.graph.outputs[:] = [one.graph.outputs[index]]
        for other in [other for other in reversed(list(one.graph)) if other.op_type == "MatMul"]:
            if other.name != node.name:
                one.graph.remove(other, safe=True)
        quantize_weights(one, SCHEMES[name])
        assert op_types(one).count("Split") == 0
        np.testing.assert_array_equal(run(one, tmp_path / "alone.onnx", x)[0], got[index])


def test_products_with_a_bias_stay_apart(tmp_path: Path) -> None:
    """ONNX Runtime adds a bias in the kernel of its product."""
    model = graph(
        "g (float[2,3,64] x, float[64,32] u, float[64,32] v, float[64,32] w, float[32] b) "
        "=> (float[2,3,32] a, float[2,3,32] c, float[2,3,32] d) "
        "{ p = MatMul(x, u) a = Add(p, b) q = MatMul(x, v) c = Add(b, q) r = MatMul(x, w) d = Add(r, b) }",
        {"u": numbers(64, 32), "v": numbers(64, 32), "w": numbers(64, 32), "b": numbers(32)},
    )
    quantize_weights(model, SCHEMES["int8"])
    assert op_types(model) == ["MatMulNBits", "Add"] * 3


def test_two_products_stay_apart() -> None:
    model = graph(
        "g (float[2,3,64] x, float[64,32] u, float[64,32] w) => (float[2,3,32] a, float[2,3,32] c) "
        "{ a = MatMul(x, u) c = MatMul(x, w) }",
        {"u": numbers(64, 32), "w": numbers(64, 32)},
    )
    quantize_weights(model, SCHEMES["int4"])
    assert op_types(model) == ["MatMulNBits"] * 2


def test_everything_else_stays(tmp_path: Path) -> None:
    model = graph(
        "g (float[4,64] x, float[64,64] norm, float[64,64] w, float[2,64,64] batch, float[64,16] narrow, "
        "float[16,4] small) => (float[2,4,64] e, float[4,4] y) "
        "{ a = MatMul(x, norm) b = Gemm(a, w) s = Transpose(b) c = MatMul(b, s) d = MatMul(c, b) e = MatMul(d, batch) "
        "f = MatMul(d, narrow) y = MatMul(f, small) }",
        {"norm": numbers(64, 64), "w": numbers(64, 64), "batch": numbers(2, 64, 64), "narrow": numbers(64, 16),
         "small": numbers(16, 4)},
    )  # fmt: skip
    model.graph.node("node_a").metadata_props[PATH_KEY] = "norm"
    before = op_types(model)
    wanted = run(model.clone(), tmp_path / "wide.onnx", numbers(4, 64))[1]
    shapes = {"d": [4, 64], "f": [4, 16]}
    for node in model.graph:
        if node.outputs[0].name in shapes:
            node.outputs[0].shape = ir.Shape(shapes[node.outputs[0].name])
    found = quantize_weights(model, SCHEMES["int4"])
    assert found.to_json()["left"] == {
        "the operator is Gemm": 1, "the weight is not a matrix": 1, "the weight has fewer than 32 inputs": 1,
    }  # fmt: skip
    assert found.nodes == 1
    assert [a for a, b in zip(op_types(model), before, strict=True) if a != b] == ["MatMulNBits"]
    got = run(model, tmp_path / "narrow.onnx", numbers(4, 64))[1]
    assert np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)) < 0.15


def test_a_weight_in_float64_stays() -> None:
    model = graph(
        "g (double[4,64] x, double[64,8] w) => (double[4,8] y) { y = MatMul(x, w) }",
        {"w": numbers(64, 8, dtype=np.float64)},
    )
    assert quantize_weights(model, SCHEMES["int8"]).left == {"the weight is in float64": 1}
    assert op_types(model) == ["MatMul"]


def test_the_parts_of_a_model_are_added() -> None:
    row = {"profile": "int4", "nodes": 2, "weights": 1, "left": {"a": 1}}
    assert summed([row, {**row, "left": {"a": 2, "b": 1}}]) == {**row, "nodes": 4, "weights": 2,
                                                                "left": {"a": 3, "b": 1}}  # fmt: skip
