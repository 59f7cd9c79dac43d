"""The float64 reference: by hand, against `eager` in float64, and against formulas that are nearly right."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, get_args

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rmsnorm_deploy.models import reference as reference_module
from rmsnorm_deploy.models.eager import eager
from rmsnorm_deploy.models.reference import reference
from rmsnorm_deploy.models.spec import Activation, Gate, NormSpec
from tests.helpers.norms.norm_zoo import BARE, DTYPES, FALCON, MAMBA, ONE_PLUS, SCALE_FIRST, ZOO

Array = NDArray[np.float64]
EPS64 = 2.0**-52


def random_array(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape) * scale


def worst(a: Array, expected: Array) -> float:
    """Largest error in units of max(|truth|, root mean square of its last dim)."""
    scale = np.maximum(np.abs(expected), np.sqrt(np.mean(expected**2, axis=-1, keepdims=True)))
    return float(np.max(np.abs(a - expected) / scale))


# By hand --------------------------------------------------------------------------------------------------------------

NONE = NormSpec(eps=0.0, scale="none")
HAND: dict[str, tuple[NormSpec, dict[str, list[Any]], list[Any]]] = {
    # mean square of (3, 4) is 12.5
    "mean": (NONE, {"x": [3, 4]}, [3 / math.sqrt(12.5), 4 / math.sqrt(12.5)]),
    "rows": (NONE, {"x": [[3, 4], [1, -1]]}, [[3 / math.sqrt(12.5), 4 / math.sqrt(12.5)], [1, -1]]),
    "sum": (NONE.replace(reduction="sum"), {"x": [3, 4]}, [0.6, 0.8]),
    # 1 + 3 under the root
    "eps": (NONE.replace(eps=3.0), {"x": [1, -1]}, [0.5, -0.5]),
    # 1 + 1 + 2 under the root
    "eps_of_sum": (NONE.replace(eps=2.0, reduction="sum"), {"x": [1, -1]}, [0.5, -0.5]),
    "zero": (NONE.replace(eps=4.0), {"x": [0, 0]}, [0, 0]),
    "weight": (NONE.replace(scale="weight"), {"x": [2, -2], "weight": [3, 5]}, [3, -5]),
    "one_plus_weight": (NONE.replace(scale="one_plus_weight"), {"x": [2, -2], "weight": [3, 5]}, [4, -6]),
    "bias": (NONE.replace(scale="weight", bias=True), {"x": [2, -2], "weight": [3, 5], "bias": [10, 20]}, [13, 15]),
    "bias_without_weight": (NONE.replace(bias=True), {"x": [2, -2], "bias": [10, 20]}, [11, 19]),
    "groups": (NONE.replace(group_size=2, reduction="sum"), {"x": [3, 4, 0, 5]}, [0.6, 0.8, 0, 1]),
    # mean square of (1, 1, 1, 3) is 3
    "two_dims": (
        NONE.replace(trailing_dims=2), {"x": [[[1, 1], [1, 3]]]},
        [[[1 / math.sqrt(3), 1 / math.sqrt(3)], [1 / math.sqrt(3), 3 / math.sqrt(3)]]],
    ),
    # sigmoid(0) is 1/2; after the norm it halves
    "sigmoid_after": (
        NONE.replace(gate="after", activation="sigmoid"), {"x": [2, -2], "gate": [0, 0]}, [0.5, -0.5]
    ),
    # before the norm a common factor falls out
    "sigmoid_before": (
        NONE.replace(gate="before", activation="sigmoid"), {"x": [2, -2], "gate": [0, 0]}, [1, -1]
    ),
    # silu(0) is 0, silu(z) tends to z
    "silu_after": (
        NONE.replace(gate="after", activation="silu"), {"x": [2, -2], "gate": [0, 800]}, [0, -800]
    ),
    # (2 * silu(800), 2 * silu(-800)) = (1600, -0): mean square 1600^2 / 2
    "silu_before": (
        NONE.replace(gate="before", activation="silu"), {"x": [2, 2], "gate": [800, -800]}, [math.sqrt(2), 0]
    ),
    # bias is gated too
    "gate_after_bias": (
        NONE.replace(bias=True, gate="after", activation="sigmoid"),
        {"x": [2, -2], "bias": [4, 4], "gate": [0, 0]}, [2.5, 1.5],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HAND)
def test_values_computed_by_hand(name: str) -> None:
    spec, inputs, expected = HAND[name]
    result = reference(spec, **inputs)
    assert result.dtype == np.float64
    assert result.shape == np.shape(expected)
    np.testing.assert_allclose(result, expected, rtol=4 * EPS64, atol=0)


@pytest.mark.parametrize("name", HAND)
def test_eager_gives_the_values_computed_by_hand(name: str) -> None:
    spec, inputs, expected = HAND[name]
    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in inputs.items()}
    result = eager(spec.replace(statistics="promoted"), **tensors)
    np.testing.assert_allclose(result.numpy(), expected, rtol=8 * EPS64, atol=0)


def test_a_row_of_zeros_without_eps_is_nan_and_no_other_row_is() -> None:
    result = reference(NONE, [[0, 0], [1, 1]])
    assert np.isnan(result[0]).all()
    assert result[1].tolist() == [1.0, 1.0]


def test_nan_and_infinity_go_through() -> None:
    result = reference(BARE, [[math.nan, 1.0], [math.inf, 1.0], [1.0, 1.0]])
    assert np.isnan(result[0]).all()
    assert np.isnan(result[1, 0])
    assert result[1, 1] == 0.0
    assert np.isfinite(result[2]).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int64])
def test_any_input_dtype_is_widened_before_anything_is_computed(dtype: Any) -> None:
    x = np.array([[300, 400], [3, 4]]).astype(dtype)
    expected = np.array([[3.0, 4.0], [3.0, 4.0]]) / math.sqrt(12.5)
    np.testing.assert_allclose(reference(NONE, x), expected, rtol=4e-3 if dtype is ml_dtypes.bfloat16 else 4 * EPS64)


def test_inputs_are_not_changed() -> None:
    x, weight, gate = random_array(3, 4), random_array(4, seed=1), random_array(3, 4, seed=2)
    before = [array.copy() for array in (x, weight, gate)]
    reference(FALCON.replace(group_size=2), x, weight, None, gate)
    for array, old in zip((x, weight, gate), before, strict=True):
        assert array.tobytes() == old.tobytes()


def test_it_shares_no_code_with_what_it_measures() -> None:
    assert not {"torch", "eager"} & set(vars(reference_module))


# Against eager --------------------------------------------------------------------------------------------------------


def in_float64(spec: NormSpec) -> NormSpec:
    """The spec with every step in float64."""
    return spec if spec.order == "no_upcast" else spec.replace(statistics="promoted")


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e6])
@pytest.mark.parametrize("name", ZOO)
def test_eager_in_float64_is_the_reference(name: str, scale: float) -> None:
    norm = ZOO[name]
    module = norm.build(torch.float64)
    weight, bias = norm.tensors(module)
    x = random_array(5, 3, *norm.tail, scale=scale)
    gate = random_array(5, 3, *norm.tail, seed=1, scale=3.0) if norm.gated else None
    got = eager(in_float64(norm.spec), torch.tensor(x), weight, bias, torch.tensor(gate) if norm.gated else None)
    expected = reference(norm.spec, x, weight, bias, gate)
    # A sum of up to 1000 squares in PyTorch's cascade, a root, a quotient, two products and an exponential.
    assert worst(got.numpy(), expected) <= 16 * EPS64


GATES = [("none", "none"), *itertools.product(get_args(Gate)[1:], get_args(Activation)[1:])]
EXTENTS: list[dict[str, Any]] = [{}, {"group_size": 4}, {"trailing_dims": 2}]


@pytest.mark.parametrize("scale", ["none", "weight", "one_plus_weight"])
@pytest.mark.parametrize(("gate", "activation"), GATES)
def test_every_combination_agrees_with_eager(scale: Any, gate: Any, activation: Any) -> None:
    x, z = random_array(2, 3, 12, scale=2.0), random_array(2, 3, 12, seed=1, scale=3.0)
    for extent, bias, reduction, root in itertools.product(
        EXTENTS, (False, True), ("mean", "sum"), ("rsqrt", "sqrt", "reciprocal")
    ):
        spec = NormSpec(
            eps=1e-3, scale=scale, gate=gate, activation=activation, statistics="promoted", bias=bias,
            reduction=reduction, root=root, **extent,
        )  # fmt: skip
        shape = (3, 12) if spec.trailing_dims == 2 else (12,)
        arrays = [
            random_array(*shape, seed=2) if spec.has_weight else None,
            random_array(*shape, seed=3) if bias else None,
            z if gate != "none" else None,
        ]
        got = eager(spec, torch.tensor(x), *(None if a is None else torch.tensor(a) for a in arrays))
        assert worst(got.numpy(), reference(spec, x, *arrays)) <= 16 * EPS64, spec


# A single norm, a few roundings in the output dtype; half types round the statistics too when nothing is cast up.
HALF_ROUNDINGS = {torch.float32: 8.0, torch.float16: 2.5, torch.bfloat16: 2.5}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_the_module_itself_is_within_its_own_roundings_of_the_reference(name: str, dtype: torch.dtype) -> None:
    norm = ZOO[name]
    module = norm.build(dtype)
    x = torch.tensor(random_array(16, 2, *norm.tail)).to(dtype)
    gate = torch.tensor(random_array(16, 2, *norm.tail, seed=1)).to(dtype)
    with torch.no_grad():
        got = module(x, gate) if norm.gated else module(x)
    weight, bias = (None if t is None else t.double().numpy() for t in norm.tensors(module))
    expected = reference(norm.spec, x.double().numpy(), weight, bias, gate.double().numpy() if norm.gated else None)
    bound = HALF_ROUNDINGS[dtype] * (2 if norm.spec.order == "no_upcast" else 1)
    assert worst(got.double().numpy(), expected) <= bound * torch.finfo(dtype).eps


# Nearly right ---------------------------------------------------------------------------------------------------------


def silu(z: Array) -> Array:
    return z / (1 + np.exp(-z))


def rms(x: Array, eps: float, count: int = 12) -> Array:
    return np.sqrt(np.sum(x * x, axis=-1, keepdims=True) / count + eps)


def gelu(z: Array) -> Array:
    return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in z.ravel()]).reshape(z.shape)


def grouped(x: Array, size: int, eps: float) -> Array:
    cut = x.reshape(*x.shape[:-1], -1, size)
    return (cut / rms(cut, eps, size)).reshape(x.shape)


EPS = 1e-3
WRONG: dict[str, tuple[NormSpec, Callable[[Array, Array, Array], Array]]] = {
    "eps_outside_the_root": (SCALE_FIRST, lambda x, w, z: x / (rms(x, 0.0) + EPS) * w),
    "eps_added_to_the_sum": (SCALE_FIRST, lambda x, w, z: x / rms(x, EPS / 12) * w),
    "eps_left_out": (SCALE_FIRST, lambda x, w, z: x / rms(x, 0.0) * w),
    "eps_twice": (SCALE_FIRST, lambda x, w, z: x / rms(x, 2 * EPS) * w),
    "eps_as_lower_bound": (SCALE_FIRST, lambda x, w, z: x / np.maximum(rms(x, 0.0), EPS) * w),
    "one_less_in_the_mean": (SCALE_FIRST, lambda x, w, z: x / rms(x, EPS, 11) * w),
    "sum_for_mean": (SCALE_FIRST, lambda x, w, z: x / rms(x, EPS, 1) * w),
    "mean_for_sum": (SCALE_FIRST.replace(reduction="sum"), lambda x, w, z: x / rms(x, EPS) * w),
    "mean_subtracted": (
        SCALE_FIRST, lambda x, w, z: (x - x.mean(-1, keepdims=True)) / rms(x - x.mean(-1, keepdims=True), EPS) * w,
    ),
    "no_root": (SCALE_FIRST, lambda x, w, z: x / rms(x, EPS) ** 2 * w),
    "weight_left_out": (SCALE_FIRST, lambda x, w, z: x / rms(x, EPS)),
    "weight_before_the_norm": (SCALE_FIRST, lambda x, w, z: (x * w) / rms(x * w, EPS)),
    "offset_left_out": (ONE_PLUS, lambda x, w, z: x / rms(x, EPS) * w),
    "offset_too_much": (SCALE_FIRST, lambda x, w, z: x / rms(x, EPS) * (1 + w)),
    "groups_left_out": (MAMBA.replace(group_size=4), lambda x, w, z: x * silu(z) / rms(x * silu(z), EPS) * w),
    "groups_interleaved": (
        ONE_PLUS.replace(group_size=4),
        lambda x, w, z: grouped(x.reshape(-1, 4, 3).swapaxes(1, 2).reshape(x.shape), 4, EPS) * (1 + w),
    ),
    "gate_after_for_before": (MAMBA.replace(group_size=4), lambda x, w, z: grouped(x, 4, EPS) * w * silu(z)),
    "gate_before_for_after": (FALCON.replace(group_size=4), lambda x, w, z: grouped(x * silu(z), 4, EPS) * w),
    "gelu_for_silu": (FALCON.replace(group_size=4), lambda x, w, z: grouped(x, 4, EPS) * w * gelu(z)),
    "sigmoid_for_silu": (FALCON.replace(group_size=4), lambda x, w, z: grouped(x, 4, EPS) * w / (1 + np.exp(-z))),
    "gate_not_activated": (FALCON.replace(group_size=4), lambda x, w, z: grouped(x, 4, EPS) * w * z),
    "one_dim_for_two": (SCALE_FIRST.replace(trailing_dims=2), lambda x, w, z: x / rms(x, EPS) * w),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_formula_that_is_nearly_right_is_seen(name: str) -> None:
    spec, wrong = WRONG[name]
    spec = spec.replace(eps=EPS)
    x, z, w = random_array(3, 5, 12), random_array(3, 5, 12, seed=1), random_array(12, seed=2)
    gate = z if spec.gate != "none" else None
    expected = reference(spec, x, w, None, gate)
    right = eager(in_float64(spec), torch.tensor(x), torch.tensor(w), None, None if gate is None else torch.tensor(z))
    assert worst(right.numpy(), expected) <= 16 * EPS64
    # The smallest of these mistakes, an eps of 1e-3 handled wrongly, moves the result by 1e-4 of its size.
    assert worst(wrong(x, w, z), expected) > 1e-4


def test_the_right_formula_written_the_same_way_is_accepted() -> None:
    x, z, w = random_array(3, 5, 12), random_array(3, 5, 12, seed=1), random_array(12, seed=2)
    spec = SCALE_FIRST.replace(eps=EPS)
    assert worst(x / rms(x, EPS) * w, reference(spec, x, w)) <= 4 * EPS64
    spec = MAMBA.replace(eps=EPS, group_size=4)
    assert worst(grouped(x * silu(z), 4, EPS) * w, reference(spec, x, w, None, z)) <= 4 * EPS64
