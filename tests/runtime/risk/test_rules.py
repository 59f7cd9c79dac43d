"""When a norm is at risk: each rule on both sides of its threshold."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.runtime.accuracy.float_formats import FORMATS
from rmsnorm_deploy.runtime.risk.measure import NormError, NormRows
from rmsnorm_deploy.runtime.risk.observe import DTYPES, Margins, NormSeen
from rmsnorm_deploy.runtime.risk.rules import (
    ERROR_LIMITS,
    LEAST_MARGIN,
    LEVELS,
    CountingMargin,
    RiskVerdict,
    counting_margins,
    judge_norm,
)

SPEC = NormSpec(eps=1e-6)
IN_HALF = NormSpec(eps=1e-6, order="no_upcast", statistics="input")
RIGHT = NormError(0.0, 0.0, 1.0, 1.0, 0)


def seen(spec: NormSpec = SPEC, *, margins: Margins | None = None, **changes: Any) -> NormSeen:
    """A norm that saw nothing remarkable."""
    fine = {dtype: margins or Margins(100.0, 100.0, 100.0, 100.0) for dtype in DTYPES}
    made = NormSeen("norm", spec, (4,), 1, 10, 0, 1.0, 1.0, fine, 0.0, 0.0, 0, [], None)
    return dataclasses.replace(made, **changes)


def rows(spec: NormSpec = SPEC, weight: list[float] | None = None, bias: list[float] | None = None) -> NormRows:
    arrays = [None if values is None else np.array(values, np.float64) for values in (weight or [1.0] * 4, bias)]
    return NormRows(spec, np.ones((1, 4)), *arrays)


def judged(
    what: NormSeen, of: NormRows | None = None, dtype: str = "float16", error: NormError = RIGHT, **targets: NormError
) -> RiskVerdict:
    return judge_norm(what, of or rows(what.spec), dtype, error, targets)


def error(units: float, nonfinite: int = 0) -> NormError:
    return NormError(0.0, 0.0, units, 0.0, nonfinite)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_remarkable_is_safe(dtype: str) -> None:
    assert judged(seen(), dtype=dtype) == RiskVerdict("safe", [])


def test_the_levels_and_limits_are_in_order() -> None:
    assert LEVELS == ("safe", "caution", "unsafe")
    assert set(ERROR_LIMITS) == set(DTYPES)
    assert all(limits.caution < limits.unsafe for limits in ERROR_LIMITS.values())


# -------------------------------------------------------------------------------------------------------- overflow


@pytest.mark.parametrize("dtype", DTYPES)
def test_margins_that_count(dtype: str) -> None:
    """Squares are held in float32 unless the statistics are the input's; a sum counts only without a mean."""
    by_dtype = {name: Margins(*(100.0 * n + m for m in range(1, 5))) for n, name in enumerate(DTYPES)}
    own, wide = by_dtype[dtype], by_dtype["float32"]
    plain = [CountingMargin("x", dtype, own.x), CountingMargin("the result", dtype, own.result)]
    squares = CountingMargin("x^2", "float32", wide.square)
    what = dataclasses.replace(seen(), margins=by_dtype)
    assert counting_margins(what, dtype) == [*plain, squares]
    total = dataclasses.replace(what, spec=SPEC.replace(reduction="sum"))
    assert counting_margins(total, dtype) == [
        *plain,
        squares,
        CountingMargin("the sum of squares", "float32", wide.sum),
    ]
    half = dataclasses.replace(what, spec=IN_HALF)
    assert counting_margins(half, dtype) == [*plain, CountingMargin("x^2", dtype, own.square)]


@pytest.mark.parametrize("field", ["x", "square", "result"])
@pytest.mark.parametrize(
    ("margin", "level"), [(0.99, "unsafe"), (1.0, "caution"), (3.9, "caution"), (LEAST_MARGIN, "safe")]
)
def test_a_margin_below_one_overflows_and_below_four_is_near(field: str, margin: float, level: str) -> None:
    margins = dataclasses.replace(Margins(100.0, 100.0, 100.0, 100.0), **{field: margin})
    verdict = judged(seen(margins=margins))
    assert verdict.verdict == level
    assert len(verdict.reasons) == (level != "safe")
    if level == "caution":
        assert f"{margin:.3g}" in verdict.reasons[0]
    if level == "unsafe":
        assert "float32" in verdict.reasons[0] if field == "square" else "float16" in verdict.reasons[0]


@pytest.mark.parametrize(
    ("spec", "levels"),
    [
        (SPEC, ["safe", "safe", "safe"]),
        (SPEC.replace(reduction="sum"), ["unsafe", "caution", "safe"]),
        (IN_HALF, ["caution", "caution", "safe"]),
        (IN_HALF.replace(reduction="sum"), ["unsafe", "caution", "safe"]),
    ],
)
def test_a_sum_overflows_where_it_is_held(spec: NormSpec, levels: list[str]) -> None:
    """A mean of half statistics may be summed in a wider dtype, so its sum is a reason for caution only."""
    for margin, level in zip((0.5, 2.0, 4.0), levels, strict=True):
        found = judged(seen(spec, margins=Margins(100.0, 100.0, margin, 100.0)))
        assert found.verdict == level


def test_values_that_are_not_finite_as_the_model_runs() -> None:
    verdict = judged(seen(nonfinite_rows=3))
    assert verdict.verdict == "unsafe"
    assert "3 of 10" in verdict.reasons[0]


