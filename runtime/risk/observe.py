"""Observe one norm while its model runs (`NormWatch`): statistics of its inputs, and a sample of their rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

import numpy as np
from numpy.typing import NDArray

from ...models.recognition.intercept import NormCall
from ...models.spec import NormSpec
from ..accuracy.float_formats import FORMATS
from ..runners.base import Array
from .measure import NormRows

if TYPE_CHECKING:
    from torch import Tensor

Float64 = NDArray[np.float64]

# The dtypes of a deployment, in the order of the reports.
DTYPES = ("float32", "float16", "bfloat16")
# Maximum number of rows in a norm's sample, of elements if rows are long, and the minimum number of rows then.
_SAMPLE_ROWS, _SAMPLE_ELEMENTS, _LEAST_ROWS = 256, 1 << 18, 16
# One eighth of the sample is for the rows with the largest |x|, and one for those with the smallest RMS.
_EXTREME_SHARE = 8
# Elements that are converted to float64 at a time.
_CHUNK = 1 << 20
# A channel whose RMS exceeds this many times that of the median channel is an outlier (6 as in Dettmers et al. 2022).
OUTLIER_RATIO = 6.0
_OUTLIERS_LISTED = 8
# eps matters in a row if it changes the result by more than this share.
_EPS_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Margins:
    """The factors by which a dtype's largest finite value exceeds the largest observed values; below 1 they overflow.

    Attributes:
        x: the norm's input.
        square: the square of the normalized value.
        sum: the sum of those squares over a row (or a group).
        result: what the norm returned.
    """

    x: float
    square: float
    sum: float
    result: float


@dataclass(frozen=True, slots=True)
class WeightRange:
    """The effective weight (w, or 1 + w): its largest and smallest non-zero magnitude, and the number of zeros."""

    largest: float
    smallest: float
    zeros: int

    @property
    def ratio(self) -> float:
        """Largest divided by smallest non-zero magnitude; 1 if all are zero."""
        return self.largest / self.smallest if self.smallest else 1.0


@dataclass(frozen=True, slots=True)
class NormSeen:
    """Statistics of the inputs of a norm.

    Attributes:
        path: path of the module.
        spec: the formula that it computed.
        width: the normalized trailing dims.
        calls: number of calls.
        rows: number of rows in all calls.
        nonfinite_rows: rows that contain NaN or infinity; the other statistics ignore them.
        largest: largest |x|.
        smallest_rms: smallest root mean square of a row (or group) that is not all zeros; 0 if all are.
        margins: margins to overflow by dtype.
        eps_decides: share of rows (or groups) where eps is at least the mean (or sum) of squares.
        eps_matters: share of rows (or groups) where eps changes the result by more than 1%.
        outliers: number of outlier channels: their RMS over all rows exceeds 6 times the median channel's.
        outlier_channels: up to 8 of them, as index and ratio to the median, largest first.
        weight: range of the effective weight, None without a weight.
    """

    path: str
    spec: NormSpec
    width: tuple[int, ...]
    calls: int
    rows: int
    nonfinite_rows: int
    largest: float
    smallest_rms: float
    margins: dict[str, Margins]
    eps_decides: float
    eps_matters: float
    outliers: int
    outlier_channels: list[tuple[int, float]]
    weight: WeightRange | None


class NormWatch:
    """Accumulates the statistics of one norm. Memory does not grow with the number of calls.

    Args:
        path: path of the module.
        call: its first call, for the spec, the width and the tensors. It is not counted; call `observe` for it too.
    """

    def __init__(self, path: str, call: NormCall) -> None:
        from ..runners.torch import to_numpy

        self._path, self._spec = path, call.spec
        self._width = tuple(call.x.shape[-call.spec.trailing_dims :])
        self._count = math.prod(self._width)
        self._weight, self._bias = (None if t is None else to_numpy(t) for t in (call.weight, call.bias))
        self._calls = self._rows = self._nonfinite = self._statistics = self._decides = self._matters = 0
        self._largest = self._largest_entering = self._largest_sum = self._largest_result = 0.0
        self._smallest = math.inf
        self._channels = np.zeros(self._count)
        sample = min(_SAMPLE_ROWS, max(_LEAST_ROWS, _SAMPLE_ELEMENTS // self._count))
        extreme = sample // _EXTREME_SHARE
        self._large, self._small, self._any = _Pool(extreme), _Pool(extreme), _Pool(sample - 2 * extreme)
        self._rng = np.random.default_rng(0)

    def observe(self, call: NormCall, result: Tensor) -> None:
        """Add one call to the statistics.

        Args:
            call: a call with the spec and width of the first call.
            result: the norm's result, x's shape.
        """
        self._calls += 1
        x, result = call.x.detach().reshape(-1, self._count), result.detach().reshape(-1, self._count)
        gate = None if call.gate is None else call.gate.detach().reshape(-1, self._count)
        step = max(1, _CHUNK // self._count)
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            self._take(x[part].cpu(), None if gate is None else gate[part].cpu(), result[part].cpu())

    def seen(self) -> NormSeen:
        """The statistics so far."""
        rms = np.sqrt(self._channels)  # up to a common factor, which cancels in the ratios
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.nan_to_num(rms / np.median(rms), nan=0.0, posinf=np.inf)
        outliers = np.flatnonzero(ratios > OUTLIER_RATIO)
        listed = outliers[np.argsort(-ratios[outliers], kind="stable")][:_OUTLIERS_LISTED]
        return NormSeen(
            self._path,
            self._spec,
            self._width,
            self._calls,
            self._rows,
            self._nonfinite,
            self._largest,
            math.sqrt(self._smallest) if math.isfinite(self._smallest) else 0.0,
            {dtype: self._margins(FORMATS[dtype].largest) for dtype in DTYPES},
            self._decides / max(self._statistics, 1),
            self._matters / max(self._statistics, 1),
            len(outliers),
            [(int(index), float(ratios[index])) for index in listed],
            self._weight_range(),
        )

    def sample(self) -> NormRows:
        """At most 256 rows, fewer if they are long: those with the largest |x| and with the smallest RMS, and a seeded
        uniform sample. Rows that contain NaN or infinity are excluded."""
        from ..runners.torch import to_numpy

        rows: dict[int, Array] = {}
        for pool in (self._large, self._small, self._any):
            if pool.rows is not None:
                rows |= dict(zip(pool.serials.tolist(), to_numpy(pool.rows), strict=True))
        # [rows, x and gate, width], in the order of observation
        planes = np.stack([rows[serial] for serial in sorted(rows)]) if rows else np.zeros((0, 2, self._count))
        x, gate = (planes[:, index].reshape(-1, *self._width) for index in (0, planes.shape[1] - 1))
        return NormRows(self._spec, x, self._weight, self._bias, gate if self._spec.has_gate else None)

    def _take(self, x: Tensor, gate: Tensor | None, result: Tensor) -> None:
        import torch

        planes = torch.stack([x] if gate is None else [x, gate.to(x.dtype)], dim=1)
        entering = x.double()
        if gate is not None:
            entering = entering * _gate_before(self._spec, gate.double())
        finite = planes.isfinite().all(dim=-1).all(dim=-1)
        serials = self._rows + np.flatnonzero(finite.numpy())
        self._rows += len(x)
        self._nonfinite += int((~finite).sum())
        if len(serials) == 0:
            return
        planes, result = planes[finite], result[finite].double()
        peaks = x[finite].double().abs().amax(dim=-1).numpy()
        self._largest = max(self._largest, float(peaks.max()))
        self._largest_result = max(self._largest_result, float(result.abs().max()))
        mean_squares = self._take_statistics(entering[finite].numpy())
        lowest = mean_squares.min(axis=-1)
        self._large.add(peaks, serials, planes)
        self._small.add(np.where(lowest > 0.0, -lowest, -np.inf), serials, planes)
        self._any.add(self._rng.random(len(serials)), serials, planes)

    def _take_statistics(self, entering: Float64) -> Float64:
        """Add the normalized values, float64[rows, width], to the statistics; returns float64[rows, groups] means of
        squares."""
        squares = np.square(entering)
        size = self._spec.group_size or self._count
        sums = squares.reshape(len(squares), -1, size).sum(axis=-1)
        self._channels += squares.sum(axis=0)
        self._largest_entering = max(self._largest_entering, float(np.abs(entering).max()))
        self._largest_sum = max(self._largest_sum, float(sums.max()))
        reduced, eps = sums / size if self._spec.has_mean else sums, self._spec.eps
        self._statistics += reduced.size
        self._decides += int(np.count_nonzero(eps >= reduced))
        with np.errstate(invalid="ignore"):  # eps 0 and a row of zeros
            self._matters += int(np.count_nonzero(np.sqrt(reduced / (reduced + eps)) < 1.0 - _EPS_SHARE))
        mean_squares: Float64 = sums / size
        self._smallest = min(self._smallest, float(np.min(mean_squares, where=sums > 0.0, initial=np.inf)))
        return mean_squares

    def _margins(self, largest: float) -> Margins:
        seen = (self._largest, self._largest_entering**2, self._largest_sum, self._largest_result)
        return Margins(*(largest / value if value else math.inf for value in seen))

    def _weight_range(self) -> WeightRange | None:
        if self._weight is None:
            return None
        values = np.abs(self._weight.astype(np.float64) + self._spec.scale_offset)
        some = values[values > 0.0]
        zeros = int(values.size - some.size)
        return WeightRange(float(values.max()), float(some.min()) if some.size else 0.0, zeros)


def _gate_before(spec: NormSpec, gate: Tensor) -> Tensor | float:
    """The factor of x before the normalization, from a gate in float64."""
    match spec.gate:
        case "none" | "after":
            return 1.0
        case "before":
            return _activated(spec, gate)
        case _:
            assert_never(spec.gate)


def _activated(spec: NormSpec, gate: Tensor) -> Tensor:
    match spec.activation:
        case "none":
            return gate
        case "silu":
            return gate.sigmoid() * gate
        case "sigmoid":
            return gate.sigmoid()
        case _:
            assert_never(spec.activation)


class _Pool:
    """The rows with the largest keys so far; with random keys, a uniform sample of all rows."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.keys: Float64 = np.zeros(0)
        self.serials: NDArray[np.int64] = np.zeros(0, np.int64)
        self.rows: Tensor | None = None

    def add(self, keys: Float64, serials: NDArray[np.int64], rows: Tensor) -> None:
        """Add rows, `[n, ...]`, each with its key and its serial number."""
        import torch

        best = np.argsort(-keys, kind="stable")[: self.size]
        self.keys, self.serials = np.append(self.keys, keys[best]), np.append(self.serials, serials[best])
        chosen = rows[torch.from_numpy(best)]
        merged = chosen if self.rows is None else torch.cat([self.rows, chosen])
        kept = np.argsort(-self.keys, kind="stable")[: self.size]
        self.keys, self.serials = self.keys[kept], self.serials[kept]
        self.rows = merged[torch.from_numpy(kept)]
