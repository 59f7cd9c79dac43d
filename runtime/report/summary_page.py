"""The summary of a recipe's run as one self-contained HTML page (`render`), and two of its runs (`render_drift`).

This module prepares the content of the pages; the templates `summary.html.j2` and `drift.html.j2` define them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .html import environment
from .margins import Nearness, worst_of
from .text import clean, counted, short, size_text
from .trend import HEIGHT, WIDTH, chart

# The runs that a trend shows, the norms of a row, and the changes of each kind of a comparison.
RUNS, _NORMS, _CHANGES = 30, 3, 12
_MARKS = {"pass": "✓", "fail": "✗", "unjudged": "?"}

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ReportLinks:
    """A report of a row.

    Attributes:
        runner: what was compared with PyTorch: `ort`, the file in ONNX Runtime, or the runtime of an engine.
        json, html: links to it, relative to the page; None where it was not written as a page.
        near: how near it is to its limits; None if it cannot be read.
        drift: its comparison with the validation before, see `compare`; None without one.
    """

    runner: str
    json: str
    html: str | None = None
    near: Nearness | None = None
    drift: Row | None = None


@dataclass(frozen=True, slots=True)
class Results:
    """A recipe's results.

    Attributes:
        summary: the content of `summary.json`.
        reports: by the names of its rows.
        kinds: the kinds of steps, in order.
        runs: from the first to the last, that of the summary included; each with `created`, `verdict` and `rows`, see
            `history.jsonl`.
        files: names of files beside the page to link to.
        notes: lines on what could not be read.
        is_served: whether two runs can be chosen to be compared.
    """

    summary: Row
    reports: Mapping[str, Sequence[ReportLinks]]
    kinds: Sequence[str]
    runs: Sequence[Row]
    files: Sequence[str] = ()
    notes: Sequence[str] = field(default_factory=list)
    is_served: bool = False


def render(results: Results) -> str:
    """The page; the same results give the same text.

    Raises:
        EnvironmentMissingError: jinja2 is not installed.
    """
    summary = results.summary
    rows = [_row(row, results.reports.get(row["row"], ()), results.kinds) for row in summary["rows"]]
    reports = [(_named(row, report), report) for row in rows for report in row["reports"]]
    names = [row["row"] for row in rows]
    kind, word = _verdict(summary)
    return _page(
        "summary.html.j2",
        kind=kind,
        word=word,
        sign=_MARKS[kind],
        recipe=summary["recipe"],
        created=summary["created"],
        schema=summary["schema"],
        told=_told(summary["rows"]),
        rows=rows,
        errors=[error for row in rows for error in row["errors"]],
        notes=[*results.notes, *(f"{row['row']}: {note}" for row in rows for note in row["notes"])],
        kinds=results.kinds,
        norms=[(name, norm) for name, report in reports if report.near for norm in report.near.norms[:_NORMS]],
        without=[name for name, report in reports if report.near is not None and report.near.worst is None],
        drifts=_since(results.runs, names),
        comparisons=[(name, _comparison(report.drift)) for name, report in reports if report.drift is not None],
        trends=_trends(results.runs[-RUNS:], names),
        runs=_numbered(results.runs),
        shown_runs=min(len(results.runs), RUNS),
        files=results.files,
        is_served=results.is_served,
    )


def render_drift(runs: Sequence[Row], before: int, after: int) -> str:
    """The page that compares two runs, by their numbers from 1.

    Raises:
        EnvironmentMissingError: jinja2 is not installed.
    """
    first, second = ({row["row"]: row for row in runs[number - 1]["rows"]} for number in (before, after))
    drifts = [_drift(name, first.get(name), second.get(name), before) for name in dict.fromkeys([*first, *second])]
    numbered = _numbered(runs)
    return _page(
        "drift.html.j2",
        drifts=drifts,
        runs=numbered,
        before=numbered[before - 1],
        after=numbered[after - 1],
    )


def _page(template: str, **view: Any) -> str:
    look = {"width": WIDTH, "height": HEIGHT, "size": _size, "seconds": _seconds, "share": _share, "factor": _factor}
    return clean(environment().get_template(template).render(**look, short=short, **view))


def _verdict(summary: Row) -> tuple[str, str]:
    """The kind and the word of the page's head. A run without a failure that has not come to its end is neither."""
    if summary["verdict"] == "pass":
        return "pass", "Pass"
    if summary["exit_code"] == 0:
        return "unjudged", "Not complete"
    return "fail", "Fail"


def _told(rows: Sequence[Row]) -> str:
    counts = {word: sum(row["status"] == word for row in rows) for word in ("done", "unchanged", "failed", "not run")}
    found = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return f"{counted(len(rows), 'row')}: {found}" if rows else "no rows"


def _named(row: Row, report: ReportLinks) -> str:
    """The name of a report's row, with the runtime, where the row has several reports."""
    return f"{row['row']}, {report.runner}" if len(row["reports"]) > 1 else str(row["row"])


