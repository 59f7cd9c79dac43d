"""Errors of arrays by hand: sizes, what is in place, rows and their scale."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.accuracy import errors as module
from rmsnorm_deploy.runtime.accuracy.errors import (
    LEAST_ROW,
    Errors,
    errors_of,
    is_exact,
    kind_of,
    pieces,
    rms,
    row_scale_error,
    row_width,
    square_sums,
    ulps_of,
)
from rmsnorm_deploy.runtime.accuracy.float_formats import FORMATS

INF, NAN = math.inf, math.nan


def same(found: Any, expected: list[float]) -> None:
    np.testing.assert_array_equal(np.asarray(found, np.float64), np.array(expected, np.float64))


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (np.bool_, "boolean"),
        (np.int8, "integer"),
        (np.uint16, "integer"),
        (np.int64, "integer"),
        (np.float16, "floating-point"),
        (ml_dtypes.bfloat16, "floating-point"),
        (np.float64, "floating-point"),
        (np.complex64, "unsupported"),
        (ml_dtypes.float8_e4m3fn, "unsupported"),
        (np.dtype("U3"), "unsupported"),
    ],
)
def test_kinds_of_dtypes(dtype: Any, kind: str) -> None:
    assert kind_of(np.dtype(dtype)) == kind
    assert is_exact(np.dtype(dtype)) is (kind in ("boolean", "integer"))


@pytest.mark.parametrize(
    ("shape", "least", "width"),
    [
        ((2, 3, 64), 32, 64),
        ((2, 3, 5), 32, 30),
        ((4, 3, 5), 32, 60),
        ((9, 3, 5), 15, 15),
        ((9, 3, 5), 16, 135),
        ((9, 3, 5), 1, 5),
        ((7,), 1, 7),
        ((), 32, 1),
        ((4, 0), 32, 0),
    ],
)
def test_row_width(shape: tuple[int, ...], least: int, width: int) -> None:
    assert row_width(shape, least) == width


def test_pieces_cover_all_in_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IN_FLIGHT", 100)
    assert list(pieces((7, 40))) == [slice(0, 80), slice(80, 160), slice(160, 240), slice(240, 280)]
    assert list(pieces((3, 150))) == [slice(0, 150), slice(150, 300), slice(300, 450)]
    assert list(pieces(())) == [slice(0, 1)]
    assert list(pieces((3, 0))) == []


def test_pieces_join_short_rows() -> None:
    """Rows of 10 are joined with the dim before them until a row has 32 elements."""
    (only,) = pieces((2, 4, 10))
    assert only == slice(0, 80)
    assert row_width((2, 4, 10), LEAST_ROW) == 40


def test_errors_are_absolute_differences_in_float64() -> None:
    errors = errors_of(np.array([1.5, -2.0], np.float16), np.array([1.0, 2.0 + 2.0**-40]), None)
    same(errors.size, [0.5, 4.0 + 2.0**-40])
    same(errors.scale, [1.0, 2.0 + 2.0**-40])
    assert errors.agrees.all()


def test_what_is_not_finite_in_the_truth_is_compared_in_place_only() -> None:
    reference = np.array([NAN, INF, INF, -INF, NAN])
    errors = errors_of(np.array([NAN, INF, -INF, 1.0, INF], np.float32), reference, None)
    assert errors.agrees.tolist() == [True, True, False, False, False]
    same(errors.size, [NAN] * 5)
    same(errors.scale, [NAN] * 5)


def test_a_finite_value_that_is_missing_is_infinitely_wrong() -> None:
    errors = errors_of(np.array([NAN, INF, -INF], np.float32), np.ones(3), None)
    assert not errors.agrees.any()
    same(errors.size, [INF] * 3)


def test_a_truth_beyond_the_range_rounds_to_infinity() -> None:
    """65520 is the first value that float16 rounds to infinity; 65519 rounds to 65504."""
    reference = np.array([65520.0, 65519.0, -70000.0, 70000.0, 70000.0])
    errors = errors_of(np.array([INF, INF, -INF, -INF, 65504.0], np.float16), reference, None)
    assert errors.agrees.tolist() == [True, False, True, False, True]
    same(errors.size, [0.0, INF, 0.0, INF, 0.0])
    same(errors.scale, [65504.0, 65504.0, -65504.0, 65504.0, 65504.0])


def test_the_baselines_own_overflow_excuses_the_same() -> None:
    """Where PyTorch overflowed and the truth did not, the candidate may do either."""
    reference = np.array([10.0, 10.0, 10.0, 10.0, 20.0])
    baseline = np.array([INF, INF, INF, NAN, 20.5], np.float32)
    errors = errors_of(np.array([INF, 11.0, -INF, NAN, INF], np.float32), reference, baseline)
    assert errors.agrees.tolist() == [True, True, False, True, False]
    same(errors.size, [NAN, 1.0, INF, NAN, INF])


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.bool_])
def test_whole_numbers_are_measured_as_they_are(dtype: Any) -> None:
    errors = errors_of(np.array([1, 0, 1], dtype), np.array([1, 1, 0], dtype), None)
    same(errors.size, [0.0, 1.0, 1.0])
    same(ulps_of(errors, np.dtype(dtype)), [0.0, 1.0, 1.0])


@pytest.mark.parametrize("dtype", [np.complex64, ml_dtypes.float8_e4m3fn])
def test_unsupported_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(UsageError, match=np.dtype(dtype).name):
        errors_of(np.ones(2, dtype), np.ones(2), None)


def test_errors_in_ulps_of_the_truth() -> None:
    errors = errors_of(np.array([1.0 + 2.0**-9, 4.0, 0.0], np.float16), np.array([1.0, 4.0 + 2.0**-9, 2.0**-25]), None)
    same(ulps_of(errors, np.dtype(np.float16)), [2.0, 0.5, 0.5])
    broken = errors_of(np.array([NAN, NAN], np.float16), np.array([1.0, NAN]), None)
    same(ulps_of(broken, np.dtype(np.float16)), [INF, NAN])


def test_row_scale_error_is_in_eps_of_element_or_row() -> None:
    """Rows (3, 4) and (0, 0): an RMS of sqrt(12.5), below the 4 and above the 3; zeros count the smallest subnormal."""
    form = FORMATS["float32"]
    errors = Errors(np.full(4, 2.0**-20), np.array([3.0, -4.0, 0.0, 0.0]), np.ones(4, bool))
    units = row_scale_error(errors, 2, form)
    assert units.shape == (2, 2)
    assert units[0].tolist() == pytest.approx([8.0 / math.sqrt(12.5), 8.0 / 4.0], rel=1e-15)
    assert units[1].tolist() == [2.0**-20 / 2.0**-149] * 2


def test_row_scale_error_leaves_out_what_is_not_measured() -> None:
    errors = errors_of(np.array([1.0, NAN, INF, 2.5], np.float32), np.array([1.0, NAN, 2.0, 2.0]), None)
    units = row_scale_error(errors, 4, FORMATS["float32"])[0]
    assert units[0] == 0.0
    assert np.isnan(units[1])
    assert units[2] == INF
    assert units[3] == 0.5 / (2.0**-23 * 2.0)


def test_rms_by_hand() -> None:
    rows = np.array([[3.0, -4.0, NAN], [NAN, NAN, NAN], [0.0, 0.0, 0.0], [2.0, 2.0, 2.0]])
    assert rms(rows).shape == (4, 1)
    assert rms(rows)[:, 0].tolist() == pytest.approx([math.sqrt(12.5), 0.0, 0.0, 2.0], rel=1e-15)


@pytest.mark.parametrize("size", [1e200, 1e-200, 1e308])
def test_no_square_overflows_or_vanishes(size: float) -> None:
    assert float(rms(np.array([[size, -size]]))[0, 0]) == size


def test_square_sums_are_relative_to_the_largest() -> None:
    peak, total, count = square_sums(np.array([[3.0, -6.0, NAN], [NAN, 0.0, 0.0]]))
    assert peak.tolist() == [6.0, 0.0]
    assert total.tolist() == [1.25, 0.0]
    assert count.tolist() == [2, 2]
