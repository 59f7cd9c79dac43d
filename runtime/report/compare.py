"""Compare two results (`compare`): two files of arrays, or two reports."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...models.errors import UsageError
from ..accuracy.compare_output import OutputVerdict, judge
from ..accuracy.error_stats import json_value
from ..accuracy.errors import kind_of
from ..accuracy.float_formats import FORMATS
from ..accuracy.tolerances import Limits, check_limits, limits_of
from ..inputs.arrays import read_arrays
from ..runners.base import Array
from .page import Page, Shown
from .printed import print_comparison
from .report_file import read_report
from .text import label, verdict_word

SCHEMA = "rmsnorm_deploy.compare/1"
# A statistic is listed if it changed by more than this factor; below the given size, a change is only rounding.
FACTOR = 2.0
_FIGURES = {"max_ulp": 0.0, "mean_ulp": 0.0, "p999_ulp": 0.0, "max_abs": 0.0, "max_rel_row": 0.0, "kl": 1e-12}
_ABSENT = "-"


class _Row(NamedTuple):
    """The compared parts of a row."""

    passed: bool | None
    reason: str | None
    figures: dict[str, float]

    @property
    def verdict(self) -> str:
        return verdict_word(self.passed)


@dataclass(frozen=True, slots=True)
class ArrayComparison(Shown):
    """The comparison of arrays with reference arrays.

    Attributes:
        reference: the file with the reference arrays.
        candidate: the file that is compared with it.
        rows: one verdict for each array of either file, those of the reference first.
    """

    reference: Path
    candidate: Path
    rows: list[OutputVerdict]

    @property
    def passed(self) -> bool:
        """Whether every array passed."""
        return all(row.passed for row in self.rows)

    def show(self, page: Page) -> None:
        """Print what differs, and the verdict."""
        print_comparison(page, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The comparison as the JSON interface shows it."""
        failed = sum(not row.passed for row in self.rows)
        return {
            **_head("arrays", self.reference, self.candidate, self.passed),
            "summary": f"arrays that agree: {len(self.rows) - failed} of {len(self.rows)}",
            "outputs": [
                {name: value for name, value in row.to_dict().items() if name != "baseline_figures"}
                for row in self.rows
            ],
        }