def _row(row: Row, reports: Sequence[ReportLinks], kinds: Sequence[str]) -> dict[str, Any]:
    """A row of the table."""
    mark, word = _row_verdict(row)
    return {
        **row,
        "mark": mark,
        "word": word,
        "sign": {**_MARKS, "plain": "–"}[mark],
        "kinds": [(kind, _steps(row, kind)) for kind in kinds],
        "errors": [
            {"row": row["row"], "step": step["step"], **step["error"]} for step in row["steps"] if step["error"]
        ],
        "reports": reports,
        "worst": worst_of(report.near for report in reports),
    }


def _row_verdict(row: Row) -> tuple[str, str]:
    """The class and the word of a row's verdict: a row without a validation has not passed one."""
    statuses = {step["step"]: step["status"] for step in row["steps"]}
    if row["status"] == "failed":
        mismatch = any(step["error"] and step["error"]["kind"] == "MismatchError" for step in row["steps"])
        return "fail", "mismatch" if mismatch else "error"
    if "not run" in statuses.values():
        return "unjudged", "not complete"
    is_validated = any(name.partition(":")[0] == "validate" for name in statuses)
    return ("pass", "pass") if is_validated else ("plain", "not validated")


def _steps(row: Row, kind: str) -> str:
    """What became of the steps of one kind; servers by their names."""
    found = []
    for step in row["steps"]:
        name, _, server = step["step"].partition(":")
        if name == kind:
            found.append(f"{server}: {step['status']}" if server else str(step["status"]))
    return ", ".join(found) or "–"


def _since(runs: Sequence[Row], names: Sequence[str]) -> list[dict[str, Any]]:
    """For each row of the last run its figures, and those of the last run before that has the row."""
    found: list[dict[str, Any]] = []
    if len(runs) < 2:
        return found
    tables = [{row["row"]: row for row in run["rows"]} for run in runs]
    for name in names:
        number = next((place for place in range(len(runs) - 1, 0, -1) if name in tables[place - 1]), 0)
        if name in tables[-1] and number:
            found.append(_drift(name, tables[number - 1][name], tables[-1][name], number))
    return found


def _drift(name: str, before: Row | None, after: Row | None, number: int) -> dict[str, Any]:
    """A row of two runs; `change` is the class of what became of its worst share of a limit, and the word for it."""
    old, new = ({} if row is None else row for row in (before, after))
    shares = tuple(None if row.get("worst") is None else float(row["worst"]) for row in (old, new))
    return {"row": name, "number": number, "before": old, "after": new, "shares": shares, "change": _change(*shares)}


def _change(before: float | None, after: float | None) -> tuple[str, str]:
    if before is None or after is None:
        return "plain", "–" if before is after is None else "new" if before is None else "no figure"
    if after > 1 >= before:
        return "fail", "beyond the limit"
    if before > 1 >= after:
        return "pass", "within the limit again"
    if before == after:
        return "plain", "same"
    return "plain", "larger" if after > before else "smaller"


def _comparison(content: Row) -> dict[str, Any]:
    """The comparison of two reports, with the first changes of each kind; of statistics, the largest changes."""

    def size(change: Row) -> float:
        ratio = float(change["ratio"])
        return abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf

    lists = {**content, "figures": sorted(content["figures"], key=size, reverse=True)}
    kinds = ("verdicts", "missing", "added", "figures", "settings")
    more = sum(max(len(lists[kind]) - _CHANGES, 0) for kind in kinds)
    return {**content, **{kind: lists[kind][:_CHANGES] for kind in kinds}, "more": more}


def _trends(runs: Sequence[Row], names: Sequence[str]) -> list[tuple[Any, ...]]:
    """For each row that has been run before: its name; chart and latest of its worst share; the same of its seconds."""
    found = []
    tables = [{row["row"]: row for row in run["rows"]} for run in runs]
    for name in names:
        rows = [table.get(name) for table in tables]
        if sum(row is not None for row in rows) < 2:
            continue
        shares = [None if row is None or row["worst"] is None else float(row["worst"]) for row in rows]
        seconds = [None if row is None or not row["seconds"] else float(row["seconds"]) for row in rows]
        drawn: list[Any] = [name]
        for values, text, limit in ((shares, _share, 1.0), (seconds, _seconds, None)):
            texts = [f"{run['created']}: {text(value)}" for run, value in zip(runs, values, strict=True)]
            drawn += [chart(values, texts, limit=limit), text(values[-1])]
        found.append(tuple(drawn))
    return found


def _numbered(runs: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        {"number": number, "created": run["created"], "verdict": run["verdict"]} for number, run in enumerate(runs, 1)
    ]


def _share(value: float | None) -> str:
    """A share of a limit as a percentage of three digits."""
    return "–" if value is None else f"{short(100 * value)} %" if math.isfinite(value) else short(value)


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} s"


def _factor(before: float | None, after: float | None) -> str:
    """How many times larger a figure is than it was."""
    if not before or after is None or not math.isfinite(after / before):
        return "–"
    return f"× {short(after / before)}"


def _size(count: int | None) -> str:
    return size_text(count) if count else "–"
