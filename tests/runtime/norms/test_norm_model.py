"""Models of one norm: their inputs, where the norm stands in them, and their numbers in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from rmsnorm_deploy.models.dtypes import NORM_DTYPES, numpy_dtype
from rmsnorm_deploy.models.errors import UnsupportedError, UsageError
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.runtime.norms.norm_model import norm_model
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner

X = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
GATE = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)
WEIGHT, BIAS = np.linspace(0.5, 1.5, 8, dtype=np.float32), np.linspace(-1, 1, 8, dtype=np.float32)


def run(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    with OrtRunner(ir.to_proto(model).SerializeToString()) as runner:
        return runner.run(feeds)["y"]


def plain(x: np.ndarray, eps: float) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + eps)


@pytest.mark.parametrize("target", ["primitives", "standard", "ort"])
def test_it_computes_the_norm(target: str) -> None:
    model, _ = norm_model(NormSpec(eps=1e-3), [8], "float32", target, WEIGHT)
    np.testing.assert_allclose(run(model, x=X), plain(X, 1e-3) * WEIGHT, rtol=1e-6)


def test_any_number_of_rows() -> None:
    model, _ = norm_model(NormSpec(eps=1e-3), [8], "float32", "primitives", WEIGHT)
    for rows in (0, 1, 9):
        assert run(model, x=np.resize(X, (rows, 8))).shape == (rows, 8)


def test_without_a_weight_the_last_inputs_are_left_out() -> None:
    model, _ = norm_model(NormSpec(eps=1e-3, scale="none"), [8], "float32", "primitives")
    np.testing.assert_allclose(run(model, x=X), plain(X, 1e-3), rtol=1e-6)


def test_a_bias_and_a_gate() -> None:
    spec = NormSpec(eps=1e-3, gate="after", activation="sigmoid", bias=True)
    model, place = norm_model(spec, [8], "float32", "primitives", WEIGHT, BIAS)
    assert [value.name for value in model.graph.inputs] == ["x", "gate"]
    assert place.gate is model.graph.inputs[1]
    expected = (plain(X, 1e-3) * WEIGHT + BIAS) / (1 + np.exp(-GATE.astype(np.float64)))
    np.testing.assert_allclose(run(model, x=X, gate=GATE), expected, rtol=1e-5, atol=1e-6)


def test_several_trailing_dims() -> None:
    x = X.reshape(5, 2, 4)
    model, _ = norm_model(NormSpec(eps=0.0, trailing_dims=2, scale="none"), [2, 4], "float32", "primitives")
    np.testing.assert_allclose(run(model, x=x), plain(X, 0.0).reshape(5, 2, 4), rtol=1e-6)


@pytest.mark.parametrize("dtype", NORM_DTYPES)
def test_the_place_and_the_dtype_of_the_values(dtype: str) -> None:
    model, place = norm_model(NormSpec(eps=1e-3), [8], dtype, "primitives", WEIGHT.astype(numpy_dtype(dtype)))
    assert place.name == "norm"
    assert place.operands == (model.graph.inputs[0],)
    assert (place.gate, place.total, place.gate_role, dict(place.more)) == (None, None, None, {})
    assert place.y is model.graph.outputs[0]
    assert {str(value.dtype) for value in (*place.operands, place.y)} == {
        str(ir.DataType.from_numpy(numpy_dtype(dtype)))
    }
    assert [str(dim) for dim in model.graph.inputs[0].shape or ()] == ["rows", "8"]


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(UsageError, match="nowhere"):
        norm_model(NormSpec(eps=1e-3), [8], "float32", "nowhere", WEIGHT)


def test_what_the_target_cannot_do_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="float64"):
        norm_model(NormSpec(eps=1e-3), [8], "float64", "plugin", WEIGHT.astype(np.float64))