@dataclass(frozen=True, slots=True)
class Change:
    """One row, statistic or setting that differs.

    Attributes:
        kind: `output`, `norm`, `norm input`, `attention`, `attention input`, `segment` or `report`; for settings the
            part of the report.
        name: name of the row, or the dotted key.
        before: value in the first report.
        after: value in the second report.
        figure: name of the statistic, if one changed.
        ratio: after divided by before, if a statistic changed.
        reason: reason in the second report, if a verdict changed.
    """

    kind: str
    name: str
    before: Any
    after: Any
    figure: str | None = None
    ratio: float | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not None, as JSON values."""
        known = {"kind": self.kind, "name": self.name, "before": self.before, "after": self.after}
        more = {"figure": self.figure, "ratio": self.ratio, "reason": self.reason}
        known.update({name: value for name, value in more.items() if value is not None})
        return {name: json_value(value) for name, value in known.items()}


@dataclass(frozen=True, slots=True)
class ReportComparison(Shown):
    """The comparison of a report with an earlier one.

    Attributes:
        reference: the earlier report's file.
        candidate: the later report's file.
        verdicts: rows whose verdict changed, and the report's own verdict.
        missing: rows of the reference that are missing in the candidate.
        added: rows that only the candidate has.
        figures: statistics that became more than `FACTOR` times larger or smaller.
        settings: settings and provenance that differ.
    """

    reference: Path
    candidate: Path
    verdicts: list[Change] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    added: list[tuple[str, str]] = field(default_factory=list)
    figures: list[Change] = field(default_factory=list)
    settings: list[Change] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no row is missing and no verdict is worse."""
        return not self.missing and all(change.after == "pass" for change in self.verdicts)

    def show(self, page: Page) -> None:
        """Print what differs, and the verdict."""
        print_comparison(page, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The comparison as the JSON interface shows it."""
        worse = sum(change.after != "pass" for change in self.verdicts)
        return {
            **_head("reports", self.reference, self.candidate, self.passed),
            "summary": f"verdicts worse: {worse}, better: {len(self.verdicts) - worse}; rows missing: "
            f"{len(self.missing)}; figures changed more than {FACTOR:g} times: {len(self.figures)}",
            "verdicts": [change.to_dict() for change in self.verdicts],
            "missing": [{"kind": kind, "name": name} for kind, name in self.missing],
            "added": [{"kind": kind, "name": name} for kind, name in self.added],
            "figures": [change.to_dict() for change in self.figures],
            "settings": [change.to_dict() for change in self.settings],
        }


def compare(
    reference: str | Path, candidate: str | Path, limits: Mapping[str, Limits] | None = None
) -> ArrayComparison | ReportComparison:
    """Compare a result with a reference.

    Arrays (.npz or .safetensors) are compared by name. Without limits, floating-point arrays of one dtype may differ
    by the floors of `TOLERANCES`, a few roundings relative to the row; if the dtypes differ, the baseline is the
    reference rounded to the coarser dtype. Integers and booleans must be equal. bfloat16 values that were stored as
    float32 are treated as float32; give limits for them.

    Reports (.json) are compared row by row: a row that passed must still pass, and no row may be missing.

    Args:
        reference: the file with the reference arrays, or the earlier report.
        candidate: the file that is compared with it.
        limits: explicit limits by the name of the array, see `parse_limits`; not for reports.

    Raises:
        UsageError: a file cannot be read, the two are not of one kind, a report has an unsupported version, or the
            limits name an array that does not exist.
    """
    paths = Path(reference).expanduser(), Path(candidate).expanduser()
    are_reports = [path.suffix == ".json" for path in paths]
    if are_reports[0] != are_reports[1]:
        raise UsageError(
            f"{paths[0]} and {paths[1]} are not of one kind; compare two files of arrays (.npz, .safetensors) or two "
            "reports (.json)."
        )
    if not are_reports[0]:
        return _compare_arrays(paths[0], paths[1], limits or {})
    if limits:
        raise UsageError("limits are for arrays; the verdicts of reports cannot be changed. Omit the limits.")
    return _compare_reports(*paths)


def _head(kind: str, reference: Path, candidate: Path, passed: bool) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "kind": kind,
        "verdict": "pass" if passed else "fail",
        "reference": str(reference),
        "candidate": str(candidate),
    }


# Arrays -----------------------------------------------------------------------------------------------------------


def _compare_arrays(reference: Path, candidate: Path, limits: Mapping[str, Limits]) -> ArrayComparison:
    wanted, found = read_arrays(reference), read_arrays(candidate)
    names = list(dict.fromkeys((*wanted, *found)))
    if not names:
        raise UsageError(f"{reference} and {candidate} contain no arrays, so there is nothing to compare.")
    check_limits(limits, names)
    rows = []
    for name in names:
        if name in wanted and name in found:
            rows.append(_compare_array(name, wanted[name], found[name], limits_of(limits, name)))
        else:
            lacking, other = (reference, candidate) if name in found else (candidate, reference)
            rows.append(OutputVerdict(name, False, f"missing in {lacking}, but present in {other}", None, None))
    return ArrayComparison(reference, candidate, rows)


def _compare_array(name: str, wanted: Array, found: Array, limits: Limits | None) -> OutputVerdict:
    for what, there, here in (
        ("shape", wanted.shape, found.shape),
        ("kind", _kind(wanted), _kind(found)),
    ):
        if there != here:
            reason = f"{what} mismatch: the candidate has {here}, the reference {there}"
            return OutputVerdict(name, False, reason, None, None)
    baseline = wanted
    if kind_of(wanted.dtype) == "floating-point":
        coarser = max(wanted.dtype, found.dtype, key=lambda dtype: FORMATS[dtype.name].eps)
        with np.errstate(over="ignore"):
            baseline = wanted.astype(coarser)
    return judge(name, found, wanted, baseline, limits=limits, baseline_name="the rounded reference")


def _kind(array: Array) -> str:
    return f"{kind_of(array.dtype)} elements"


# Reports ----------------------------------------------------------------------------------------------------------


def _compare_reports(reference: Path, candidate: Path) -> ReportComparison:
    before, after = _whole_report(reference), _whole_report(candidate)
    if before["schema"] != after["schema"]:
        raise UsageError(
            f"{reference} has the schema {before['schema']}, {candidate} has {after['schema']}; compare two reports of "
            "one schema."
        )
    result = ReportComparison(reference, candidate)
    rows, new_rows = _rows(reference, before), _rows(candidate, after)
    if before["verdict"] != after["verdict"]:
        result.verdicts.append(
            Change("report", "verdict", before["verdict"], after["verdict"], reason=after.get("summary"))
        )
    for key, row in rows.items():
        if key not in new_rows:
            result.missing.append(key)
            continue
        new = new_rows[key]
        if row.passed != new.passed:
            result.verdicts.append(Change(*key, row.verdict, new.verdict, reason=new.reason))
        result.figures.extend(_changed_figures(key, row.figures, new.figures))
    result.added.extend(key for key in new_rows if key not in rows)
    for part in ("settings", "provenance"):
        result.settings.extend(_changed_values(part, before.get(part) or {}, after.get(part) or {}))
    return result


def _whole_report(path: Path) -> dict[str, Any]:
    content = read_report(path)
    if content.get("verdict") is None or "outputs" not in content:
        raise UsageError(f"{path} is not a complete report: its verdict or its outputs are missing. Write it again.")
    return content


def _rows(path: Path, report: Mapping[str, Any]) -> dict[tuple[str, str], _Row]:
    """Every row of a report by its kind and name; repeated names are numbered."""
    found: dict[tuple[str, str], _Row] = {}
    seen: Counter[tuple[str, str]] = Counter()
    try:
        for kind, name, row in _all_rows(report):
            seen[kind, name] += 1
            found[kind, name if seen[kind, name] == 1 else f"{name} ({seen[kind, name]})"] = _row(row)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} contains an invalid row ({error}); write the report again.") from error
    return found


def _all_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for row in report["outputs"]:
        yield "output", f"{row['case']}, {row['name']}", row
    for kind, rows in (("norm", report.get("norms", ())), ("attention", report.get("attentions", ()))):
        for row in rows:
            name = label(row)
            yield kind, name, row
            for part in row.get("inputs", ()):
                yield f"{kind} input", f"{name}, {part['kind']}", part
    for row in report.get("segments", ()):
        yield "segment", row["name"], row


def _row(row: Mapping[str, Any]) -> _Row:
    if row["passed"] is not None and not isinstance(row["passed"], bool):
        raise TypeError(f"passed is {row['passed']!r}")
    figures = row.get("figures") or {}
    known = {name: float(figures[name]) for name in _FIGURES if figures.get(name) is not None}
    return _Row(row["passed"], row.get("reason"), known)


def _changed_figures(key: tuple[str, str], before: Mapping[str, float], after: Mapping[str, float]) -> Iterator[Change]:
    for figure, least in _FIGURES.items():
        if figure not in before or figure not in after or before[figure] == after[figure]:
            continue
        old, new = max(before[figure], least), max(after[figure], least)
        ratio = new / old if old else math.inf
        if not 1 / FACTOR <= ratio <= FACTOR:
            yield Change(*key, before[figure], after[figure], figure=figure, ratio=ratio)


def _changed_values(part: str, before: Any, after: Any, key: str = "") -> Iterator[Change]:
    """Values that differ, nested ones by their dotted keys."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in dict.fromkeys((*before, *after)):
            inner = f"{key}.{name}" if key else str(name)
            yield from _changed_values(part, before.get(name, _ABSENT), after.get(name, _ABSENT), inner)
    elif before != after:
        yield Change(part, key, before, after)
