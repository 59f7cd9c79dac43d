"""How far an output is from the truth, and whether that is as close as PyTorch gets.

Three arrays meet here: the truth (float64), the yardstick (PyTorch in the deployment dtype) and the candidate (a
runtime's output). `figures` says how far one array is from the truth; `judge` gives the verdict on the candidate.

The verdict is not taken on ULPs of single elements: an output that is nearly zero because large terms cancelled has
an error of thousands of its own ULPs in every correct implementation. It is taken on errors in units of
`eps(dtype) * max(|truth|, RMS of the truth's row)`: the rounding that the terms behind the output had to suffer.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..models.errors import UsageError
from .tolerances import TOLERANCES, Tolerance, small_sample
from .ulp import FORMATS, Format, format_of, ulp_size

Float64 = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Figures:
    """How far an array is from the truth. Elements where the truth is NaN or infinite are compared in place only.

    Attributes:
        max_ulp: largest error, in ULPs of the array's dtype at the truth (in whole numbers for integers).
        mean_ulp: mean error in ULPs.
        p999_ulp: the error in ULPs that 99.9% of the elements do not exceed.
        max_abs: largest absolute error.
        max_rel_row: largest absolute error divided by the RMS of the truth's row, a row being the last dim.
        cosine: cosine of the angle between the two arrays, flattened, over the elements finite in both.
        differing: elements whose bits differ from the yardstick's (a NaN is a NaN); None without a yardstick of the
            same dtype.
        nonfinite_agree: NaN and infinities stand in the same places, with the same signs, as in the truth. An
            infinity also agrees where the truth rounds to it, and where the yardstick has it too.
        count: elements in the array.

    An element that is not finite where it should be makes max_ulp, mean_ulp, max_abs and max_rel_row infinite.
    """

    max_ulp: float
    mean_ulp: float
    p999_ulp: float
    max_abs: float
    max_rel_row: float
    cosine: float
    differing: int | None
    nonfinite_agree: bool
    count: int

    def to_dict(self) -> dict[str, Any]:
        """Every figure as a JSON value; infinity, which JSON lacks, becomes the text `inf`."""
        values = dataclasses.asdict(self)
        return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


class _Errors(NamedTuple):
    """Absolute errors of an array; all three have its shape.

    `size` is NaN where nothing is measured and infinite where a finite value was due; `scale` is the truth brought
    into the range of the dtype, NaN where it is not finite; `agrees` tells whether non-finite values are in place.
    """

    size: Float64
    scale: Float64
    agrees: Mask


def _is_exact(dtype: np.dtype[Any]) -> bool:
    """Whether values of this dtype are compared exactly: integers and booleans."""
    return np.issubdtype(dtype, np.integer) or dtype == np.bool_


def _same_class(a: Float64, b: Float64) -> Mask:
    """Where both are finite, both NaN, or both the same infinity."""
    return (np.isfinite(a) & np.isfinite(b)) | (np.isnan(a) & np.isnan(b)) | (np.isinf(a) & (a == b))


def _in_place(values: Float64, truth: Float64, form: Format) -> Mask:
    """Where a value is of the truth's class, or the infinity to which the truth rounds in this format."""
    overflowed = (np.abs(truth) >= form.overflow) & np.isinf(values) & (np.sign(values) == np.sign(truth))
    return _same_class(values, truth) | overflowed


def _errors(array: NDArray[Any], truth: NDArray[Any], yardstick: NDArray[Any] | None) -> _Errors:
    """Errors of an array against the truth.

    Where the yardstick itself is not in place (it overflowed, the truth did not), the array agrees when it does as
    the truth or as the yardstick; the yardstick's own infinity is not measured.
    """
    form = format_of(np.float64 if _is_exact(array.dtype) else array.dtype)
    values, exact = array.astype(np.float64), truth.astype(np.float64)
    agrees = _in_place(values, exact, form)
    contested = np.zeros(agrees.shape, dtype=bool)
    if yardstick is not None:
        reference = yardstick.astype(np.float64)
        contested = ~_in_place(reference, exact, form)
        # A finite value where only the yardstick overflowed is of the truth's class already.
        agrees |= contested & _same_class(values, reference)
    measured = np.isfinite(exact) & ~(contested & ~np.isfinite(values))
    # A truth beyond the range cannot be met any better than by the largest value.
    scale = np.where(np.isfinite(exact), np.clip(exact, -form.largest, form.largest), np.nan)
    with np.errstate(invalid="ignore", over="ignore"):
        size = np.where(np.isfinite(values), np.abs(values - scale), 0.0)
    size = np.where(measured, size, np.nan)
    size = np.where(np.isfinite(exact) & ~agrees, np.inf, size)
    return _Errors(size, scale, agrees)


