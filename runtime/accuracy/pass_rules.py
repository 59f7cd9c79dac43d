"""The rules that decide whether an output passes: `AsGood`, `Within`, `Equal` and `InPlace`.

The default rule, `AsGood`, does not use ULPs of single elements: an output that is nearly zero because large terms
cancel has an error of thousands of its own ULPs in every correct implementation. It uses errors in units of
`eps(dtype) * max(|reference|, RMS of the reference's row)`: the unavoidable rounding of the terms behind the output.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .error_stats import Figures
from .errors import LEAST_ROW, Errors, Float64, Mask, row_scale_error, row_width, square_sums, ulps_of
from .float_formats import Format, format_of
from .tolerances import FIGURE_LIMITS, TOLERANCES, Limits, Tolerance, small_sample

# A row in which PyTorch's error exceeds this share of the scale, or this many times that of the typical row, is not
# representative of the other rows: it is judged by its own error, which may have as few as this many causes.
_LOST_SHARE = 0.25
_ODD_RATIO = 16.0
_ODD_CAUSES = 4
# Errors within one row are correlated (a norm's factor affects the whole row), so a row counts as at most this many
# independent errors.
_ROW_CAUSES = 16


class Arrays(NamedTuple):
    """The arrays of a verdict: three arrays of one shape, and the baseline's name in reasons."""

    candidate: NDArray[Any]
    reference: NDArray[Any]
    baseline: NDArray[Any]
    baseline_name: str


class Margin(NamedTuple):
    """The errors that the default rule compares, and the largest that pass, in eps x max(|reference|, row RMS).

    Attributes:
        worst, allowed_worst: the largest error, in the row that is nearest to its limit or beyond it.
        rms, allowed_rms: the root mean square over all rows.
    """

    worst: float
    allowed_worst: float
    rms: float
    allowed_rms: float


class Nearest(NamedTuple):
    """Of explicit limits the one that is nearest to being exceeded, or exceeded most.

    Attributes:
        figure: the field of `Limits`; `atol` where `atol` and `rtol` together limit each element.
        value: the element's error, its ULPs, or the statistic.
        limit: the largest that passes; of `min_cosine` and `min_top1`, the least.
        share: `value` divided by `limit`; of those two, the distance from 1 divided by that of the limit.
    """

    figure: str
    value: float
    limit: float
    share: float


class Rule(Protocol):
    """A condition on an output."""

    def add(self, part: slice, candidate: Errors, baseline: Errors) -> None:
        """Add a part of whole rows, a slice of the flattened arrays, with the errors of both."""
        ...

    def result(self) -> tuple[bool | None, str]:
        """Whether the output passes, None if that cannot be judged; and why."""
        ...


class _Places:
    """Counts wrong elements, and keeps the index of the first."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.count = 0
        self._shape = shape
        self._first: int | None = None

    def add(self, start: int, wrong: Mask) -> None:
        found = int(np.count_nonzero(wrong))
        if found and self._first is None:
            self._first = start + int(np.argmax(wrong))
        self.count += found

    @property
    def first(self) -> tuple[int, ...]:
        """The index of the first wrong element; empty if there is none."""
        if self._first is None or not self._shape:
            return ()
        return tuple(int(i) for i in np.unravel_index(self._first, self._shape))


class Equal:
    """Integers and booleans must equal the baseline's."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self._flat = arrays.candidate.reshape(-1), arrays.baseline.reshape(-1)
        self._different = _Places(arrays.candidate.shape)

    def add(self, part: slice, candidate: Errors, baseline: Errors) -> None:
        mine, theirs = self._flat
        self._different.add(part.start, mine[part] != theirs[part])

    def result(self) -> tuple[bool, str]:
        candidate, count, at = self._arrays.candidate, self._different.count, self._different.first
        if not count:
            return True, f"all {candidate.size} elements are equal"
        return False, (
            f"{count} of {candidate.size} elements differ, the first at {at}: "
            f"expected {self._arrays.baseline[at]}, got {candidate[at]}"
        )


