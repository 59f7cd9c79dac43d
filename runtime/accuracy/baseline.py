"""Whether PyTorch's own result can be a baseline (`unless_wrong`) and keeps the signal (`signal_warning`)."""

from __future__ import annotations

import dataclasses

from .compare_output import OutputVerdict

# In float32 PyTorch differs from float64 by about 1e-6 of a row's RMS, by 1e-3 in an ill-conditioned model. Where the
# differences of all rows have a root mean square above the first share, or one row's largest error exceeds the second,
# the two do not compute the same, or the model amplifies rounding errors until nothing of its result is left.
_WRONG_RMS, _WRONG_ROW = 0.01, 0.25
_WIDE = ("float32", "float64")
# In a half type, errors above this share of the row's RMS leave less than two correct digits: a cosine of about 0.995.
_LOST_RMS = 0.1


def unless_wrong(verdict: OutputVerdict, dtype: str, baseline_name: str = "PyTorch") -> OutputVerdict:
    """The verdict on an output of a model; one that cannot be judged where the baseline itself is wrong.

    Args:
        verdict: a verdict that compares the candidate's error with the baseline's.
        dtype: the baseline's dtype. In a half type a large error is expected, see `signal_warning`.
        baseline_name: the baseline's name in the reason.
    """
    own = verdict.baseline_figures
    if own is None or dtype not in _WIDE or (own.rms_rel_row <= _WRONG_RMS and own.max_rel_row <= _WRONG_ROW):
        return verdict
    reason = (
        f"{baseline_name} itself is not a valid baseline: in {dtype} it differs from the float64 reference by up to "
        f"{own.max_rel_row:.3g} of a row's RMS (root mean square {own.rms_rel_row:.3g})"
    )
    return dataclasses.replace(verdict, passed=None, reason=reason)


def signal_warning(verdict: OutputVerdict, dtype: str, baseline_name: str = "PyTorch") -> str:
    """A warning where the baseline in a half type has lost most of the signal; empty if it has not."""
    own = verdict.baseline_figures
    if own is None or dtype in _WIDE:
        return ""
    remedy = "so a pass says only that the candidate is no worse; deploy in bfloat16 or float32"
    if not own.nonfinite_agree:
        return f"{baseline_name} itself in {dtype} has NaN or infinities where float64 is finite, {remedy}"
    if own.rms_rel_row <= _LOST_RMS:
        return ""
    return (
        f"{baseline_name} itself in {dtype} is off by {own.rms_rel_row:.0%} of a row's RMS (root mean square; cosine "
        f"{own.cosine:.4f}), {remedy}"
    )