def _rms(rows: Float64) -> Float64:
    """Root of the mean square of each row without its NaNs, float64[n, width] -> float64[n, 1]; 0 for none left."""
    present = ~np.isnan(rows)
    values = np.where(present, np.abs(rows), 0.0)
    # Divided by the largest first, so that no square overflows or vanishes.
    peak = np.max(values, axis=-1, keepdims=True)
    total = np.sum(np.square(values / np.where(peak == 0.0, 1.0, peak)), axis=-1, keepdims=True)
    return peak * np.sqrt(total / np.maximum(np.sum(present, axis=-1, keepdims=True), 1))


def _row_width(shape: tuple[int, ...], least: int) -> int:
    """Elements in a row: the last dim, and as many dims before it as it takes to reach `least` elements."""
    width = 1
    for position, size in enumerate(reversed(shape)):
        if position and width >= least:
            break
        width *= size
    return width


def _cosine(a: Float64, b: Float64) -> float:
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    if not np.any(a) or not np.any(b):
        return float(np.any(a) == np.any(b))
    # Scaled first, so that no square overflows or vanishes.
    a, b = a / np.max(np.abs(a)), b / np.max(np.abs(b))
    return float(np.sum(a * b) / math.sqrt(float(np.sum(a * a)) * float(np.sum(b * b))))


def _differing(a: NDArray[Any], b: NDArray[Any]) -> int | None:
    """Elements whose bits differ; None when the dtypes do. Two NaNs are the same whatever their payload."""
    if a.dtype != b.dtype:
        return None
    bits = np.dtype(f"u{a.dtype.itemsize}")
    different = np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits)
    if not _is_exact(a.dtype):
        different &= ~(np.isnan(a) & np.isnan(b)).reshape(different.shape)
    return int(np.count_nonzero(different))


def figures(candidate: NDArray[Any], truth: NDArray[Any], yardstick: NDArray[Any] | None = None) -> Figures:
    """How far `candidate` is from `truth`.

    Args:
        candidate: float16, bfloat16, float32, float64, integers or booleans, any shape.
        truth: the same shape, float64 (integers and booleans where the candidate has them).
        yardstick: the same shape: what PyTorch gives in the deployment dtype; for `differing`, and to excuse
            non-finite values that PyTorch has as well.

    Returns:
        The figures; all zero, with cosine 1, for an empty array.

    Raises:
        UsageError: the shapes differ, or the dtype is one that errors are not measured in.
    """
    for other, array in (("truth", truth), ("yardstick", yardstick)):
        if array is not None and array.shape != candidate.shape:
            raise UsageError(f"the candidate has shape {candidate.shape}, the {other} {array.shape}.")
    differing = None if yardstick is None else _differing(candidate, yardstick)
    return _summary(_errors(candidate, truth, yardstick), candidate, truth, differing)