class InPlace:
    """NaN and infinities must be where the reference has them."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self._wrong = _Places(arrays.candidate.shape)
        self._excused = 0

    def add(self, part: slice, candidate: Errors, baseline: Errors) -> None:
        self._wrong.add(part.start, ~candidate.agrees)
        self._excused += int(np.count_nonzero(np.isinf(baseline.size)))

    @property
    def excuse(self) -> str:
        """A note on elements in which the baseline itself is not in place; empty if there are none."""
        if not self._excused:
            return ""
        baseline, name = self._arrays.baseline, self._arrays.baseline_name
        return (
            f"; {name} in {baseline.dtype.name} is not finite in {self._excused} of {baseline.size} elements where "
            "the reference is finite: there the candidate may equal either"
        )

    def result(self) -> tuple[bool, str]:
        candidate, count, at = self._arrays.candidate, self._wrong.count, self._wrong.first
        if not count:
            return True, "NaN and infinities are in place"
        return False, (
            f"NaN or infinity out of place in {count} of {candidate.size} elements, the first at {at}: "
            f"expected {self._arrays.reference[at]:.6g}, got {candidate[at]}"
        )


class Within:
    """Every error, and every statistic of the whole output, must be within explicit limits."""

    def __init__(self, arrays: Arrays, limits: Limits) -> None:
        self._limits = limits
        self._dtype = arrays.candidate.dtype
        self._size = arrays.candidate.size
        self._beyond = _Places(arrays.candidate.shape)
        self._first = ""
        self._elements: list[Nearest] = []

    def add(self, part: slice, candidate: Errors, baseline: Errors) -> None:
        limits = self._limits
        if not limits.on_elements:
            return
        beyond = np.zeros(candidate.size.shape, dtype=bool)
        if limits.is_absolute:
            with np.errstate(invalid="ignore"):  # infinity times a reference of zero
                allowed = (limits.atol or 0.0) + (limits.rtol or 0.0) * np.abs(candidate.scale)
                beyond |= candidate.size > allowed
            self._elements += _nearest_element("atol", candidate.size, allowed)
        ulps = None
        if limits.ulp is not None:
            ulps = ulps_of(candidate, self._dtype)
            beyond |= ulps > limits.ulp
            self._elements += _nearest_element("ulp", ulps, np.full_like(ulps, limits.ulp))
        if beyond.any() and not self._beyond.count:
            at = int(np.argmax(beyond))
            self._first = f"{candidate.size[at]:.3g}" + ("" if ulps is None else f", {ulps[at]:.3g} ULP")
        self._beyond.add(part.start, beyond)

    def result(self) -> tuple[bool, str]:
        rule, count = self._limits.describe(), self._beyond.count
        if not rule:
            return True, "no element is limited"
        if not count:
            return True, f"every element satisfies {rule}"
        return False, (
            f"{count} of {self._size} elements violate {rule}, the first at {self._beyond.first}: "
            f"an error of {self._first}"
        )

    def with_figures(self, figures: Figures) -> tuple[bool | None, str]:
        """The result, with the limits on statistics of the whole output; a statistic that failed comes first."""
        parts: list[tuple[bool | None, str]] = [self.result()] if self._limits.on_elements else []
        parts += [_of_figure(label, limit, figures) for label, limit in self._limits.on_figures.items()]
        passed = (
            False if any(part[0] is False for part in parts) else None if any(p[0] is None for p in parts) else True
        )
        order = (passed, False, None, True)
        return passed, "; ".join(reason for _, reason in sorted(parts, key=lambda part: order.index(part[0])))

    def nearest(self, figures: Figures) -> Nearest | None:
        """The limit that is nearest to being exceeded; None if nothing that it limits is defined."""
        found = list(self._elements)
        for label, limit in self._limits.on_figures.items():
            value = getattr(figures, FIGURE_LIMITS[label].figure)
            if value is not None:
                at_least = FIGURE_LIMITS[label].at_least
                share = _ratio(1.0 - value, 1.0 - limit) if at_least else _ratio(value, limit)
                found.append(Nearest(label, float(value), float(limit), share))
        return max(found, key=lambda row: row.share, default=None)


def _nearest_element(figure: str, errors: Float64, allowed: Float64) -> list[Nearest]:
    """The element whose error is nearest to what it may be; none without a finite one."""
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.where(errors > 0.0, errors / allowed, 0.0)
    shares = np.where(np.isfinite(errors), shares, -1.0)
    at = int(np.argmax(shares)) if shares.size else 0
    if not shares.size or shares[at] < 0.0:
        return []
    return [Nearest(figure, float(errors[at]), float(allowed[at]), float(shares[at]))]


def _ratio(value: float, limit: float) -> float:
    """A value as a share of its limit: of a limit of 0, infinity, unless the value is 0 or less."""
    if value <= 0.0:
        return 0.0
    return value / limit if limit > 0.0 else math.inf


def _of_figure(label: str, limit: float, figures: Figures) -> tuple[bool | None, str]:
    """Whether a statistic is within a limit, None if it is not defined; and both numbers."""
    row = FIGURE_LIMITS[label]
    value = getattr(figures, row.figure)
    if value is None:
        return None, f"not logits, or no row is finite, so {row.label} is not defined; remove the limit {label}"
    if row.at_least:
        return value >= limit, f"{row.label} {_share(value, limit)} of at least {limit:g} required"
    return value <= limit, f"{row.label} {value:.3g} of at most {limit:g} allowed"


def _share(value: float, limit: float) -> str:
    """A share near 1 with as many digits as show how far it is from 1, and from the limit."""
    distance = min((abs(number) for number in (1.0 - value, value - limit) if number), default=1.0)
    return f"{value:.{min(max(4, 1 - math.floor(math.log10(distance))), 12)}f}"


class AsGood:
    """The rule of `Tolerance`: an error comparable to the baseline's, by the row for the baseline's dtype."""

    def __init__(self, arrays: Arrays) -> None:
        self._dtype = arrays.baseline.dtype
        self._name = arrays.baseline_name
        self._form = format_of(self._dtype)
        self._width = row_width(arrays.baseline.shape, LEAST_ROW)
        self._any_finite = False
        self._parts: list[_Rows] = []
        self.margin: Margin | None = None

    def add(self, part: slice, candidate: Errors, baseline: Errors) -> None:
        mine_finite = np.isfinite(candidate.size)
        judged = (mine_finite & np.isfinite(baseline.size)).reshape(-1, self._width)
        self._any_finite |= bool(mine_finite.any())
        mine, theirs = (np.where(judged, self._units(errors), np.nan) for errors in (candidate, baseline))
        self._parts.append(_Rows(*square_sums(mine), *square_sums(theirs)[:2]))

    def result(self) -> tuple[bool | None, str]:
        rows = _Rows(*(np.concatenate(columns) for columns in zip(*self._parts, strict=True))) if self._parts else None
        if rows is None or not rows.counts.any():
            if self._any_finite:
                return None, (
                    f"there is no baseline: {self._name} is not finite wherever the reference is finite; "
                    "give atol or rtol"
                )
            return True, "there is no finite element to measure"
        return self._verdict(rows, TOLERANCES[self._dtype.name])

    def _units(self, errors: Errors) -> Float64:
        """See `row_scale_error`; an overflow becomes the largest number, so that the errors can be summed."""
        return np.minimum(row_scale_error(errors, self._width, self._form), np.finfo(np.float64).max)

    def _verdict(self, rows: _Rows, tolerance: Tolerance) -> tuple[bool, str]:
        few = small_sample(int(np.sum(np.minimum(rows.counts, _ROW_CAUSES))))
        allowed, sound = _allowed_max(rows.own_worst, few, self._form, tolerance)
        row = int(np.argmax(rows.worst / allowed))
        mean, own_mean = rows.mean_squares(sound)
        allowed_mean = few * tolerance.factor_rms * own_mean + tolerance.floor_rms
        self.margin = Margin(float(rows.worst[row]), float(allowed[row]), mean, allowed_mean)
        reason = (
            f"error max {rows.worst[row]:.3g} of {allowed[row]:.3g} allowed (row {row} of {len(allowed)}), "
            f"rms {mean:.3g} of {allowed_mean:.3g} allowed, in {self._dtype.name} eps x row scale; "
            f"{self._name}'s own max {rows.own_worst.max():.3g}, rms {own_mean:.3g}"
        )
        if not sound.all():
            reason += (
                f"; {np.count_nonzero(~sound)} rows in which {self._name} has a large error are judged by that error"
            )
        return bool(rows.worst[row] <= allowed[row] and mean <= allowed_mean), reason


class _Rows(NamedTuple):
    """The quantities of each row that the default rule uses; see `square_sums`."""

    worst: Float64
    squares: Float64
    counts: NDArray[np.int64]
    own_worst: Float64
    own_squares: Float64

    def mean_squares(self, chosen: Mask) -> tuple[float, float]:
        """Root mean square over the chosen rows, of the candidate and of the baseline; 0 if there are none."""
        count = max(int(self.counts[chosen].sum()), 1)
        sides = ((self.worst[chosen], self.squares[chosen]), (self.own_worst[chosen], self.own_squares[chosen]))
        mine, theirs = (_joined(peaks, squares, count) for peaks, squares in sides)
        return mine, theirs


def _joined(peaks: Float64, squares: Float64, count: int) -> float:
    """The root mean square of joined rows, from their largest values and their scaled sums of squares."""
    peak = float(peaks.max(initial=0.0))
    if peak == 0.0:
        return 0.0
    return peak * float(np.sqrt(np.sum(squares * np.square(peaks / peak)) / count))


def _allowed_max(theirs: Float64, few: float, form: Format, tolerance: Tolerance) -> tuple[Float64, Mask]:
    """The largest error allowed in each row, and which rows are sound, from the baseline's largest error in each."""
    lost = theirs > _LOST_SHARE / form.eps
    typical = float(np.median(theirs[~lost])) if not lost.all() else 0.0
    sound = ~lost & (theirs <= _ODD_RATIO * typical + tolerance.floor_max)
    level = few * theirs[sound].max(initial=0.0)
    own = max(few, small_sample(_ODD_CAUSES)) * theirs
    return tolerance.factor_max * np.where(sound, level, np.maximum(own, level)) + tolerance.floor_max, sound
