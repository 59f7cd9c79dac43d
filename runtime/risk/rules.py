"""The rules that decide whether a norm is at risk in a dtype (`judge_norm`), and their thresholds with reasons.

A norm is `unsafe` in a dtype if its results on the observed inputs are wrong, `caution` if they are nearly wrong or
depend on the runtime, and `safe` otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from ...models.spec import NormSpec
from ..accuracy.float_formats import FORMATS
from ..runners.base import Array
from .measure import NormError, NormRows
from .observe import NormSeen

Level = Literal["safe", "caution", "unsafe"]
LEVELS: tuple[Level, ...] = ("safe", "caution", "unsafe")

# Other inputs may be larger than the observed ones by this factor.
LEAST_MARGIN = 4.0
# 1 + w may have an error of this many eps; the roundings of w and of the sum give 1 eps if w does not cancel the 1.
_WEIGHT_EPS = 4.0


class ErrorLimits(NamedTuple):
    """Errors above which a norm is at risk, in units of eps(dtype) x max(|reference|, RMS of the reference's row)."""

    caution: float
    unsafe: float


# The unavoidable roundings of a norm give an error of 1 to 2.5 units on normal inputs (PyTorch, all norms in the
# tests). In float16 and bfloat16 the rounding of x and of the result dominates. In float32 the summation order matters
# too: one outlier among 4096 channels causes up to 20 units. `unsafe` is 100 times the error of a safe norm; bfloat16
# is too coarse for that: 32 units are a quarter of the value.
ERROR_LIMITS: dict[str, ErrorLimits] = {
    "float32": ErrorLimits(40.0, 400.0),
    "float16": ErrorLimits(20.0, 200.0),
    "bfloat16": ErrorLimits(8.0, 32.0),
}


@dataclass(frozen=True, slots=True)
class RiskVerdict:
    """Whether a norm is at risk in one dtype, and every reason, the most severe first."""

    verdict: Level
    reasons: list[str]


def judge_norm(
    seen: NormSeen, rows: NormRows, dtype: str, error: NormError, targets: Mapping[str, NormError]
) -> RiskVerdict:
    """The verdict on one norm in one dtype.

    Args:
        seen: statistics of its inputs.
        rows: its tensors and sampled rows, in the model's dtype.
        dtype: `float32`, `float16` or `bfloat16`.
        error: error of PyTorch in that dtype, on the sampled rows.
        targets: error of ONNX Runtime in that dtype by target, if it could be measured.
    """
    cast = rows.cast(dtype)
    unsafe = [*_wrong(seen, cast, dtype), *_too_far_off(error, dtype)]
    near = [*_near(seen, dtype), *_small(seen, dtype), *_weight(rows.spec, rows.weight, cast.weight, dtype)]
    limits = ERROR_LIMITS[dtype]
    if not unsafe and error.max_units > limits.caution:
        near.append(f"PyTorch in {dtype} has an error of {_off(error)}")
    near += _targets(error, targets, limits)
    level: Level = "unsafe" if unsafe else "caution" if near else "safe"
    return RiskVerdict(level, unsafe + near)


class CountingMargin(NamedTuple):
    """A value that must not overflow a dtype, and the factor by which the dtype's largest value exceeds it."""

    what: str
    dtype: str
    margin: float


def counting_margins(seen: NormSeen, dtype: str) -> list[CountingMargin]:
    """The margins that are relevant for a norm that is deployed in `dtype`.

    x and the result must fit `dtype`. The squares must fit the dtype of the statistics, and so must their sum if the
    norm has no mean; a mean may be summed in a wider dtype.
    """
    statistics = dtype if seen.spec.sums_in_half else "float32"
    own, wide = seen.margins[dtype], seen.margins[statistics]
    counting = [
        CountingMargin("x", dtype, own.x),
        CountingMargin("the result", dtype, own.result),
        CountingMargin("x^2", statistics, wide.square),
    ]
    if not seen.spec.has_mean:
        counting.append(CountingMargin("the sum of squares", statistics, wide.sum))
    return counting


def _wrong(seen: NormSeen, cast: NormRows, dtype: str) -> Iterator[str]:
    if seen.nonfinite_rows:
        yield f"{seen.nonfinite_rows} of {seen.rows} input rows contain NaN or infinity in the running model"
    for what, held_in, margin in counting_margins(seen, dtype):
        if margin < 1.0:
            yield f"{what} overflows {held_in}: it is {1 / margin:.3g} times the largest value"
    for name, array in (("weights", cast.weight), ("biases", cast.bias)):
        lost = 0 if array is None else int(np.count_nonzero(~np.isfinite(array.astype(np.float64))))
        if lost:
            yield f"{lost} {name} overflow {dtype}"


def _too_far_off(error: NormError, dtype: str) -> Iterator[str]:
    if error.nonfinite:
        yield f"{error.nonfinite} elements of the result are not finite in {dtype} where the reference is finite"
    elif error.max_units > ERROR_LIMITS[dtype].unsafe:
        yield f"PyTorch in {dtype} has an error of {_off(error)}"


def _near(seen: NormSeen, dtype: str) -> Iterator[str]:
    for what, held_in, margin in counting_margins(seen, dtype):
        if 1.0 <= margin < LEAST_MARGIN:
            yield f"{what} is within a factor of {margin:.3g} of overflow in {held_in}"
    total = seen.margins[dtype].sum
    if seen.spec.sums_in_half and seen.spec.has_mean and total < LEAST_MARGIN:
        state = "overflows" if total < 1.0 else f"is within a factor of {total:.3g} of overflow in"
        yield f"the sum of squares {state} {dtype}, unless the runtime sums in a wider dtype"


def _small(seen: NormSeen, dtype: str) -> Iterator[str]:
    """Rows so small that their values, or their squares, are rounded to subnormals or to zero."""
    tiny = math.ldexp(1.0, FORMATS[dtype].exponent_min)
    if 0.0 < seen.smallest_rms < tiny:
        yield f"rows of RMS {seen.smallest_rms:.3g} become subnormal in {dtype}, so that eps dominates"
    elif seen.spec.sums_in_half and 0.0 < seen.smallest_rms**2 < tiny:
        yield f"x^2 of rows of RMS {seen.smallest_rms:.3g} becomes subnormal in {dtype}, so that eps dominates"
    if seen.spec.sums_in_half and 0.0 < seen.spec.eps < tiny and seen.eps_matters:
        share = 100 * seen.eps_matters
        yield f"eps {seen.spec.eps:.3g} is subnormal in {dtype}, and it changes the result in {share:.3g}% of the rows"


def _weight(spec: NormSpec, weight: Array | None, cast: Array | None, dtype: str) -> Iterator[str]:
    if weight is None or cast is None:
        return
    exact = weight.astype(np.float64)
    if spec.scale_offset == 0.0:
        tiny = math.ldexp(1.0, FORMATS[dtype].exponent_min)
        small = np.count_nonzero((exact != 0.0) & (np.abs(exact) < tiny))
        if small:
            zeros = np.count_nonzero((exact != 0.0) & (cast == 0.0))
            yield f"{small} of {exact.size} weights are subnormal in {dtype}, {zeros} of them become 0"
        return
    scale = spec.scale_offset + exact
    rounded = 1.0 + cast.astype(np.float32) if spec.offset_in_float32 else cast + np.ones_like(cast)
    lost = np.abs(rounded.astype(np.float64) - scale) > _WEIGHT_EPS * FORMATS[dtype].eps * np.abs(scale)
    if lost.any():
        yield f"{np.count_nonzero(lost)} of {scale.size} values of 1 + weight are inaccurate in {dtype} (cancellation)"


def _targets(error: NormError, targets: Mapping[str, NormError], limits: ErrorLimits) -> Iterator[str]:
    """Reasons for targets that are at risk although PyTorch is not."""
    for target, other in targets.items():
        if other.nonfinite > error.nonfinite:
            yield f"{other.nonfinite} elements are not finite in ONNX Runtime with target {target}"
        elif other.max_units > max(limits.caution, 2 * error.max_units):
            yield f"ONNX Runtime with target {target} has an error of {_off(other)}"


def _off(error: NormError) -> str:
    return f"{error.max_units:.3g} eps x row scale"