def _summary(errors: _Errors, array: NDArray[Any], truth: NDArray[Any], differing: int | None) -> Figures:
    measured = ~np.isnan(errors.size)
    agree = bool(errors.agrees.all())
    if not measured.any():
        return Figures(0.0, 0.0, 0.0, 0.0, 0.0, 1.0, differing, agree, array.size)
    size = errors.size[measured]
    width = _row_width(array.shape, 1)
    row_rms = np.broadcast_to(_rms(errors.scale.reshape(-1, width)), (array.size // width, width))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ulps = size if _is_exact(array.dtype) else size / ulp_size(errors.scale[measured], array.dtype)
        relative = np.where(size == 0.0, 0.0, size / row_rms.reshape(array.shape)[measured])
    return Figures(
        max_ulp=float(ulps.max()),
        mean_ulp=float(ulps.mean()),
        p999_ulp=float(np.quantile(ulps, 0.999, method="higher")),
        max_abs=float(size.max()),
        max_rel_row=float(relative.max()),
        cosine=_cosine(array.astype(np.float64), truth.astype(np.float64)),
        differing=differing,
        nonfinite_agree=agree,
        count=array.size,
    )


# A row shorter than this has an RMS that depends on chance; it is joined with its neighbours.
_LEAST_ROW = 32
# A row in which PyTorch is off by more than this share of the scale, or by this many times the typical row, says
# nothing about the other rows: it is held to its own error, which may have as few as this many causes.
_LOST_SHARE = 0.25
_ODD_RATIO = 16.0
_ODD_CAUSES = 4
# Errors in one row go together (a norm's factor errs for all of it), so it counts for this many of them at most.
_ROW_CAUSES = 16


@dataclass(frozen=True, slots=True)
class OutputVerdict:
    """Whether one output passed, and why; the figures are None where the arrays could not be compared."""

    name: str
    passed: bool
    reason: str
    figures: Figures | None
    yardstick_figures: Figures | None

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON values."""
        return {
            "name": self.name,
            "passed": self.passed,
            "reason": self.reason,
            "figures": self.figures and self.figures.to_dict(),
            "yardstick_figures": self.yardstick_figures and self.yardstick_figures.to_dict(),
        }


def judge(
    name: str,
    candidate: NDArray[Any],
    truth: NDArray[Any],
    yardstick: NDArray[Any],
    *,
    atol: float | None = None,
    rtol: float | None = None,
) -> OutputVerdict:
    """The verdict on one output.

    Floating-point outputs are held to the row of `TOLERANCES` for the yardstick's dtype. Integers and booleans must
    equal the yardstick's.

    Args:
        name: the output's name.
        candidate: the runtime's output.
        truth: what PyTorch gives in float64.
        yardstick: what PyTorch gives in the deployment dtype.
        atol: with rtol, replaces the table: every |candidate - truth| may be atol + rtol * |truth|. The one not given
            is 0. Integers and booleans are compared exactly all the same.
        rtol: see atol.

    Returns:
        The verdict; shapes or kinds of dtype that do not match are a failing one, not an exception.

    Raises:
        UsageError: atol or rtol is negative or NaN.
    """
    for label, value in (("atol", atol), ("rtol", rtol)):
        if value is not None and not value >= 0.0:
            raise UsageError(f"{label} is {value}; it must be a number of at least 0.")
    problem = _incomparable(candidate, truth, yardstick)
    if problem:
        return OutputVerdict(name, False, problem, None, None)
    errors, own_errors = _errors(candidate, truth, yardstick), _errors(yardstick, truth, None)
    if _is_exact(yardstick.dtype):
        passed, reason = _exactly(candidate, yardstick)
    elif not errors.agrees.all():
        passed, reason = False, _misplaced(candidate, truth, errors.agrees)
    elif atol is not None or rtol is not None:
        passed, reason = _within(errors, atol or 0.0, rtol or 0.0)
    else:
        passed, reason = _as_good(errors, own_errors, yardstick.dtype)
    overflowed = int(np.count_nonzero(np.isinf(own_errors.size)))
    if overflowed:
        reason += (
            f"; in {overflowed} of {yardstick.size} elements PyTorch in {yardstick.dtype.name} is not finite "
            "though the truth is: there the candidate may be finite or do the same"
        )
    if candidate.dtype != yardstick.dtype:
        reason += f"; the candidate is {candidate.dtype.name}, the yardstick {yardstick.dtype.name}"
    mine = _summary(errors, candidate, truth, _differing(candidate, yardstick))
    return OutputVerdict(name, passed, reason, mine, _summary(own_errors, yardstick, truth, None))


def _kind(dtype: np.dtype[Any]) -> str:
    if dtype == np.bool_:
        return "boolean"
    if _is_exact(dtype):
        return "integer"
    return "floating-point" if dtype.name in FORMATS else "unsupported"


def _incomparable(candidate: NDArray[Any], truth: NDArray[Any], yardstick: NDArray[Any]) -> str | None:
    for label, array in (("candidate", candidate), ("truth", truth)):
        if array.shape != yardstick.shape:
            return f"shape mismatch: the {label} has {array.shape}, the yardstick {yardstick.shape}"
        if _kind(array.dtype) != _kind(yardstick.dtype):
            return f"dtype mismatch: the {label} is {array.dtype.name}, the yardstick {yardstick.dtype.name}"
    if _kind(yardstick.dtype) == "unsupported":
        return f"outputs of dtype {yardstick.dtype.name} cannot be compared; drop the output or cast it in the model"
    return None


def _first(places: Mask) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(places)[0]) if places.ndim else ()


def _exactly(candidate: NDArray[Any], yardstick: NDArray[Any]) -> tuple[bool, str]:
    different = np.asarray(candidate != yardstick)
    count = int(np.count_nonzero(different))
    if not count:
        return True, f"all {candidate.size} elements are equal"
    at = _first(different)
    return False, f"{count} of {candidate.size} elements differ, the first at {at}: {candidate[at]} for {yardstick[at]}"


def _misplaced(candidate: NDArray[Any], truth: NDArray[Any], agrees: Mask) -> str:
    at = _first(~agrees)
    count = int(np.count_nonzero(~agrees))
    return (
        f"NaN or infinity out of place in {count} of {candidate.size} elements, the first at {at}: "
        f"{candidate[at]} where the truth is {truth[at]:.6g}"
    )


def _within(errors: _Errors, atol: float, rtol: float) -> tuple[bool, str]:
    allowed = atol + rtol * np.abs(errors.scale)
    beyond = errors.size > allowed
    count = int(np.count_nonzero(beyond))
    rule = f"|error| <= {atol:g} + {rtol:g} x |truth|"
    if not count:
        return True, f"every element meets {rule}"
    at = _first(beyond)
    return False, f"{count} of {beyond.size} elements miss {rule}, the first at {at}: an error of {errors.size[at]:.3g}"


def _units(errors: _Errors, form: Format) -> Float64:
    """Errors in units of eps x max(|truth|, row RMS), float64[rows, width]; NaN where nothing is measured."""
    width = _row_width(errors.size.shape, _LEAST_ROW)
    scale = errors.scale.reshape(-1, width)
    unit = np.maximum(form.eps * np.fmax(np.abs(scale), _rms(scale)), form.smallest)
    with np.errstate(over="ignore"):
        return np.minimum(errors.size.reshape(-1, width) / unit, np.finfo(np.float64).max)


def _allowed_max(theirs: Float64, few: float, form: Format, tolerance: Tolerance) -> tuple[Float64, Mask]:
    """The largest error that each row may have, and which rows are sound, from PyTorch's largest error in each row."""
    lost = theirs > _LOST_SHARE / form.eps
    typical = float(np.median(theirs[~lost])) if not lost.all() else 0.0
    sound = ~lost & (theirs <= _ODD_RATIO * typical + tolerance.floor_max)
    level = few * theirs[sound].max(initial=0.0)
    own = max(few, small_sample(_ODD_CAUSES)) * theirs
    return tolerance.factor_max * np.where(sound, level, np.maximum(own, level)) + tolerance.floor_max, sound


def _as_good(candidate: _Errors, yardstick: _Errors, dtype: np.dtype[Any]) -> tuple[bool, str]:
    """The rule of `Tolerance`."""
    both = np.isfinite(candidate.size) & np.isfinite(yardstick.size)
    if not both.any():
        if np.isfinite(candidate.size).any():
            return False, "nothing to judge by: PyTorch is finite nowhere that the truth is; give atol or rtol"
        return True, "there is no finite element to measure"
    form, tolerance = format_of(dtype), TOLERANCES[dtype.name]
    mine, theirs = _units(candidate, form), _units(yardstick, form)
    judged = both.reshape(mine.shape)
    few = small_sample(int(np.sum(np.minimum(np.sum(judged, axis=-1), _ROW_CAUSES))))
    mine, theirs = np.where(judged, mine, np.nan), np.where(judged, theirs, np.nan)
    worst, own_worst = (np.nan_to_num(u, nan=0.0).max(axis=-1) for u in (mine, theirs))
    allowed, sound = _allowed_max(own_worst, few, form, tolerance)
    row = int(np.argmax(worst / allowed))
    rms, own_rms = (float(_rms(u[sound].reshape(1, -1))[0, 0]) if sound.any() else 0.0 for u in (mine, theirs))
    allowed_rms = few * tolerance.factor_rms * own_rms + tolerance.floor_rms
    reason = (
        f"error max {worst[row]:.3g} of {allowed[row]:.3g} allowed (row {row} of {len(worst)}), "
        f"rms {rms:.3g} of {allowed_rms:.3g} allowed, in {dtype.name} eps x row scale; "
        f"PyTorch's own max {own_worst.max():.3g}, rms {own_rms:.3g}"
    )
    if not sound.all():
        reason += f"; {np.count_nonzero(~sound)} rows in which PyTorch itself is far off are held to its error there"
    return bool(worst[row] <= allowed[row] and rms <= allowed_rms), reason
