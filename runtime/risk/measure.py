"""How far one norm is off in a dtype, in PyTorch or as a target writes it, on rows that a model called it with."""

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
    """A norm's tensors and some rows that it is called with.

    Attributes:
        spec: what it computes.
        x: `[rows, *normalized dims]`, any floating dtype.
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
        """The same, with every array rounded to `dtype`."""
        arrays = (self.x, self.weight, self.bias, self.gate)
        with np.errstate(over="ignore"):
            return NormRows(self.spec, *(a if a is None else a.astype(numpy_dtype(dtype)) for a in arrays))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class NormError:
    """How far a norm's result is from the truth.

    Attributes:
        max_relative: largest error, relative to the root mean square of the truth's row.
        mean_relative: mean of the same.
        max_units: largest error in units of eps(dtype) x max(|truth|, RMS of the truth's row); a few for a norm that
            does nothing but round.
        max_ulp: largest error in ULPs of the dtype at the truth.
        nonfinite: elements that are not finite where the truth is.

    A result that is not finite makes the first four infinite.
    """

    max_relative: float
    mean_relative: float
    max_units: float
    max_ulp: float
    nonfinite: int


def reference_of(rows: NormRows) -> NDArray[np.float64]:
    """The norm in float64 on the rows as they are, x's shape."""
    from ...models.reference import reference

    arrays = (rows.x, rows.weight, rows.bias, rows.gate)
    return reference(rows.spec, *(a if a is None else a.astype(np.float64) for a in arrays))  # type: ignore[arg-type]


def error_in_torch(rows: NormRows, dtype: str, expected: NDArray[np.float64]) -> NormError:
    """How far PyTorch in `dtype` is off, with x and the weights rounded to it first."""
    from ...models.eager import eager
    from ..runners.torch import to_numpy, to_torch

    cast = rows.cast(dtype)
    tensors = (None if a is None else to_torch(a) for a in (cast.weight, cast.bias, cast.gate))
    return _error(to_numpy(eager(cast.spec, to_torch(cast.x), *tensors)), expected, dtype)


def error_in_onnxruntime(rows: NormRows, dtype: str, target: str, expected: NDArray[np.float64]) -> NormError:
    """How far ONNX Runtime on the CPU is off in `dtype` with what `target` writes.

    Raises:
        UnsupportedError: the target or ONNX Runtime cannot do this norm in this dtype.
        EnvironmentMissingError: onnxruntime is not installed.
    """
    cast = rows.cast(dtype)
    model, place = norm_model(cast.spec, cast.x.shape[1:], dtype, target, cast.weight, cast.bias)
    _, arrays = place.split(NormFeed(cast.x, cast.gate))
    one_thread = {"intra_op_num_threads": 1}
    with run_alone(cut_out(model, [place.cut()]), "cpu", None, session_options=one_thread) as run:
        return _error(run({place.name: arrays})[place.name]["y"], expected, dtype)


def _error(result: Array, expected: NDArray[np.float64], dtype: str) -> NormError:
    """The result may be wider than `dtype`, where a wider scale promoted it; it is measured in `dtype` all the same.

    An overflow counts as an error, even where `dtype` rounds the truth to infinity.
    """
    kind = numpy_dtype(dtype)
    errors = errors_of(result.astype(np.float64), expected, None)
    width = math.prod(expected.shape[1:])
    measured = ~np.isnan(errors.size).reshape(-1, width)
    if not measured.any():
        return NormError(0.0, 0.0, 0.0, 0.0, 0)
    size = errors.size.reshape(-1, width)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Where the truth is a row of zeros, so is a right result.
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
