"""How far one norm is off in a dtype: by hand, and against the float64 formula."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from rmsnorm_deploy.models.errors import UnsupportedError
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.runtime.accuracy.float_formats import FORMATS
from rmsnorm_deploy.runtime.risk import measure
from rmsnorm_deploy.runtime.risk.measure import (
    NormError,
    NormRows,
    error_in_onnxruntime,
    error_in_torch,
    reference_of,
)

RNG = np.random.default_rng(0)
X = RNG.standard_normal((6, 16))
WEIGHT, BIAS = np.linspace(0.5, 1.5, 16), np.linspace(-1, 1, 16)
SPEC = NormSpec(eps=1e-3)


def formula(x: np.ndarray, eps: float = 1e-3) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


# ------------------------------------------------------------------------------------------------------- NormRows


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_cast_rounds_every_array(dtype: str) -> None:
    rows = NormRows(SPEC.replace(bias=True), X, WEIGHT, BIAS, X).cast(dtype)
    assert {a.dtype.name for a in (rows.x, rows.weight, rows.bias, rows.gate) if a is not None} == {dtype}
    assert np.array_equal(rows.x, X.astype(rows.x.dtype))
    assert rows.spec == SPEC.replace(bias=True)


def test_a_cast_leaves_out_what_is_not_there_and_overflows_quietly() -> None:
    rows = NormRows(SPEC, np.array([[1e6, 1.0]])).cast("float16")
    assert (rows.weight, rows.bias, rows.gate) == (None, None, None)
    assert rows.x.tolist() == [[math.inf, 1.0]]


# --------------------------------------------------------------------------------------------------- reference_of


def test_the_reference_is_the_formula() -> None:
    found = reference_of(NormRows(SPEC, X, WEIGHT))
    np.testing.assert_allclose(found, formula(X) * WEIGHT, rtol=1e-14)


def test_the_reference_of_half_rows_is_float64_of_what_they_are() -> None:
    half = X.astype(ml_dtypes.bfloat16)
    found = reference_of(NormRows(SPEC.replace(scale="none"), half))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, formula(half.astype(np.float64)), rtol=1e-14)


def test_the_reference_with_a_gate_and_a_bias() -> None:
    spec = SPEC.replace(bias=True, gate="after", activation="sigmoid")
    found = reference_of(NormRows(spec, X, WEIGHT, BIAS, X))
    np.testing.assert_allclose(found, (formula(X) * WEIGHT + BIAS) / (1 + np.exp(-X)), rtol=1e-12)


# ---------------------------------------------------------------------------------------------------------- _error


def test_errors_by_hand() -> None:
    """Rows (3, 4) and (1, 1), the second off by 1/4: RMS 1, so 2^8 eps of float16 and 2^8 ULPs at 1."""
    expected = np.array([[3.0, 4.0], [1.0, 1.0]])
    found = measure._error(np.array([[3.0, 4.0], [1.0, 1.25]], np.float32), expected, "float16")
    assert found == NormError(0.25, 0.25 / 4, 256.0, 256.0, 0)


def test_an_error_is_relative_to_its_row_and_counted_at_its_element() -> None:
    """0.5 at the 7 of (1, 7), whose RMS is 5: a tenth, eps x 7 and ULPs of 4 eps."""
    found = measure._error(np.array([[1.0, 7.5]]), np.array([[1.0, 7.0]]), "float16")
    eps = 2.0**-10
    assert found.max_relative == pytest.approx(0.1, rel=1e-12)
    assert found.max_units == pytest.approx(0.5 / (7 * eps), rel=1e-12)
    assert found.max_ulp == 0.5 / (4 * eps)


def test_what_is_not_finite_is_counted_and_infinite() -> None:
    found = measure._error(np.array([[math.inf, math.nan, 1.0]]), np.ones((1, 3)), "float16")
    assert found == NormError(math.inf, math.inf, math.inf, math.inf, 2)


def test_overflow_is_an_error_even_where_the_dtype_rounds_to_it() -> None:
    found = measure._error(np.array([[math.inf]], np.float16), np.array([[1e6]]), "float16")
    assert found.nonfinite == 1


def test_what_has_no_truth_is_not_measured() -> None:
    assert measure._error(np.zeros((1, 2)), np.full((1, 2), math.nan), "float32") == NormError(0, 0, 0, 0, 0)
    half = measure._error(np.array([[1.0, 5.0]]), np.array([[1.0, math.nan]]), "float32")
    assert half == NormError(0, 0, 0, 0, 0)


def test_a_row_of_zeros_is_right_as_zeros() -> None:
    assert measure._error(np.zeros((1, 4)), np.zeros((1, 4)), "float32").max_relative == 0.0
    assert measure._error(np.array([[0.0, 1e-9]]), np.zeros((1, 2)), "float32").max_relative == math.inf


def test_rows_of_several_dims_are_one_row_each() -> None:
    expected = np.ones((2, 2, 2))
    result = expected.copy()
    result[0, 0, 0] = 2.0
    found = measure._error(result, expected, "float32")
    assert found.max_relative == 1.0
    assert found.mean_relative == 1 / 8


# ------------------------------------------------------------------------------------------- in PyTorch and in ORT


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("where", ["torch", "primitives", "standard"])
def test_a_norm_that_does_nothing_but_round(dtype: str, where: str) -> None:
    """x, the weight and the result are rounded, each by half an eps of up to twice its size."""
    rows = NormRows(SPEC, X, WEIGHT)
    expected = reference_of(rows)
    if where == "torch":
        found = error_in_torch(rows, dtype, expected)
    else:
        found = error_in_onnxruntime(rows, dtype, where, expected)
    eps = FORMATS[dtype].eps
    assert 0.1 < found.max_units < 4.0
    assert found.max_relative < 4.0 * eps * np.max(np.abs(expected)) / np.sqrt(np.mean(expected**2))
    assert 0.0 < found.mean_relative < found.max_relative
    assert found.nonfinite == 0


def test_rounding_x_is_part_of_the_error() -> None:
    """x of 1 + 2^-12 is 1 in float16, and beside ones its quarter eps is what is lost of the result."""
    spec = NormSpec(eps=0.0, scale="none")
    x = np.ones((1, 64))
    x[0, 0] += 2.0**-12
    rows = NormRows(spec, x)
    found = error_in_torch(rows, "float16", reference_of(rows))
    assert found.max_units == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize("where", ["torch", "onnxruntime"])
def test_statistics_that_overflow_in_float16(where: str) -> None:
    """1000 squared is beyond float16: in PyTorch the norm of half statistics gives 0, in float32 it is right."""
    spec = NormSpec(eps=1e-3, scale="none", order="no_upcast", statistics="input")
    rows = NormRows(spec, np.full((2, 16), 1000.0))
    expected = reference_of(rows)
    if where == "torch":
        assert error_in_torch(rows, "float16", expected).max_relative == pytest.approx(1.0, abs=1e-3)
    else:
        assert error_in_onnxruntime(rows, "float16", "standard", expected).max_relative < 1e-2


def test_gate_bias_and_several_dims_go_to_onnxruntime_too() -> None:
    spec = SPEC.replace(bias=True, gate="before", activation="silu", trailing_dims=2)
    x, gate = RNG.standard_normal((5, 4, 4)), RNG.standard_normal((5, 4, 4))
    rows = NormRows(spec, x, WEIGHT.reshape(4, 4), BIAS.reshape(4, 4), gate)
    expected = reference_of(rows)
    own = error_in_torch(rows, "float32", expected)
    other = error_in_onnxruntime(rows, "float32", "primitives", expected)
    assert 0.0 < own.max_units < 20.0
    assert 0.0 < other.max_units < 20.0


def test_what_a_target_cannot_do_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="plugin"):
        error_in_onnxruntime(NormRows(SPEC, X, WEIGHT), "float64", "plugin", reference_of(NormRows(SPEC, X, WEIGHT)))
