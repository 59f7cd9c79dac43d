"""Check one norm (`check_norm`): compare its error on rows of every kind with the error of a baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ...models.dtypes import HALF_DTYPES
from ...models.spec import NormSpec
from ..accuracy.compare_output import OutputVerdict, all_passed, judge
from ..accuracy.errors import errors_of, row_scale_error
from ..accuracy.float_formats import format_of, ulp_size
from ..accuracy.tolerances import TOLERANCES, Limits
from ..runners.base import Array
from .access import CalledNorm, NormFeed
from .adversarial_rows import AS_IT_RUNS, KINDS, RowKind

# In half types the result is rounded once or twice, and errors of the float32 steps before that are negligible; a
# candidate that rounds once more than PyTorch has half an ULP more. The margin is for the float32 statistics.
_HALF_ULP_FACTOR, _HALF_ULP_FLOOR = 1.25, 0.6
# Minimum number of rows of each kind that are judged, and of elements if rows are short.
_LEAST_ROWS, _ELEMENTS = 4, 1 << 13
# If all squares are equal, or one dominates, the rounding errors of a sequential sum all have the same sign: ONNX
# Runtime's float32 norms then had errors of width/128 eps, for widths of 2048 to 65,536, where PyTorch's cascade
# summation has almost none. Twice that is allowed.
_PLAIN_SUMS = 1 / 64
# If the error of PyTorch's own norm exceeds this many eps x max(|reference|, row RMS), the reference has another
# formula. The RMS alone is too strict: one of 4096 channels may be 64 times as large, and so is its rounding error.
# With float32 statistics, a half type has only the roundings of the result; statistics in a half type accumulate more.
_SOUND = {"float16": 8.0, "bfloat16": 8.0, "float32": 512.0, "float64": 4096.0}
_SOUND_IN_HALF = 128.0

# Computes a norm's result on some rows in another way: the reference in float64, or another baseline.
OnRows = Callable[[NormFeed], Array]


def check_norm(
    norm: CalledNorm,
    feed: NormFeed,
    kinds: Array | None,
    candidate: Array,
    baseline: Array,
    reference: OnRows,
    *,
    baseline_name: str = "PyTorch",
    second_baseline: OnRows | None = None,
    limits: Limits | None = None,
) -> list[OutputVerdict]:
    """The verdicts on one norm's result, one for each kind of row.

    A sample of the rows of each kind is judged, because the rows of a norm are independent of each other.

    Args:
        norm: the norm that was called.
        feed: its inputs; x has the norm's shape.
        kinds: the kind of each row, int64[rows], as `adversarial` returns it; None for the values of a running model.
        candidate: the result that is judged.
        baseline: the result whose error limits the candidate's error, in x's shape.
        reference: returns the float64 result of some rows, `[rows, *normalized dims]`.
        baseline_name: the baseline's name in reasons.
        second_baseline: another result of some rows that is as good as the baseline's where squares overflow: a
            candidate that fails on a kind of row that is not tame is compared with this one.
        limits: explicit limits, which replace the comparison with the baseline's error; where a kind of row is not
            tame, a result that is as accurate as the baseline's passes too.
    """
    if candidate.shape != baseline.shape:
        reason = f"expected the shape {list(baseline.shape)} of {baseline_name}, got {list(candidate.shape)}"
        return [OutputVerdict("shape", False, reason, None, None)]
    tail = norm.shape[len(norm.shape) - norm.spec.trailing_dims :]
    x, mine, own = (side.reshape(-1, *tail) for side in (feed.x, candidate, baseline))
    gate = None if feed.gate is None else feed.gate.reshape(-1, *tail)
    chosen = {AS_IT_RUNS: _telling_rows(x)} if kinds is None else _rows_by_kind(kinds, math.prod(tail))
    verdicts = []
    for kind, rows in chosen.items():
        if not len(rows):
            continue
        part = NormFeed(x[rows], None if gate is None else gate[rows])
        expected = reference(part)
        if limits is not None:
            verdicts.append(_judge_within(kind, norm, mine[rows], expected, own[rows], limits))
            continue
        verdict = judge_norm(kind, norm, mine[rows], expected, own[rows], baseline_name)
        if not verdict.passed and not kind.tame and second_baseline is not None:
            verdict = judge_norm(kind, norm, mine[rows], expected, second_baseline(part))
        verdicts.append(verdict)
    return verdicts


def check_sum(total: Array, wanted: Array) -> list[OutputVerdict]:
    """A failed verdict on the sum that a fused residual add returns; an empty list if it is equal bit for bit."""
    same = total.shape == wanted.shape and np.array_equal(
        total.astype(np.float64), wanted.astype(np.float64), equal_nan=True
    )
    return [] if same else [OutputVerdict("sum", False, "its second output is not the sum of its inputs", None, None)]


def summary_of(verdicts: Sequence[OutputVerdict]) -> tuple[bool | None, str]:
    """Whether a norm passed on all kinds of rows, None if that cannot be judged, and the reason in one line."""
    passed = all_passed(verdict.passed for verdict in verdicts)
    if passed:
        return True, f"correct on {len({verdict.name for verdict in verdicts})} kinds of rows"
    bad = [verdict for verdict in verdicts if verdict.passed is passed]
    names = ", ".join(dict.fromkeys(verdict.name for verdict in bad))
    return passed, f"{'wrong' if passed is False else 'not judged'} on: {names}; {bad[0].name}: {bad[0].reason}"


def _rows_by_kind(kinds: Array, width: int) -> dict[RowKind, Array]:
    """The rows to judge, by kind; `kinds` is the kind of each row, `width` the number of elements in a row."""
    most = max(_LEAST_ROWS, _ELEMENTS // max(width, 1))
    return {kind: np.flatnonzero(kinds == number)[:most] for number, kind in enumerate(KINDS)}


def _telling_rows(x: Array) -> Array:
    """The rows to judge of a running model: evenly spaced ones, and those with the largest and smallest values."""
    count = len(x)
    most = max(4 * _LEAST_ROWS, 8 * _ELEMENTS // max(x[0].size, 1)) if count else 0
    if count <= most:
        return np.arange(count)
    sizes = np.abs(x.reshape(count, -1)).max(axis=1)
    ends = [int(np.argmax(sizes)), int(np.argmin(sizes))]
    return np.unique([*np.linspace(0, count - 1, most - 2).astype(int), *ends])


def judge_norm(
    kind: RowKind, norm: CalledNorm, candidate: Array, reference: Array, baseline: Array, baseline_name: str = "PyTorch"
) -> OutputVerdict:
    """The verdict on one norm's result for one kind of row: that of `judge`, and for half types a limit on ULPs.

    It is not judged if the baseline's own norm is not close to the reference, because the reference is not valid then.
    """
    verdict = judge(kind.name, candidate, reference, baseline, baseline_name=baseline_name)
    mine, own = verdict.figures, verdict.baseline_figures
    if mine is None or own is None:
        return verdict
    dtype = baseline.dtype.name
    # With a wide weight, the result is wide but was rounded to x's dtype before.
    rounded = norm.x_dtype if norm.spec.follows_weight and norm.x_dtype in HALF_DTYPES else dtype
    width = math.prod(norm.shape[len(norm.shape) - norm.spec.trailing_dims :])
    units = row_scale_error(errors_of(baseline, reference, None), width, format_of(rounded))
    off = float(np.max(units, where=~np.isnan(units), initial=0.0))
    if kind.tame and not off <= sound_limit(norm.spec, rounded):
        reason = no_reference(norm.spec, off, f"{baseline_name}'s own norm")
        return OutputVerdict(kind.name, None, reason, mine, own)
    if not verdict.passed and dtype == "float32" and kind.sums_one_way:
        limit = (TOLERANCES[dtype].floor_max + _PLAIN_SUMS * width) * format_of(dtype).eps
        plain = judge(
            kind.name, candidate, reference, baseline, limits=Limits(atol=limit * _size(reference), rtol=limit)
        )
        return plain if plain.passed else verdict
    if verdict.passed and dtype in HALF_DTYPES:
        ulp, own_ulp = (_large_ulp(side, reference) for side in (candidate, baseline))
        allowed = max(_HALF_ULP_FLOOR, _HALF_ULP_FACTOR * own_ulp)
        if ulp > allowed:
            reason = f"error of {ulp:.3g} ULP in large elements, {allowed:.3g} allowed"
            return OutputVerdict(kind.name, False, f"{reason}; {baseline_name}'s own is {own_ulp:.3g} ULP", mine, own)
    return verdict


def _judge_within(
    kind: RowKind, norm: CalledNorm, candidate: Array, reference: Array, baseline: Array, limits: Limits
) -> OutputVerdict:
    """The verdict on one norm's result for one kind of row, by explicit limits; see `check_norm`."""
    verdict = judge(kind.name, candidate, reference, baseline, limits=limits)
    if verdict.passed or kind.tame:
        return verdict
    other = judge_norm(kind, norm, candidate, reference, baseline)
    return other if other.passed else verdict


