"""Where PyTorch itself is wrong, nothing can be judged by it; where it has lost the signal, the report warns."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from rmsnorm_deploy.runtime.accuracy.baseline import signal_warning, unless_wrong
from rmsnorm_deploy.runtime.accuracy.compare_output import OutputVerdict, judge
from rmsnorm_deploy.runtime.runners.base import Array

TRUE = np.random.default_rng(0).normal(size=(40, 64))


def off_by(share: float, rows: slice = slice(None), dtype: str = "float32") -> OutputVerdict:
    """The verdict on a candidate that equals a baseline whose rows are off by a share of their RMS."""
    wrong: Array = TRUE.copy()
    wrong[rows] *= 1 + share
    baseline = wrong.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return judge("logits", baseline, TRUE, baseline)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("share", "rows", "passed"),
    [
        (0.0, slice(None), True),
        (0.005, slice(None), True),
        (0.02, slice(None), None),
        (2.05, slice(None), None),
        (0.05, slice(0, 1), True),
        (0.5, slice(0, 1), None),
    ],
)
def test_a_model_that_is_itself_wrong_is_no_baseline(
    share: float, rows: slice, passed: bool | None, dtype: str
) -> None:
    verdict = off_by(share, rows, dtype)
    assert verdict.passed is True  # the candidate is as bad as PyTorch
    judged = unless_wrong(verdict, dtype)
    assert judged.passed is passed
    assert ("PyTorch itself is not a valid baseline" in judged.reason) is (passed is None)


def test_the_reason_has_the_figures() -> None:
    reason = unless_wrong(off_by(2.05), "float32", "ONNX Runtime").reason
    assert reason.startswith("ONNX Runtime itself is not a valid baseline: in float32 it differs from the float64")
    assert "root mean square 2.05" in reason


def test_infinities_in_float32_are_no_baseline_either() -> None:
    baseline = TRUE.astype(np.float32)
    baseline[3] = np.inf
    assert unless_wrong(judge("x", baseline, TRUE, baseline), "float32").passed is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_half_type_is_judged_and_warned_of(dtype: str) -> None:
    lost, kept = off_by(0.2, dtype=dtype), off_by(0.01, dtype=dtype)
    assert (unless_wrong(lost, dtype), signal_warning(kept, dtype)) == (lost, "")
    warning = signal_warning(lost, dtype)
    assert f"PyTorch itself in {dtype} is off by 20% of a row's RMS" in warning
    assert "deploy in bfloat16 or float32" in warning
    assert signal_warning(lost, "float32") == ""


def test_a_saturated_half_type_is_warned_of() -> None:
    baseline = TRUE.astype(np.float16)
    baseline[0, 0] = np.inf
    verdict = judge("x", baseline, TRUE, baseline)
    assert "has NaN or infinities where float64 is finite" in signal_warning(verdict, "float16")


def test_a_baseline_that_is_nowhere_finite_judges_nothing() -> None:
    """The candidate is right; PyTorch in float16 overflowed everywhere, so nobody can say how far off it may be."""
    saturated = np.full_like(TRUE, np.inf).astype(np.float16)
    verdict = judge("x", TRUE.astype(np.float16), TRUE, saturated)
    assert verdict.passed is None
    assert "there is no baseline" in verdict.reason


def test_verdicts_without_figures_are_left_alone() -> None:
    mismatch = judge("x", TRUE[:1].astype(np.float32), TRUE, TRUE.astype(np.float32))
    assert (unless_wrong(mismatch, "float32"), signal_warning(mismatch, "float16")) == (mismatch, "")
