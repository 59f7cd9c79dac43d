"""The verdict on one output: whether its error against the reference is comparable to PyTorch's own error.

Three arrays are compared: the reference (float64), the baseline (PyTorch in the deployment dtype) and the candidate (a
runtime's output). `figures` returns the error statistics of one array; `judge` returns the verdict on the candidate.
Both process the arrays a few rows at a time, so that outputs of many million elements need little additional memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ...models.errors import UsageError
from .error_stats import Figures, FiguresOf, is_logits, json_value
from .errors import errors_of, is_exact, kind_of, pieces
from .pass_rules import Arrays, AsGood, Equal, InPlace, Margin, Nearest, Rule, Within
from .tolerances import Limits

__all__ = ["Figures", "OutputVerdict", "all_passed", "brief", "figures", "judge"]


def figures(
    candidate: NDArray[Any], reference: NDArray[Any], baseline: NDArray[Any] | None = None, *, logits: bool = False
) -> Figures:
    """The error statistics of `candidate` against `reference`.

    Args:
        candidate: float16, bfloat16, float32, float64, integers or booleans, any shape.
        reference: the same shape, float64 (integers and booleans where the candidate has them).
        baseline: the same shape: PyTorch's result in the deployment dtype; for `differing`, and to excuse
            non-finite values that PyTorch has as well.
        logits: the last dim holds class scores, at least one: compute the statistics of logits too.

    Returns:
        The statistics; all zero, with cosine 1, for an empty array.

    Raises:
        UsageError: the shapes differ, or errors cannot be measured in the dtype.
    """
    for other, array in (("reference", reference), ("baseline", baseline)):
        if array is not None and array.shape != candidate.shape:
            raise UsageError(f"the candidate has shape {candidate.shape}, the {other} {array.shape}.")
    result = FiguresOf(candidate, reference, baseline, logits=logits)
    flat, true = candidate.reshape(-1), reference.reshape(-1)
    own = None if baseline is None else baseline.reshape(-1)
    for part in pieces(candidate.shape):
        result.add(part, errors_of(flat[part], true[part], None if own is None else own[part]))
    return result.result()


@dataclass(frozen=True, slots=True)
class OutputVerdict:
    """Whether one output passed, and why.

    Attributes:
        name: the output's name.
        passed: whether it passed; None if that cannot be judged, for want of a valid baseline or reference.
        reason: why, in one line.
        figures: error statistics of the candidate; None if the arrays could not be compared.
        baseline_figures: those of the baseline; None as above.
        margin: the errors that the default rule compares; None where another rule decided.
        nearest: the explicit limit that is nearest to being exceeded; None where another rule decided.
    """

    name: str
    passed: bool | None
    reason: str
    figures: Figures | None
    baseline_figures: Figures | None
    margin: Margin | None = None
    nearest: Nearest | None = None

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON values."""
        return {
            "name": self.name,
            "passed": self.passed,
            "reason": self.reason,
            "margin": None if self.margin is None else json_value(self.margin._asdict()),
            "nearest": None if self.nearest is None else json_value(self.nearest._asdict()),
            "figures": self.figures and self.figures.to_dict(),
            "baseline_figures": self.baseline_figures and self.baseline_figures.to_dict(),
        }


def all_passed(parts: Iterable[bool | None]) -> bool | None:
    """Whether all parts passed: False if one failed, else None if one cannot be judged."""
    found = set(parts)
    return False if False in found else None if None in found else True


def brief(verdict: OutputVerdict) -> dict[str, Any]:
    """A verdict as JSON values; histogram and worst elements are included only if it failed, to limit the size."""
    row = verdict.to_dict()
    if verdict.passed and verdict.figures is not None:
        for figures in (row["figures"], row["baseline_figures"]):
            figures.update(histogram=None, worst=[])
    return row


def kind_rows(verdicts: Sequence[OutputVerdict]) -> list[dict[str, Any]]:
    """The verdicts on several kinds of input as JSON values, each with its name as `kind`."""
    rows = [brief(verdict) for verdict in verdicts]
    return [{"kind": row.pop("name"), **row} for row in rows]


def judge(
    name: str,
    candidate: NDArray[Any],
    reference: NDArray[Any],
    baseline: NDArray[Any],
    *,
    limits: Limits | None = None,
    baseline_name: str = "PyTorch",
) -> OutputVerdict:
    """The verdict on one output.

    Floating-point outputs are judged by the row of `TOLERANCES` for the baseline's dtype. Integers and booleans must
    equal the baseline's. An output whose name ends with `logits` gets the statistics of logits too.

    Args:
        name: the output's name.
        candidate: the runtime's output.
        reference: PyTorch's output in float64.
        baseline: PyTorch's output in the deployment dtype.
        limits: if any of them is set, they replace the table. Integers and booleans are still compared exactly, and
            NaN and infinities must be in the same places.
        baseline_name: the baseline's name in the reason.

    Returns:
        The verdict. Shapes or kinds of dtype that differ give a failed verdict, not an exception.
    """
    limits = limits or Limits()
    problem = _incomparable(candidate, reference, baseline)
    if problem:
        return OutputVerdict(name, False, problem, None, None)
    arrays = Arrays(candidate, reference, baseline, baseline_name)
    in_place = InPlace(arrays)
    rule: Rule
    if is_exact(baseline.dtype):
        rule = Equal(arrays)
    elif limits.is_set:
        rule = Within(arrays, limits)
    else:
        rule = AsGood(arrays)
    logits = is_logits(name, baseline)
    mine = FiguresOf(candidate, reference, baseline, logits=logits)
    own = FiguresOf(baseline, reference, None, logits=logits)
    flat = [array.reshape(-1) for array in (candidate, reference, baseline)]
    for part in pieces(candidate.shape):
        values, true, wanted = (array[part] for array in flat)
        errors, own_errors = errors_of(values, true, wanted), errors_of(wanted, true, None)
        for condition in (in_place, rule):
            condition.add(part, errors, own_errors)
        mine.add(part, errors)
        own.add(part, own_errors)
    # Integers have neither NaN nor infinity: their rule alone decides.
    passed: bool | None
    passed, reason = in_place.result()
    found = mine.result()
    if passed:
        passed, reason = rule.with_figures(found) if isinstance(rule, Within) else rule.result()
    reason += in_place.excuse
    if candidate.dtype != baseline.dtype:
        reason += f"; the candidate is {candidate.dtype.name}, the baseline {baseline.dtype.name}"
    margin = rule.margin if isinstance(rule, AsGood) else None
    nearest = rule.nearest(found) if isinstance(rule, Within) else None
    return OutputVerdict(name, passed, reason, found, own.result(), margin, nearest)


def _incomparable(candidate: NDArray[Any], reference: NDArray[Any], baseline: NDArray[Any]) -> str | None:
    for label, array in (("candidate", candidate), ("reference", reference)):
        if array.shape != baseline.shape:
            return f"shape mismatch: the {label} has {array.shape}, the baseline {baseline.shape}"
        if kind_of(array.dtype) != kind_of(baseline.dtype):
            return f"dtype mismatch: the {label} is {array.dtype.name}, the baseline {baseline.dtype.name}"
    if kind_of(baseline.dtype) == "unsupported":
        return f"outputs of dtype {baseline.dtype.name} cannot be compared; drop the output or cast it in the model"
    return None
