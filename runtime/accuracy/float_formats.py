"""Floating-point formats (`Format`, `format_of`) and the size of a unit in the last place (`ulp_size`)."""

from __future__ import annotations

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from ...models.errors import UsageError


class Format(NamedTuple):
    """A binary floating-point format: significand bits including the hidden one, smallest and largest exponent."""

    precision: int
    exponent_min: int
    exponent_max: int

    @property
    def eps(self) -> float:
        """The spacing just above 1."""
        return math.ldexp(1.0, 1 - self.precision)

    @property
    def largest(self) -> float:
        """The largest finite value."""
        return math.ldexp(2.0 - self.eps, self.exponent_max)

    @property
    def overflow(self) -> float:
        """The smallest magnitude that rounds to infinity; infinity for float64, which is never rounded here."""
        return math.inf if self.precision == 53 else math.ldexp(2.0 - self.eps / 2, self.exponent_max)

    @property
    def smallest(self) -> float:
        """The smallest subnormal, which is also the smallest ULP."""
        return math.ldexp(1.0, self.exponent_min - self.precision + 1)


FORMATS = {
    "float16": Format(11, -14, 15),
    np.dtype(ml_dtypes.bfloat16).name: Format(8, -126, 127),
    "float32": Format(24, -126, 127),
    "float64": Format(53, -1022, 1023),
}


def format_of(dtype: DTypeLike) -> Format:
    """The format of a dtype.

    Raises:
        UsageError: the dtype is not in `FORMATS`.
    """
    name = np.dtype(dtype).name
    if name not in FORMATS:
        raise UsageError(f"errors cannot be measured in {name}: expected one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def ulp_size(reference: NDArray[np.float64], dtype: DTypeLike) -> NDArray[np.float64]:
    """The spacing of `dtype` at |reference|: one unit in the last place.

    Args:
        reference: float64, any shape.
        dtype: float16, bfloat16, float32 or float64; the smallest ULP is its smallest subnormal.

    Returns:
        float64 of the reference's shape. Beyond the largest finite value, and at infinity, the ULP of that value; NaN
        at NaN.

    Raises:
        UsageError: the dtype is not one of the four.
    """
    form = format_of(dtype)
    magnitude = np.minimum(np.abs(np.asarray(reference, dtype=np.float64)), form.largest)
    exponent = np.frexp(magnitude)[1] - 1
    # frexp returns exponent 0 for zero; zero needs the smallest exponent.
    exponent = np.where(magnitude == 0.0, form.exponent_min, exponent)
    exponent = np.maximum(exponent, form.exponent_min)
    return np.where(np.isnan(magnitude), np.nan, np.ldexp(1.0, exponent - form.precision + 1))
