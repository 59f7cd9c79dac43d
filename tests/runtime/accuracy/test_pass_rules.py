"""Explicit limits: how they are written, whom they are for, and what they do to a verdict."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.accuracy.compare_output import judge
from rmsnorm_deploy.runtime.accuracy.tolerances import Limits, check_limits, limits_of, parse_limits

REFERENCE = np.array([[1.0, -1.0], [0.5, 4.0]])
EXACT = REFERENCE.astype(np.float32)


def off_by(ulps: float) -> np.ndarray:
    """The truth with an error of so many ULPs of float32 in its last element, 4."""
    candidate = EXACT.copy()
    candidate[1, 1] += ulps * 2.0**-21
    return candidate


@pytest.mark.parametrize(
    ("limits", "ulps", "passed"),
    [
        (Limits(ulp=3.0), 3, True),
        (Limits(ulp=3.0), 4, False),
        (Limits(atol=5 * 2.0**-21), 5, True),
        (Limits(atol=5 * 2.0**-21), 6, False),
        (Limits(rtol=5 * 2.0**-23), 5, True),
        (Limits(rtol=5 * 2.0**-23), 6, False),
        (Limits(atol=1.0, ulp=3.0), 4, False),
        (Limits(atol=2.0**-21, ulp=30.0), 4, False),
        (Limits(atol=1.0, rtol=1.0, ulp=30.0), 4, True),
        (Limits(atol=0.0), 0, True),
        (Limits(ulp=0.0), 1, False),
    ],
)
def test_limits_replace_the_rule(limits: Limits, ulps: float, passed: bool) -> None:
    verdict = judge("y", off_by(ulps), REFERENCE, EXACT, limits=limits)
    assert verdict.passed is passed
    assert ("(1, 1)" in verdict.reason) is not passed
    assert limits.describe() in verdict.reason


def test_limits_with_nothing_set_leave_the_rule() -> None:
    assert "PyTorch's own max" in judge("y", EXACT, REFERENCE, EXACT, limits=Limits()).reason
    assert (
        "the rounded reference's own max"
        in judge("y", EXACT, REFERENCE, EXACT, baseline_name="the rounded reference").reason
    )


def test_the_reason_names_the_limits_and_the_first_element_beyond() -> None:
    verdict = judge("y", off_by(8), REFERENCE, EXACT, limits=Limits(atol=1e-7, ulp=2.0))
    assert verdict.reason == (
        "1 of 4 elements violate |error| <= 1e-07 + 0 x |reference| and ULP error <= 2, the first at (1, 1): "
        "an error of 3.81e-06, 8 ULP"
    )


def test_limits_require_integers_equal_and_nan_in_place() -> None:
    loose = Limits(atol=1e9, rtol=1e9, ulp=1e9)
    ids = np.array([1, 2])
    assert not judge("ids", ids + 1, ids, ids, limits=loose).passed
    broken = EXACT.copy()
    broken[0, 1] = np.nan
    assert "(0, 1): expected -1, got nan" in judge("y", broken, REFERENCE, EXACT, limits=loose).reason


@pytest.mark.parametrize("label", ["atol", "rtol", "ulp"])
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_limit_is_not_negative(label: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{label}: expected a number of at least 0"):
        Limits(**{label: value})


def test_limits_from_texts() -> None:
    limits = parse_limits(["1e-3", "logits:1e-2", "model.layers:0.hidden:5"], ["logits:0.1"], ["4"])
    assert limits == {
        "*": Limits(1e-3, None, 4.0),
        "logits": Limits(1e-2, 0.1, 4.0),
        "model.layers:0.hidden": Limits(5.0, None, 4.0),
    }
    assert limits_of(limits, "logits") == Limits(1e-2, 0.1, 4.0)
    assert limits_of(limits, "other") == Limits(1e-3, None, 4.0)
    assert parse_limits([], [], []) == {}
    only = parse_limits(["logits:1"], [], [])
    assert limits_of(only, "other") is None


@pytest.mark.parametrize("text", ["", "abc", "logits:", "logits:abc", ":1e-3", "-1", "logits:-1", "nan", "1e-3:logits"])
def test_texts_that_are_not_a_limit(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_limits([], [text], [])
    assert f"--rtol {text}:" in str(error.value)


def test_two_limits_of_a_kind() -> None:
    with pytest.raises(UsageError, match=r"--ulp logits:2: logits already has a limit"):
        parse_limits([], [], ["logits:1", "logits:2"])
    with pytest.raises(UsageError, match=r"--atol 2: every output already has a limit"):
        parse_limits(["1", "2"], [], [])


def test_limits_on_an_output_that_does_not_exist() -> None:
    limits = parse_limits(["1", "logit:1"], [], [])
    with pytest.raises(UsageError, match=r"given for logit, but there is no such output. The outputs are: logits, y"):
        check_limits(limits, ["logits", "y"])
    check_limits(limits, ["logit"])
    check_limits(parse_limits(["1"], [], []), [])


# ------------------------------------------------------------------------------------------- limits on statistics

# Two rows of RMS 5; the candidate is off by 1 in one element of the first.
ROWS = np.array([[3.0, 4.0, 5.0, -(50.0**0.5)], [5.0, 5.0, 5.0, -5.0]])
NEAR = ROWS.astype(np.float32)
NEAR[0, 1] += 1.0


def limited(name: str = "y", candidate: np.ndarray = NEAR, **limits: float) -> tuple[bool | None, str]:
    verdict = judge(name, candidate, ROWS, ROWS.astype(np.float32), limits=Limits(**limits))
    assert verdict.margin is None
    return verdict.passed, verdict.reason


@pytest.mark.parametrize(
    ("limits", "passed", "reason"),
    [
        ({"max_rel": 0.21}, True, "largest error / row RMS 0.2 of at most 0.21 allowed"),
        ({"max_rel": 0.19}, False, "largest error / row RMS 0.2 of at most 0.19 allowed"),
        # Half of 1 / 5 in the first of two rows: sqrt(0.01 / 2).
        ({"max_rms": 0.071}, True, "RMS error / row RMS 0.0707 of at most 0.071 allowed"),
        ({"max_rms": 0.07}, False, "RMS error / row RMS 0.0707 of at most 0.07 allowed"),
        ({"min_cosine": 0.99}, True, "cosine 0.9978 of at least 0.99 required"),
        ({"min_cosine": 0.999}, False, "cosine 0.9978 of at least 0.999 required"),
    ],
)
def test_statistics_are_limited(limits: dict[str, float], passed: bool, reason: str) -> None:
    assert limited(**limits) == (passed, reason)


def test_every_limit_is_named_and_what_failed_comes_first() -> None:
    passed, reason = limited(max_rel=1.0, max_rms=0.01, atol=2.0)
    assert passed is False
    assert reason.startswith("RMS error / row RMS 0.0707 of at most 0.01 allowed; every element satisfies |error| <= 2")
    assert reason.endswith("; largest error / row RMS 0.2 of at most 1 allowed")
    passed, reason = limited(max_rel=1.0, atol=0.5)
    assert (passed, "1 of 8 elements violate" in reason) == (False, True)


def test_statistics_of_logits() -> None:
    swapped = ROWS.astype(np.float32)
    swapped[0, 2] = 3.5  # the largest of its row no longer
    assert limited("logits", swapped, min_top1=0.5) == (True, "top-1 agreement 0.5000 of at least 0.5 required")
    assert limited("logits", swapped, min_top1=0.75) == (False, "top-1 agreement 0.5000 of at least 0.75 required")
    passed, reason = limited("logits", swapped, max_kl=1e-3)
    assert (passed, reason.endswith("of at most 0.001 allowed")) == (False, True)
    passed, reason = limited("y", swapped, min_top1=0.5)
    assert passed is None
    assert "not logits, or no row is finite, so top-1 agreement is not defined" in reason


def test_a_cosine_near_one_is_shown_with_the_digits_that_decide() -> None:
    candidate = (ROWS * np.array([[1.0, 1.0, 1.0, 1.0003]])).astype(np.float32)
    passed, reason = limited(candidate=candidate, min_cosine=0.999999999)
    assert passed is False
    assert float(reason.split()[1]) < 0.999999999


def test_nan_fails_statistics_however_wide() -> None:
    broken = NEAR.copy()
    broken[1, 0] = np.nan
    assert limited(candidate=broken, min_cosine=0.0, max_rms=1e9)[0] is False


@pytest.mark.parametrize(
    ("limits", "figure", "limit", "share"),
    [
        ({"atol": 4.0}, "atol", 4.0, 0.5),
        ({"rtol": 0.5}, "atol", 2.0, 1.0),
        ({"max_rel": 4.0, "atol": 8.0}, "atol", 8.0, 0.25),
        ({"max_rms": 0.1, "atol": 8.0}, "max_rms", 0.1, 2.5),
        ({"min_cosine": 0.9}, "min_cosine", 0.9, (1.0 - 18.0 / math.sqrt(336.0)) / 0.1),
        ({"ulp": 2.0**22}, "ulp", 2.0**22, 1.0),
        ({"atol": 0.0}, "atol", 0.0, math.inf),
    ],
)
def test_the_nearest_limit_and_its_share(limits: dict[str, float], figure: str, limit: float, share: float) -> None:
    reference = np.array([[4.0, 4.0, 4.0, 4.0]])
    candidate = np.array([[4.0, 4.0, 4.0, 6.0]], np.float32)
    verdict = judge("y", candidate, reference, reference.astype(np.float32), limits=Limits(**limits))
    assert verdict.nearest is not None
    assert (verdict.nearest.figure, verdict.nearest.limit) == (figure, limit)
    assert verdict.nearest.share == pytest.approx(share)
    assert (verdict.passed, verdict.nearest.share <= 1) in ((True, True), (False, False))


def test_without_explicit_limits_or_errors_there_is_no_nearest_limit() -> None:
    same, whole = np.ones((1, 4), np.float32), np.ones((1, 4), np.int64)
    assert judge("y", same, same.astype(np.float64), same).nearest is None
    assert judge("y", whole, whole, whole, limits=Limits(atol=1.0)).nearest is None
    verdict = judge("y", same, same.astype(np.float64), same, limits=Limits(atol=1.0))
    assert verdict.nearest == ("atol", 0.0, 1.0, 0.0)
