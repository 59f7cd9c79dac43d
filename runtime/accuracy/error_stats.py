"""Error statistics of an array against the reference (`Figures`), accumulated part by part (`FiguresOf`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import Errors, Float64, is_exact, kind_of, rms, row_width, ulps_of
from .tolerances import names_logits

# Upper edges of the histogram's bins, in ULPs.
HISTOGRAM_EDGES: tuple[float, ...] = (0.0, 0.25, 0.5, *(2.0**power for power in range(25)), math.inf)
_WORST = 5


@dataclass(frozen=True, slots=True)
class Worst:
    """One of the elements with the largest errors: its index, its value, the expected value, and the error in ULPs."""

    index: tuple[int, ...]
    value: float
    reference: float
    baseline: float | None
    ulp: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Error statistics of an array. Where the reference is NaN or infinite, only `nonfinite_agree` is computed.

    Attributes:
        max_ulp: largest error, in ULPs of the array's dtype at the reference (absolute for integers).
        mean_ulp: mean error in ULPs.
        p999_ulp: the error in ULPs that 99.9% of the elements do not exceed.
        max_abs: largest absolute error.
        max_rel_row: largest absolute error divided by the RMS of the reference's row (a row is the last dim).
        rms_rel_row: root mean square, over all rows, of a row's RMS error divided by the RMS of the reference's row.
        cosine: cosine similarity of the two arrays, flattened, over the elements that are finite in both.
        differing: elements whose bits differ from the baseline's (all NaNs are equal); None without a baseline of the
            same dtype.
        nonfinite_agree: NaN and infinities are in the same places, with the same signs, as in the reference. An
            infinity also agrees where the reference rounds to it, and where the baseline has it too.
        count: elements in the array.
        top1_agreement: share of rows whose largest element (the first of equal ones) has the same index as the
            reference's; None unless the array holds logits. Rows in which the reference has NaN or positive infinity
            are skipped.
        kl: mean of KL(softmax(reference) || softmax(array)) over the same rows, in nats; None as for top1_agreement.
        histogram: number of errors in each bin of `HISTOGRAM_EDGES`; None if nothing was measured.
        worst: the elements with the largest errors in ULPs, at most 5, largest first, equal errors in index order.

    An element that is not finite although a finite value is expected makes max_ulp, mean_ulp, max_abs, max_rel_row
    and rms_rel_row infinite.
    """

    max_ulp: float
    mean_ulp: float
    p999_ulp: float
    max_abs: float
    max_rel_row: float
    rms_rel_row: float
    cosine: float
    differing: int | None
    nonfinite_agree: bool
    count: int
    top1_agreement: float | None = None
    kl: float | None = None
    histogram: tuple[int, ...] | None = None
    worst: tuple[Worst, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Every statistic as a JSON value; the histogram with its edges."""
        values = dataclasses.asdict(self)
        if self.histogram is not None:
            values["histogram"] = {"ulp_at_most": HISTOGRAM_EDGES, "count": self.histogram}
        return {name: json_value(value) for name, value in values.items()}


def json_value(value: Any) -> Any:
    """A value as JSON: numbers that are not finite become the strings `inf`, `-inf` and `nan`, tuples become lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: json_value(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(part) for part in value]
    return value


def is_logits(name: str, array: NDArray[Any]) -> bool:
    """Whether an output holds class scores: it has several classes, and `names_logits` holds for its name."""
    has_classes = array.ndim > 0 and array.shape[-1] >= 2 and kind_of(array.dtype) == "floating-point"
    return has_classes and names_logits(name)


class FiguresOf:
    """Accumulates the error statistics of an array.

    Args:
        array: the array that is measured.
        reference: of the same shape, float64 (or the array's dtype for integers and booleans).
        baseline: of the same shape; for `differing`, and shown beside the worst elements.
        logits: whether the last dim holds class scores.
    """

    def __init__(
        self, array: NDArray[Any], reference: NDArray[Any], baseline: NDArray[Any] | None, *, logits: bool
    ) -> None:
        self._shape = array.shape
        self._flat = array.reshape(-1)
        self._reference = reference.reshape(-1)
        self._baseline = None if baseline is None else baseline.reshape(-1)
        self._row = row_width(array.shape, 1)
        # Bits can be compared only if both arrays have the same dtype.
        self._differing = 0 if baseline is not None and baseline.dtype == array.dtype else None
        self._agree = True
        self._measured = 0
        self._sum_ulp = self._max_abs = self._max_relative = self._relative_squares = 0.0
        self._rows = 0
        self._histogram = np.zeros(len(HISTOGRAM_EDGES), np.int64)
        # Keeping all errors above the 99.9th percentile makes that percentile exact.
        self._largest = _Largest(max(_WORST, array.size // 1000 + 2))
        self._cosine = _Cosine()
        self._logits = _Logits(array.shape[-1]) if logits else None

    def add(self, part: slice, errors: Errors) -> None:
        """Add a part of whole rows, given as a slice of the flattened array, with its errors."""
        array, reference = self._flat[part], self._reference[part]
        values, exact = array.astype(np.float64), reference.astype(np.float64, copy=False)
        self._agree &= bool(errors.agrees.all())
        if self._differing is not None and self._baseline is not None:
            self._differing += _differing(array, self._baseline[part])
        self._cosine.add(values, exact)
        if self._logits is not None:
            self._logits.add(values, exact)
        measured = ~np.isnan(errors.size)
        self._measured += int(np.count_nonzero(measured))
        if not measured.any():
            return
        places = part.start + np.flatnonzero(measured)
        ulps = ulps_of(errors, array.dtype)[measured]
        self._sum_ulp += float(ulps.sum())
        self._histogram += np.bincount(np.searchsorted(HISTOGRAM_EDGES, ulps), minlength=len(HISTOGRAM_EDGES))
        self._largest.add(ulps, places)
        self._max_abs = max(self._max_abs, float(errors.size[measured].max()))
        self._add_relative(errors)

    def result(self) -> Figures:
        """The statistics of all parts; all zero, with cosine 1, if there were none."""
        top1, kl = (None, None) if self._logits is None else self._logits.result()
        ulps, places = self._largest.result()
        nothing = not self._measured
        return Figures(
            max_ulp=0.0 if nothing else float(ulps[0]),
            mean_ulp=0.0 if nothing else self._sum_ulp / self._measured,
            p999_ulp=0.0 if nothing else float(ulps[self._measured - 1 - math.ceil((self._measured - 1) * 0.999)]),
            max_abs=self._max_abs,
            max_rel_row=self._max_relative,
            rms_rel_row=0.0 if nothing else math.sqrt(self._relative_squares / self._rows),
            cosine=1.0 if nothing else self._cosine.result(),
            differing=self._differing,
            nonfinite_agree=self._agree,
            count=self._flat.size,
            top1_agreement=top1,
            kl=kl,
            histogram=None if nothing else tuple(int(count) for count in self._histogram),
            worst=tuple(
                self._worst(int(place), float(ulp)) for place, ulp in zip(places[:_WORST], ulps, strict=False) if ulp
            ),
        )

    def _add_relative(self, errors: Errors) -> None:
        """Errors divided by the RMS of their rows."""
        sizes = errors.size.reshape(-1, self._row)
        largest = np.fmax.reduce(sizes, axis=-1)
        scale = rms(errors.scale.reshape(-1, self._row))[:, 0]
        infinite = np.asarray(np.isposinf(largest))
        typical = np.where(infinite, np.inf, rms(np.where(infinite[:, None], 0.0, sizes))[:, 0])
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            # A row without errors gives 0 / 0, and a row in which nothing is measured gives NaN.
            worst, mean = (np.where(largest > 0.0, part / scale, 0.0) for part in (largest, typical))
            self._max_relative = max(self._max_relative, float(np.max(worst)))
            self._relative_squares += float(np.sum(np.square(mean)))
        self._rows += int(np.count_nonzero(~np.isnan(largest)))

    def _worst(self, place: int, ulp: float) -> Worst:
        index = tuple(int(i) for i in np.unravel_index(place, self._shape)) if self._shape else ()
        baseline = None if self._baseline is None else _number(self._baseline[place])
        return Worst(index, _number(self._flat[place]), _number(self._reference[place]), baseline, ulp)


def _number(value: Any) -> float:
    """An element as a Python int or float."""
    return int(value) if is_exact(value.dtype) else float(value)


def _differing(a: NDArray[Any], b: NDArray[Any]) -> int:
    """Number of elements whose bits differ, for arrays of one dtype. All NaNs are equal."""
    bits = np.dtype(f"u{a.dtype.itemsize}")
    different = np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits)
    if not is_exact(a.dtype):
        different &= ~(np.isnan(a) & np.isnan(b))
    return int(np.count_nonzero(different))


class _Largest:
    """The largest values and their indices; of equal values the first ones."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._values = np.zeros(0)
        self._places = np.zeros(0, np.int64)

    def add(self, values: Float64, places: NDArray[np.int64]) -> None:
        """Add values; their indices must follow all earlier ones."""
        if len(self._values) == self._count:
            more = values > self._values.min()
            values, places = values[more], places[more]
        values, places = np.concatenate([self._values, values]), np.concatenate([self._places, places])
        if len(values) > self._count:
            least = np.partition(values, -self._count)[-self._count]
            kept = values > least
            equal = np.flatnonzero(values == least)
            kept[equal[: self._count - np.count_nonzero(kept)]] = True
            values, places = values[kept], places[kept]
        self._values, self._places = values, places

    def result(self) -> tuple[Float64, NDArray[np.int64]]:
        """The values in descending order, and their indices."""
        order = np.argsort(-self._values, kind="stable")
        return self._values[order], self._places[order]


class _Cosine:
    """The cosine similarity of two arrays over the elements that are finite in both.

    Both are divided by the largest magnitude so far, so that no square overflows or underflows.
    """

    def __init__(self) -> None:
        self._peaks = (0.0, 0.0)
        # a.b, a.a and b.b
        self._products = (0.0, 0.0, 0.0)

    def add(self, a: Float64, b: Float64) -> None:
        """Add the elements of a part."""
        both = np.isfinite(a) & np.isfinite(b)
        if not both.all():
            a, b = a[both], b[both]
        if not a.size:
            return
        before = self._peaks
        top_a, top_b = (max(p, float(np.abs(x).max())) for p, x in zip(before, (a, b), strict=True))
        self._peaks = (top_a, top_b)
        # If the peak was 0, there are no earlier products to rescale.
        by_a, by_b = before[0] / (top_a or 1.0), before[1] / (top_b or 1.0)
        a, b = a / (top_a or 1.0), b / (top_b or 1.0)
        ab, aa, bb = self._products
        self._products = (
            ab * by_a * by_b + float(np.dot(a, b)),
            aa * by_a * by_a + float(np.dot(a, a)),
            bb * by_b * by_b + float(np.dot(b, b)),
        )

    def result(self) -> float:
        """The cosine; 1 when both are zero, 0 when one is."""
        if not all(self._peaks):
            return float(not any(self._peaks))
        ab, aa, bb = self._products
        return ab / math.sqrt(aa * bb)


class _Logits:
    """Agreement of the most likely class, and the divergence of the two distributions."""

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._rows = self._same = 0
        self._divergence = 0.0

    def add(self, values: Float64, reference: Float64) -> None:
        """Add whole rows."""
        rows, true = values.reshape(-1, self._classes), reference.reshape(-1, self._classes)
        known = _has_softmax(true)
        if not known.all():
            rows, true = rows[known], true[known]
        sound = _has_softmax(rows)
        self._rows += len(rows)
        if not sound.all():
            # These rows have no softmax distribution: the divergence is infinite.
            self._divergence = math.inf
            rows, true = rows[sound], true[sound]
        self._same += int(np.count_nonzero(rows.argmax(axis=-1) == true.argmax(axis=-1)))
        self._divergence += _divergence(true, rows)

    def result(self) -> tuple[float | None, float | None]:
        """Share of rows with the same most likely class, and the mean divergence in nats; None without rows."""
        if not self._rows:
            return None, None
        return self._same / self._rows, self._divergence / self._rows


def _has_softmax(rows: Float64) -> NDArray[np.bool_]:
    """Which rows contain no NaN, no positive infinity, and at least one finite value."""
    return np.isfinite(rows.max(axis=-1))


def _divergence(true: Float64, rows: Float64) -> float:
    """Sum over rows of KL(softmax(true) || softmax(rows)), in nats."""
    log_p, log_q = _log_softmax(true), _log_softmax(rows)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        terms = p * (log_p - log_q)
    # By definition, a class with probability 0 in the reference contributes 0.
    terms[p == 0.0] = 0.0
    # Rounding may give a sum of about -1e-17 if both are equal.
    return float(np.maximum(terms.sum(axis=-1), 0.0).sum())


def _log_softmax(rows: Float64) -> Float64:
    shifted = rows - rows.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
