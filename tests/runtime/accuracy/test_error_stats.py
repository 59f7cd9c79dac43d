"""The figures of an array, gathered in parts: by hand, and whatever the parts are."""

from __future__ import annotations

import json
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from rmsnorm_deploy.runtime.accuracy.error_stats import (
    HISTOGRAM_EDGES,
    Figures,
    FiguresOf,
    Worst,
    is_logits,
    json_value,
)
from rmsnorm_deploy.runtime.accuracy.errors import errors_of

INF, NAN = math.inf, math.nan


def gathered(
    array: np.ndarray,
    reference: np.ndarray,
    baseline: np.ndarray | None = None,
    *,
    rows: int = 1,
    logits: bool = False,
) -> Figures:
    """The figures of an array that comes `rows` rows at a time."""
    figures = FiguresOf(array, reference, baseline, logits=logits)
    step = rows * (array.shape[-1] if array.ndim else 1)
    flat = [None if side is None else side.reshape(-1) for side in (array, reference, baseline)]
    for start in range(0, array.size, step):
        part = slice(start, min(start + step, array.size))
        mine, true, own = (None if side is None else side[part] for side in flat)
        assert mine is not None
        assert true is not None
        figures.add(part, errors_of(mine, true, own))
    return figures.result()


def test_the_edges_of_the_histogram() -> None:
    assert HISTOGRAM_EDGES[:6] == (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
    assert HISTOGRAM_EDGES[-2:] == (2.0**24, INF)
    assert list(HISTOGRAM_EDGES) == sorted(set(HISTOGRAM_EDGES))


def test_figures_by_hand() -> None:
    """Errors of 0, 1, 2 and 4 ULPs of float32 at 1, whose ULP is 2^-23; the second row has an RMS of 1 as well."""
    ulp = 2.0**-23
    array = np.array([[1.0, 1.0 + ulp], [1.0 + 2 * ulp, 1.0 + 4 * ulp]], np.float32)
    found = gathered(array, np.ones((2, 2)), np.ones((2, 2), np.float32))
    assert found.max_ulp == 4.0
    assert found.mean_ulp == 7.0 / 4.0
    assert found.p999_ulp == 4.0
    assert found.max_abs == 4 * ulp
    assert found.max_rel_row == 4 * ulp
    assert found.cosine == pytest.approx(1.0 - 35 / 32 * ulp**2, abs=1e-15)
    assert (found.differing, found.nonfinite_agree, found.count) == (3, True, 4)
    assert (found.top1_agreement, found.kl) == (None, None)
    assert found.histogram is not None
    by_edge = dict(zip(HISTOGRAM_EDGES, found.histogram, strict=True))
    assert {edge: count for edge, count in by_edge.items() if count} == {0.0: 1, 1.0: 1, 2.0: 1, 4.0: 1}
    assert [(worst.index, worst.ulp) for worst in found.worst] == [((1, 1), 4.0), ((1, 0), 2.0), ((0, 1), 1.0)]
    assert found.worst[0] == Worst((1, 1), 1.0 + 4 * ulp, 1.0, 1.0, 4.0)


@pytest.mark.parametrize("rows", [2, 3, 7, 40])
def test_the_parts_do_not_matter(rows: int) -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((40, 48)) * 10.0 ** rng.integers(-3, 3, (40, 1))
    array = (reference * (1 + 1e-3 * rng.standard_normal(reference.shape))).astype(np.float16)
    baseline = reference.astype(np.float16)
    one, other = (gathered(array, reference, baseline, rows=n, logits=True) for n in (1, rows))
    for name in ("mean_ulp", "cosine", "kl"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-12)
    exact = ("max_ulp", "p999_ulp", "max_abs", "max_rel_row", "differing", "top1_agreement", "histogram", "worst")
    assert {name: getattr(one, name) for name in exact} == {name: getattr(other, name) for name in exact}


def test_the_percentile_is_the_one_that_999_of_1000_do_not_exceed() -> None:
    """Errors of 1 to 4001 whole units, in scrambled order: 0.999 x 4000 = 3996 of them lie below the percentile."""
    errors = np.random.default_rng(1).permutation(4001) + 1
    found = gathered(errors.reshape(1, -1), np.zeros((1, 4001), np.int64))
    assert found.p999_ulp == 3997.0
    assert (found.max_ulp, found.mean_ulp) == (4001.0, 2001.0)
    assert [worst.ulp for worst in found.worst] == [4001.0, 4000.0, 3999.0, 3998.0, 3997.0]


def test_of_equal_errors_the_first_are_shown() -> None:
    found = gathered(np.ones((3, 4), np.int64), np.zeros((3, 4), np.int64))
    assert [worst.index for worst in found.worst] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    assert found.worst[0].value == 1
    assert isinstance(found.worst[0].value, int)


def test_a_row_of_zeros_has_no_scale() -> None:
    zeros = np.zeros((1, 4))
    assert gathered(np.zeros((1, 4), np.float32), zeros).max_rel_row == 0.0
    assert gathered(np.full((1, 4), 1e-3, np.float32), zeros).max_rel_row == INF


def test_the_largest_error_counts_in_its_own_row() -> None:
    """1 off in a row of RMS 10, and 0.5 off in a row of RMS 1: the second is worse."""
    reference = np.array([[10.0, -10.0], [1.0, -1.0]])
    found = gathered(np.array([[11.0, -10.0], [1.5, -1.0]], np.float32), reference)
    assert (found.max_abs, found.max_rel_row) == (1.0, 0.5)


def test_a_missing_finite_value_makes_errors_infinite() -> None:
    found = gathered(np.array([[NAN, 1.0]], np.float32), np.ones((1, 2)))
    assert (found.max_ulp, found.mean_ulp, found.max_abs, found.max_rel_row) == (INF, INF, INF, INF)
    assert not found.nonfinite_agree
    assert found.histogram is not None
    assert (found.histogram[0], found.histogram[-1]) == (1, 1)
    assert math.isnan(found.worst[0].value)


def test_nothing_measured_gives_zeros() -> None:
    nothing = np.full((2, 2), NAN)
    for array in (nothing.astype(np.float32), np.zeros((0, 4), np.float32)):
        found = gathered(array, array.astype(np.float64))
        assert (found.max_ulp, found.mean_ulp, found.p999_ulp, found.max_abs, found.max_rel_row) == (0, 0, 0, 0, 0)
        assert (found.cosine, found.histogram, found.worst) == (1.0, None, ())
        assert found.count == array.size


def test_differing_counts_bits_and_takes_a_nan_for_a_nan() -> None:
    array = np.array([[0.0, NAN, 1.0, NAN]], np.float32)
    baseline = np.array([[-0.0, NAN, 1.0, 2.0]], np.float32)
    baseline.view(np.uint32)[0, 1] ^= 1  # another NaN
    assert gathered(array, np.zeros((1, 4)), baseline).differing == 2
    assert gathered(array, np.zeros((1, 4)), baseline.astype(np.float64)).differing is None
    assert gathered(array, np.zeros((1, 4))).differing is None


@pytest.mark.parametrize(("array", "cosine"), [([3.0, 4.0], 0.96), ([-4.0, -3.0], -1.0), ([0.0, 0.0], 0.0)])
def test_cosine(array: list[float], cosine: float) -> None:
    """Against (4, 3): 24 / 25."""
    found = gathered(np.array(array, np.float32).reshape(2, 1), np.array([[4.0], [3.0]]))
    assert found.cosine == pytest.approx(cosine, rel=1e-12)


def test_cosine_leaves_out_what_is_not_finite_and_keeps_its_range() -> None:
    array = np.array([[INF], [1e300], [-1e300], [1e-300]])
    assert gathered(array, np.array([[1.0], [1e300], [-1e300], [2e-300]])).cosine == pytest.approx(1.0, rel=1e-12)


def test_logits_by_hand() -> None:
    """P = (1/4, 3/4) and Q = (1/2, 1/2) have KL = 1/4 ln(1/2) + 3/4 ln(3/2); the second row is equal."""
    reference = np.log(np.array([[1.0, 3.0], [3.0, 1.0]]))
    found = gathered(np.array([[0.0, 0.0], reference[1]]), reference, logits=True)
    assert found.kl == pytest.approx((0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2, rel=1e-12)
    assert found.top1_agreement == 0.5  # of equal logits the first is taken


def test_logits_of_rows_without_a_softmax() -> None:
    reference = np.array([[NAN, 1.0], [INF, 0.0], [0.0, -INF], [0.0, 1.0]])
    found = gathered(reference.copy(), reference, logits=True)
    assert (found.top1_agreement, found.kl) == (1.0, 0.0)
    broken = np.where(np.arange(4)[:, None] == 3, NAN, reference)
    found = gathered(broken, reference, logits=True)
    assert (found.top1_agreement, found.kl) == (0.5, INF)
    found = gathered(reference[:2].copy(), reference[:2], logits=True)
    assert (found.top1_agreement, found.kl) == (None, None)


@pytest.mark.parametrize(
    ("name", "array", "expected"),
    [
        ("logits", np.zeros((2, 8), np.float32), True),
        ("logits@decode", np.zeros((2, 8), ml_dtypes.bfloat16), True),
        ("lm_logits", np.zeros(8), True),
        ("logits_mask", np.zeros((2, 8)), False),
        ("logits", np.zeros((2, 1)), False),
        ("logits", np.zeros(()), False),
        ("logits", np.zeros((2, 8), np.int64), False),
    ],
)
def test_is_logits(name: str, array: np.ndarray, expected: bool) -> None:
    assert is_logits(name, array) is expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (INF, "inf"),
        (-INF, "-inf"),
        (NAN, "nan"),
        (1.5, 1.5),
        (True, True),
        (None, None),
        ((1, (INF, "a")), [1, ["inf", "a"]]),
        ({"a": (NAN,), "b": {"c": 2}}, {"a": ["nan"], "b": {"c": 2}}),
    ],
)
def test_json_value(value: Any, expected: Any) -> None:
    assert json_value(value) == expected


def test_figures_as_json_hold_the_edges() -> None:
    values = gathered(np.array([[NAN, 2.0]], np.float32), np.ones((1, 2))).to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["max_ulp"] == "inf"
    assert values["histogram"]["ulp_at_most"][-1] == "inf"
    assert len(values["histogram"]["ulp_at_most"]) == len(values["histogram"]["count"])
    assert values["worst"][0] == {"index": [0, 0], "value": "nan", "reference": 1.0, "baseline": None, "ulp": "inf"}
