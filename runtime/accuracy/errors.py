"""Errors of an array against the float64 reference, computed a few rows at a time to limit the memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .float_formats import FORMATS, Format, format_of, ulp_size

Float64 = NDArray[np.float64]
Mask = NDArray[np.bool_]

# The RMS of a shorter row depends on chance; the verdict joins such rows with their neighbors.
LEAST_ROW = 32
# Elements that are converted to float64 at once: a dozen such arrays fit in a CPU's cache.
_IN_FLIGHT = 2**18


class Errors(NamedTuple):
    """Absolute errors of an array; all three have its shape.

    `size` is NaN where nothing is measured, and infinite where a finite value was expected; `scale` is the reference
    clipped to the range of the dtype, NaN where it is not finite; `agrees` is whether non-finite values are in place.
    """

    size: Float64
    scale: Float64
    agrees: Mask


@cache
def kind_of(dtype: np.dtype[Any]) -> str:
    """`boolean`, `integer`, `floating-point`, or `unsupported` for a dtype in which errors cannot be measured."""
    if dtype == np.bool_:
        return "boolean"
    if np.issubdtype(dtype, np.integer):
        return "integer"
    return "floating-point" if dtype.name in FORMATS else "unsupported"


def is_exact(dtype: np.dtype[Any]) -> bool:
    """Whether values of this dtype are compared exactly: integers and booleans."""
    return kind_of(dtype) in ("boolean", "integer")


def row_width(shape: tuple[int, ...], least: int) -> int:
    """Elements in a row: the last dim, and as many dims before it as are needed to reach `least` elements."""
    width = 1
    for position, size in enumerate(reversed(shape)):
        if position and width >= least:
            break
        width *= size
    return width


def pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of a flattened array, each of whole rows; none for an empty array.

    A row that is longer than the maximum size of a slice is a slice by itself.
    """
    total = int(np.prod(shape))
    if total == 0:
        return
    width = row_width(shape, LEAST_ROW)
    step = max(1, _IN_FLIGHT // width) * width
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def errors_of(array: NDArray[Any], reference: NDArray[Any], baseline: NDArray[Any] | None) -> Errors:
    """Errors of an array against the reference; all of one shape.

    Where the baseline itself is not in place (it overflowed, the reference did not), the array may agree with either
    the reference or the baseline; an infinity that the baseline has too is not measured.

    Raises:
        UsageError: errors cannot be measured in the dtype.
    """
    form = format_of(np.float64 if is_exact(array.dtype) else array.dtype)
    values, exact = array.astype(np.float64), reference.astype(np.float64, copy=False)
    agrees = _in_place(values, exact, form)
    contested = np.zeros(agrees.shape, dtype=bool)
    if baseline is not None:
        reference = baseline.astype(np.float64)
        contested = ~_in_place(reference, exact, form)
        # A finite value where only the baseline overflowed agrees with the reference already.
        agrees |= contested & _same_class(values, reference)
    finite, due = np.isfinite(values), np.isfinite(exact)
    # The best possible result for a reference beyond the range is the largest value.
    scale = np.where(due, np.clip(exact, -form.largest, form.largest), np.nan)
    with np.errstate(invalid="ignore", over="ignore"):
        size = np.where(finite, np.abs(values - scale), 0.0)
    size[~due | (contested & ~finite)] = np.nan
    size[due & ~agrees] = np.inf
    return Errors(size, scale, agrees)


def ulps_of(errors: Errors, dtype: np.dtype[Any]) -> Float64:
    """Errors in ULPs of `dtype` at the reference, absolute for integers and booleans; NaN where not measured."""
    if is_exact(dtype):
        return errors.size
    with np.errstate(over="ignore", invalid="ignore"):
        return errors.size / ulp_size(errors.scale, dtype)


def row_scale_error(errors: Errors, width: int, form: Format) -> Float64:
    """Errors in units of eps x max(|reference|, row RMS): the unavoidable rounding of the terms behind an element.

    Args:
        errors: result of `errors_of`.
        width: elements of a row; the errors are whole rows.
        form: the format whose eps is used.

    Returns:
        float64[rows, width]; NaN where nothing is measured, infinite where a finite value was expected.
    """
    scale = errors.scale.reshape(-1, width)
    unit = np.maximum(form.eps * np.fmax(np.abs(scale), rms(scale)), form.smallest)
    with np.errstate(over="ignore"):
        return errors.size.reshape(-1, width) / unit


def rms(rows: Float64) -> Float64:
    """Root mean square of each row without its NaNs, float64[n, width] -> float64[n, 1]; 0 if none is left."""
    peak, total, count = square_sums(rows)
    return (peak * np.sqrt(total / np.maximum(count, 1)))[:, None]


def square_sums(rows: Float64) -> tuple[Float64, Float64, NDArray[np.int64]]:
    """The terms of the root mean square of each row, from which the RMS of joined rows can be computed.

    Args:
        rows: float64[n, width].

    Returns:
        For each row, without its NaNs: the largest magnitude, the sum of squares divided by the square of that, and
        the number of elements. The division comes first, so that no square overflows or underflows.
    """
    present = ~np.isnan(rows)
    values = np.where(present, np.abs(rows), 0.0)
    peak = np.max(values, axis=-1)
    values /= np.where(peak == 0.0, 1.0, peak)[:, None]
    return peak, np.einsum("ij,ij->i", values, values), np.sum(present, axis=-1)


def _same_class(a: Float64, b: Float64) -> Mask:
    """Where both are finite, both NaN, or both the same infinity."""
    return (np.isfinite(a) & np.isfinite(b)) | (np.isnan(a) & np.isnan(b)) | (np.isinf(a) & (a == b))


def _in_place(values: Float64, reference: Float64, form: Format) -> Mask:
    """Where a value is finite, NaN or infinite as the reference is, or the infinity to which the reference rounds."""
    overflowed = (np.abs(reference) >= form.overflow) & np.isinf(values) & (np.sign(values) == np.sign(reference))
    return _same_class(values, reference) | overflowed
