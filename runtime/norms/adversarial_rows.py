"""Adversarial inputs for a norm (`adversarial`): rows of several kinds, each of which exposes some faults."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...models.dtypes import numpy_dtype
from ...models.spec import NormSpec
from ..accuracy.float_formats import Format, format_of
from ..runners.base import Array
from .access import CalledNorm, NormFeed

Rows = NDArray[np.float64]
_Maker = Callable[[np.random.Generator, int, int, NormSpec, Format], Rows]


@dataclass(frozen=True, slots=True)
class RowKind:
    """A kind of row, and the accuracy that a norm can reach on it.

    Attributes:
        name: the name in reports.
        shows: the fault that it exposes.
        tame: no overflow and no cancellation excuse an error: PyTorch's own norm must be close to its formula.
        sums_one_way: all squares are equal, or one dominates, so that the rounding errors of a sequential sum all
            have the same sign.
    """

    name: str
    shows: str
    tame: bool = False
    sums_one_way: bool = False


@dataclass(frozen=True, slots=True)
class AdversarialKind(RowKind):
    """A kind of row that is generated; `make` returns float64[rows, width]."""

    make: _Maker = field(kw_only=True)


def _normal(rng: np.random.Generator, rows: int, width: int, spec: NormSpec, form: Format) -> Rows:
    return rng.standard_normal((rows, width))


def _outliers(rng: np.random.Generator, rows: int, width: int, spec: NormSpec, form: Format) -> Rows:
    values = rng.standard_normal((rows, width))
    values[:, rng.choice(width, min(2, width), replace=False)] *= 300.0
    return values


def _large(rng: np.random.Generator, rows: int, width: int, spec: NormSpec, form: Format) -> Rows:
    # 6e4 in float16; in other dtypes, so large that the sum of squares just fits float32.
    return rng.uniform(-1.0, 1.0, (rows, width)) * (6e4 if form.exponent_max == 15 else 1e15)


def _tiny(rng: np.random.Generator, rows: int, width: int, spec: NormSpec, form: Format) -> Rows:
    return rng.standard_normal((rows, width)) * np.sqrt(max(spec.eps, 1e-12)) * rng.choice([0.1, 0.5, 1.5], (rows, 1))


def _zeros(rng: np.random.Generator, rows: int, width: int, spec: NormSpec, form: Format) -> Rows:
    return np.zeros((rows, width))


def _constant(rng: np.random.Generator, rows: int, width: int, spec: NormSpec, form: Format) -> Rows:
    return np.broadcast_to(rng.uniform(0.5, 8.0, (rows, 1)), (rows, width)).copy()


def _single(rng: np.random.Generator, rows: int, width: int, spec: NormSpec, form: Format) -> Rows:
    values = np.zeros((rows, width))
    values[np.arange(rows), rng.integers(0, width, rows)] = rng.uniform(1.0, 100.0, rows)
    return values


def _subnormal(rng: np.random.Generator, rows: int, width: int, spec: NormSpec, form: Format) -> Rows:
    return rng.uniform(-1.0, 1.0, (rows, width)) * 2.0**form.exponent_min


def _largest(rng: np.random.Generator, rows: int, width: int, spec: NormSpec, form: Format) -> Rows:
    return rng.choice([-1.0, 1.0], (rows, width)) * form.largest


def _not_a_number(rng: np.random.Generator, rows: int, width: int, spec: NormSpec, form: Format) -> Rows:
    values = rng.standard_normal((rows, width))
    values[np.arange(rows), rng.integers(0, width, rows)] = np.where(np.arange(rows) % 2 == 0, np.nan, np.inf)
    return values


KINDS: tuple[AdversarialKind, ...] = (
    AdversarialKind("normal", "a wrong scale, order of casts or axis", tame=True, make=_normal),
    AdversarialKind(
        "outlier channels", "statistics summed in too few bits", tame=True, sums_one_way=True, make=_outliers
    ),
    AdversarialKind("large", "squares that overflow", make=_large),
    AdversarialKind("tiny", "a wrong epsilon, or one in the wrong place", tame=True, make=_tiny),
    AdversarialKind("zeros", "an epsilon that is missing", make=_zeros),
    AdversarialKind("constant", "a mean that is subtracted", tame=True, sums_one_way=True, make=_constant),
    AdversarialKind("single channel", "a wrong axis or group", tame=True, make=_single),
    AdversarialKind("subnormal", "values flushed to zero before epsilon is added", make=_subnormal),
    AdversarialKind("largest", "overflow at the edge of the dtype", make=_largest),
    AdversarialKind("NaN and Inf", "rows that leak into each other", make=_not_a_number),
)
# Not generated: the values that a norm receives while its model runs.
AS_IT_RUNS = RowKind("as it runs", "any fault that affects the model's own values", tame=True, sums_one_way=True)


def adversarial(norm: CalledNorm, turn: int, seed: int) -> tuple[NormFeed, Array]:
    """An input in which row r is of kind `(r + turn * rows) % len(KINDS)`.

    Args:
        norm: the norm that the input is for; a row is its normalized dims.
        turn: number of the input, from 0; `turns(norm)` inputs contain every kind at least once.
        seed: seed of the random numbers.

    Returns:
        The input, and the kind of each row, int64[rows].
    """
    spec, shape, dtype = norm.spec, norm.shape, numpy_dtype(norm.x_dtype)
    rows, width = _rows(norm)
    rng = np.random.default_rng([seed, turn, rows, width])
    kinds = (np.arange(rows) + turn * rows) % len(KINDS)
    values = np.zeros((rows, width))
    form = format_of(dtype)
    for number, kind in enumerate(KINDS):
        where = kinds == number
        if where.any():
            values[where] = kind.make(rng, int(where.sum()), width, spec, form)
    x = values.reshape(shape).astype(dtype)
    gate = None
    if norm.gate_dtype is not None:
        gate = (2.0 * rng.standard_normal(shape)).astype(numpy_dtype(norm.gate_dtype))
    return NormFeed(x, gate), kinds


def turns(norm: CalledNorm) -> int:
    """The number of inputs of the norm's shape that contain every kind."""
    rows, _ = _rows(norm)
    return -(-len(KINDS) // rows) if rows else 0


def _rows(norm: CalledNorm) -> tuple[int, int]:
    """Number of rows and their width; all groups of a row have the row's kind."""
    width = math.prod(norm.shape[len(norm.shape) - norm.spec.trailing_dims :])
    return (math.prod(norm.shape) // width if width else 0), width
