"""Measure the error of one norm in a dtype, in PyTorch or in ONNX Runtime, on rows from a running model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...models.dtypes import numpy_dtype
from ...models.spec import NormSpec
from ..accuracy.errors import errors_of, rms, row_scale_error, ulps_of
from ..accuracy.float_formats import format_of
from ..norms.access import NormFeed
from ..norms.cut import cut_out, run_alone
from ..norms.norm_model import norm_model
from ..runners.base import Array


@dataclass(frozen=True, slots=True)
class NormRows:
    """A norm's tensors and some rows of its input.

    Attributes:
        spec: the formula that it computes.
        x: `[rows, *normalized dims]`, any floating-point dtype.
        weight: broadcastable to x's trailing dims, or None.
        bias: like weight.
        gate: x's shape, or None.
    """

    spec: NormSpec
    x: Array
    weight: Array | None = None
    bias: Array | None = None
    gate: Array | None = None

    def cast(self, dtype: str) -> NormRows:
        """A copy with every array rounded to `dtype`."""
        arrays = (self.x, self.weight, self.bias, self.gate)
        with np.errstate(over="ignore"):
            return NormRows(self.spec, *(a if a is None else a.astype(numpy_dtype(dtype)) for a in arrays))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class NormError:
    """The error of a norm's result against the reference.

    Attributes:
        max_relative: largest error, relative to the root mean square of the reference's row.
        mean_relative: mean error, relative to the same.
        max_units: largest error in units of eps(dtype) x max(|reference|, RMS of the reference's row); a few units are
            unavoidable rounding.
        max_ulp: largest error in ULPs of the dtype at the reference.
        nonfinite: number of elements that are not finite where the reference is finite.

    An element that is not finite where the reference is finite makes the first four infinite.
    """

    max_relative: float
    mean_relative: float
    max_units: float
    max_ulp: float
    nonfinite: int


def reference_of(rows: NormRows) -> NDArray[np.float64]:
    """The float64 result of the norm on the rows, x's shape."""
    from ...models.reference import reference

    arrays = (rows.x, rows.weight, rows.bias, rows.gate)
    return reference(rows.spec, *(a if a is None else a.astype(np.float64) for a in arrays))  # type: ignore[arg-type]


def error_in_torch(rows: NormRows, dtype: str, expected: NDArray[np.float64]) -> NormError:
    """The error of PyTorch in `dtype`, with x and the weights rounded to it first."""
    from ...models.eager import eager
    from ..runners.torch import to_numpy, to_torch

    cast = rows.cast(dtype)
    tensors = (None if a is None else to_torch(a) for a in (cast.weight, cast.bias, cast.gate))
    return _error(to_numpy(eager(cast.spec, to_torch(cast.x), *tensors)), expected, dtype)


def error_in_onnxruntime(rows: NormRows, dtype: str, target: str, expected: NDArray[np.float64]) -> NormError:
    """The error of ONNX Runtime on the CPU in `dtype`, with the norm lowered for `target`.

    Raises:
        UnsupportedError: the target or ONNX Runtime does not support this norm in this dtype.
        EnvironmentMissingError: onnxruntime is not installed.
    """
    cast = rows.cast(dtype)
    model, place = norm_model(cast.spec, cast.x.shape[1:], dtype, target, cast.weight, cast.bias)
    _, arrays = place.split(NormFeed(cast.x, cast.gate))
    one_thread = {"intra_op_num_threads": 1}
    with run_alone(cut_out(model, [place.cut()]), "cpu", None, session_options=one_thread) as run:
        return _error(run({place.name: arrays})[place.name]["y"], expected, dtype)


def _error(result: Array, expected: NDArray[np.float64], dtype: str) -> NormError:
    """The error in `dtype`, even if a wider scale promoted the result to a wider dtype.

    An overflow counts as an error, even if `dtype` rounds the reference to infinity.
    """
    kind = numpy_dtype(dtype)
    errors = errors_of(result.astype(np.float64), expected, None)
    width = math.prod(expected.shape[1:])
    measured = ~np.isnan(errors.size).reshape(-1, width)
    if not measured.any():
        return NormError(0.0, 0.0, 0.0, 0.0, 0)
    size = errors.size.reshape(-1, width)
    with np.errstate(divide="ignore", invalid="ignore"):
        # If the reference is a row of zeros, so is a correct result.
        relative = np.where(size == 0.0, 0.0, size / rms(errors.scale.reshape(-1, width)))[measured]
    units = row_scale_error(errors, width, format_of(kind))[measured]
    ulps = ulps_of(errors, kind).reshape(-1, width)[measured]
    return NormError(
        float(relative.max()),
        float(relative.mean()),
        float(units.max()),
        float(ulps.max()),
        int(np.count_nonzero(np.isinf(size[measured]))),
    )