@pytest.mark.parametrize(("dtype", "level"), [("float16", "unsafe"), ("bfloat16", "safe"), ("float32", "safe")])
def test_weights_and_biases_that_overflow(dtype: str, level: str) -> None:
    for made in (rows(weight=[1.0, 1e5, -1e6, 1.0]), rows(bias=[0.0, 1e5, -1e6, 0.0])):
        verdict = judged(seen(), made, dtype)
        assert verdict.verdict == level
        assert level == "safe" or verdict.reasons[0].startswith("2 ")


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_of_pytorch(dtype: str) -> None:
    limits = ERROR_LIMITS[dtype]
    for units, level in ((limits.caution, "safe"), (limits.caution + 1, "caution"), (limits.unsafe, "caution"),
                         (limits.unsafe + 1, "unsafe")):  # fmt: skip
        verdict = judged(seen(), dtype=dtype, error=error(units))
        assert verdict.verdict == level
        assert len(verdict.reasons) == (level != "safe")


def test_a_result_that_is_not_finite() -> None:
    verdict = judged(seen(), error=error(math.inf, 5))
    assert verdict.verdict == "unsafe"
    assert len(verdict.reasons) == 1
    assert verdict.reasons[0].startswith("5 ")


@pytest.mark.parametrize(
    ("own", "other", "level"),
    [
        (error(1.0), error(20.0), "safe"),
        (error(1.0), error(21.0), "caution"),
        (error(15.0), error(30.0), "safe"),
        (error(15.0), error(31.0), "caution"),
        (error(1.0), error(math.inf, 2), "caution"),
    ],
)
def test_a_target_is_at_risk_beside_pytorch(own: NormError, other: NormError, level: str) -> None:
    verdict = judged(seen(), error=own, ort=other, primitives=error(1.0))
    assert verdict.verdict == level
    assert level == "safe" or ("ort" in verdict.reasons[0] and len(verdict.reasons) == 1)


def test_what_pytorch_gets_wrong_too_is_no_reason_against_a_target() -> None:
    verdict = judged(seen(), error=error(math.inf, 2), ort=error(math.inf, 2))
    assert len(verdict.reasons) == 1


# ------------------------------------------------------------------------------------------------------ small values


@pytest.mark.parametrize(
    ("spec", "rms", "dtype", "level"),
    [
        (SPEC, 2.0**-14, "float16", "safe"),
        (SPEC, 2.0**-14.5, "float16", "caution"),
        (SPEC, 2.0**-14.5, "bfloat16", "safe"),
        (SPEC, 0.0, "float16", "safe"),
        (IN_HALF, 2.0**-7, "float16", "safe"),
        (IN_HALF, 2.0**-7.5, "float16", "caution"),
        (SPEC, 2.0**-7.5, "float16", "safe"),
    ],
)
def test_rows_that_become_subnormal(spec: NormSpec, rms: float, dtype: str, level: str) -> None:
    made = seen(spec.replace(eps=1e-3), smallest_rms=rms)
    assert judged(made, dtype=dtype).verdict == level


@pytest.mark.parametrize(
    ("spec", "eps", "matters", "level"),
    [
        (IN_HALF, 1e-6, 0.2, "caution"),
        (IN_HALF, 1e-6, 0.0, "safe"),
        (IN_HALF, 1e-4, 0.2, "safe"),
        (IN_HALF, 0.0, 0.2, "safe"),
        (SPEC, 1e-6, 0.2, "safe"),
    ],
)
def test_an_eps_that_half_statistics_cannot_hold(spec: NormSpec, eps: float, matters: float, level: str) -> None:
    verdict = judged(seen(spec.replace(eps=eps), eps_matters=matters))
    assert verdict.verdict == level
    assert level == "safe" or "20%" in verdict.reasons[0]


@pytest.mark.parametrize(
    ("weight", "dtype", "count", "zeros"),
    [
        ([1.0, 2.0**-15, 2.0**-26, 0.0], "float16", "2 of 4", "1 of them"),
        ([1.0, 2.0**-14, 0.0, 1.0], "float16", "", ""),
        ([1.0, 2.0**-26, 0.0, 1.0], "bfloat16", "", ""),
    ],
)
def test_weights_that_become_subnormal(weight: list[float], dtype: str, count: str, zeros: str) -> None:
    verdict = judged(seen(), rows(weight=weight), dtype)
    assert verdict.verdict == ("caution" if count else "safe")
    assert all(count in reason and zeros in reason for reason in verdict.reasons)


@pytest.mark.parametrize(
    ("weight", "in_float32", "lost"),
    [
        ([0.0, 0.5, -0.5, 0.1], True, 0),
        ([0.0, 0.5, -0.5, 0.1], False, 0),
        ([-0.99993, 0.5, 0.0, 0.0], True, 1),
        ([-0.99993, -0.9999, 0.0, 0.0], False, 2),
        ([-1.0, 0.0, 0.0, 0.0], True, 0),
    ],
)
def test_a_weight_that_cancels_the_one(weight: list[float], in_float32: bool, lost: int) -> None:
    """-0.99993 is -1 or -1 + 2^-11 in float16, and 1 + w of it 0 or 2^-11, where 7e-5 is due."""
    spec = NormSpec(eps=1e-6, scale="one_plus_weight", offset_in_float32=in_float32)
    verdict = judged(seen(spec), rows(spec, weight))
    assert verdict.verdict == ("caution" if lost else "safe")
    assert all(reason.startswith(f"{lost} of 4") for reason in verdict.reasons)


def test_the_gravest_reasons_come_first() -> None:
    made = seen(nonfinite_rows=1, margins=Margins(0.5, 2.0, 100.0, 100.0))
    verdict = judged(made, rows(weight=[1e5, 1.0, 1.0, 1.0]), error=error(1e9), ort=error(1e12))
    assert verdict.verdict == "unsafe"
    assert len(verdict.reasons) == 6
    assert "1 of 10" in verdict.reasons[0]
    assert "ort" in verdict.reasons[-1]
    assert FORMATS["float16"].largest < 1e5
