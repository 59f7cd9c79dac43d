"""The table of floating-point formats, held to numpy's and ml_dtypes' own figures, and the ULPs at its edges."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from rmsnorm_deploy.models.dtypes import NORM_DTYPES, numpy_dtype
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.accuracy.float_formats import FORMATS, Format, format_of, ulp_size


def test_every_dtype_that_norms_have_has_a_format() -> None:
    assert set(FORMATS) == set(NORM_DTYPES)


@pytest.mark.parametrize("name", FORMATS)
def test_the_figures_are_those_of_the_libraries(name: str) -> None:
    form, dtype = FORMATS[name], numpy_dtype(name)
    info = ml_dtypes.finfo(dtype)
    assert form.eps == float(info.eps)
    assert form.largest == float(info.max)
    assert form.smallest == float(info.smallest_subnormal)
    assert math.ldexp(1.0, form.exponent_min) == float(info.smallest_normal)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_overflow_is_the_smallest_value_that_rounds_to_infinity(name: str) -> None:
    form, dtype = FORMATS[name], numpy_dtype(name)
    # ml_dtypes rounds float64 to float32 on the way to bfloat16.
    below = np.nextafter(form.overflow, 0.0, dtype=np.float32 if name == "bfloat16" else np.float64)
    with np.errstate(over="ignore"):
        assert np.isinf(np.float64(form.overflow).astype(dtype))
        assert float(below.astype(dtype)) == form.largest


def test_no_float64_overflows_float64() -> None:
    assert FORMATS["float64"].overflow == math.inf


def test_a_format_by_hand() -> None:
    """Eight bits: one sign, four of exponent with a bias of 7, three of significand; no code for infinity."""
    tiny = Format(precision=4, exponent_min=-6, exponent_max=7)
    assert (tiny.eps, tiny.largest, tiny.smallest, tiny.overflow) == (0.125, 240.0, 2.0**-9, 248.0)


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(np.float16, 11), (ml_dtypes.bfloat16, 8), ("float32", 24), (np.dtype(np.float64), 53)],
)
def test_format_of_takes_types_names_and_dtypes(dtype: object, precision: int) -> None:
    assert format_of(dtype).precision == precision  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.complex64, ml_dtypes.float8_e4m3fn])
def test_other_dtypes_are_refused_by_name(dtype: type) -> None:
    name = np.dtype(dtype).name
    with pytest.raises(UsageError, match=name):
        format_of(dtype)
    with pytest.raises(UsageError, match=name):
        ulp_size(np.ones(2), dtype)


def test_ulp_at_the_edges() -> None:
    """Above the largest value it stays that value's, below the smallest normal it is the smallest subnormal."""
    form = FORMATS["float16"]
    values = np.array([form.largest, form.overflow, 1e300, math.inf, -math.inf, 2.0**-14, 2.0**-15, 2.0**-30, -0.0])
    assert ulp_size(values, np.float16).tolist() == [32.0] * 5 + [2.0**-24] * 4


def test_ulp_at_nan_is_nan_and_the_shape_stays() -> None:
    ulps = ulp_size(np.array([[math.nan, 1.0], [2.0, 0.5]]), "bfloat16")
    assert ulps.dtype == np.float64
    assert np.isnan(ulps[0, 0])
    assert ulps.reshape(-1)[1:].tolist() == [2.0**-7, 2.0**-6, 2.0**-8]


def test_ulp_changes_at_powers_of_two() -> None:
    below = np.nextafter(4.0, 0.0)
    assert ulp_size(np.array([below, 4.0, -4.0, 7.9]), np.float32).tolist() == [2.0**-22] + [2.0**-21] * 3