def sound_limit(spec: NormSpec, dtype: str) -> float:
    """The largest error that PyTorch's own norm may have against the reference, in eps x max(|reference|, row RMS)."""
    return _SOUND_IN_HALF if spec.sums_in_half and dtype in HALF_DTYPES else _SOUND[dtype]


def no_reference(spec: NormSpec, off: float, whose: str = "PyTorch's own norm", unit: str = "eps x row scale") -> str:
    """The reason why a norm cannot be judged: PyTorch, or `whose`, does not compute the formula of the spec."""
    return (
        f"{whose} differs by {off:.3g} {unit} from the formula that it was recognized as "
        f"({spec.describe()}), so there is no valid reference"
    )


def _large_ulp(array: Array, reference: Array) -> float:
    """The largest error in ULPs among elements of at least their row's RMS: smaller ones may be the result of a
    cancellation with a bias, or of a gate near zero, and may have lost their significant digits before."""
    rows = reference.reshape(len(reference), -1)
    with np.errstate(invalid="ignore"):
        large = np.isfinite(rows) & (np.abs(rows) >= np.sqrt(np.mean(np.square(rows), axis=1, keepdims=True)))
        values = array.reshape(rows.shape).astype(np.float64)
        large &= np.isfinite(values)
    error = np.abs(values[large] - rows[large]) / ulp_size(rows[large], array.dtype)
    return float(np.max(error, initial=0.0))


def _size(reference: Array) -> float:
    """The RMS of the finite elements of an array."""
    finite = reference[np.isfinite(reference)]
    return float(np.sqrt(np.mean(np.square(finite)))) if finite.size else 0.0
