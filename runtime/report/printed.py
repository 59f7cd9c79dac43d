"""Results as they are printed: the tables and lines of a validation, of a comparison and of a risk report."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...models.errors import few
from .margins import row_share
from .norm_providers import cpu_notes, norm_lines
from .page import Page, TextPage
from .text import counted, label, verdict_word

# A table wider than the terminal cannot be read; the end of a path says more than its beginning.
_PATH_LENGTH = 48
# The tensors of the KV cache have one row together.
_PLACE = re.compile(r"(?<=^present\.)\d+\.(key|value) \(worst of \d+\)$")
# The places of the largest loss that are printed.
_LOSSES = 3
_JUDGED = ("max error (allowed)", "rms error (allowed)")
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def print_validation(
    page: Page, report: Mapping[str, Any], *, show_parts: bool = False, again: str | None = None
) -> None:
    """The tables of a report, the reasons of what failed, the deviations and the verdict."""
    for warning in report["warnings"]:
        page.line(f"warning: {warning}")
    if report.get("runners"):
        _print_runners(page, report)
    columns = ("case", "output", "verdict", *_JUDGED, "cosine")
    page.table(columns, _shown_outputs(report["outputs"]))
    page.line("errors relative to PyTorch in float64, in eps x row scale; in parentheses the largest that passes")
    for part in report.get("loss", ())[:_LOSSES]:
        page.line(
            f"largest loss: {part['kind']} {part['name']}: cosine {float(part['cosine']):.4f}, "
            f"rms {float(part['rms_rel_row']):.2%} of a row's RMS"
        )
    if show_parts:
        _print_parts(page, report)
    _print_reasons(
        page,
        [
            *((f"{row['case']}, {row['name']}", row["reason"]) for row in _with_reasons(report["outputs"])),
            *((f"{row['kind']} {row['name']}", row["reason"]) for row in report["culprits"]),
        ],
    )
    for row in report["unjudged"]:
        page.line(f"cannot be judged: {few(row['parts'])}: {row['reason']}")
    for text in norm_lines(report):
        page.line(text)
    for note in dict.fromkeys([*report["notes"], *cpu_notes(report)]):
        page.line(f"note: {note}")
    for kind in report["untried"]:
        page.line(f"not tried: {kind}")
    print_deviations(page, report["deviations"])
    if again is not None:
        page.line(again)
    page.line(report["summary"])
    page.line(f"verdict: {report['verdict']}")


def _print_runners(page: Page, report: Mapping[str, Any]) -> None:
    """One row for each output, with the worst verdict and the largest error of each runtime."""
    page.table(("in each runtime", *report["runners"]), runner_rows(report))
    page.line()


def runner_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The verdict of each runtime that ran the candidate; and for each output its worst verdict and largest error."""
    runners = list(report["runners"])
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in report["outputs"]:
        runner = row["case"].partition(": ")[0]
        found.setdefault(_PLACE.sub("*", row["name"]), {}).setdefault(runner, []).append(row)
    rows: list[tuple[str, ...]] = [("verdict", *report["runners"].values())]
    for name, groups in found.items():
        worst = [max(groups.get(runner, ()), key=_rank, default=None) for runner in runners]
        cells = ["-" if row is None else " ".join(_judged(row)[:2]) for row in worst]
        rows.append((name, *cells))
    return rows


def _rank(row: Mapping[str, Any]) -> tuple[int, float]:
    return (2 if row["passed"] is False else 1 if row["passed"] is None else 0, _closeness(row))


def _print_parts(page: Page, report: Mapping[str, Any]) -> None:
    for title, parts in (("norm, alone", report["norms"]), ("attention, alone", report.get("attentions", ()))):
        if not parts:
            continue
        page.line()
        rows = []
        for part in parts:
            worst = max(part["inputs"], key=lambda row: (not row["passed"], _error(row)), default=None)
            cells = _judged(worst)[1:] if worst is not None else ("-", "-")
            rows.append((label(part), _verdict(part), worst["kind"] if worst is not None else "-", *cells))
        page.table((title, "verdict", "worst on", *_JUDGED), rows)
    if report["segments"]:
        page.line()
        segments = [(row["name"], *_judged(row)) for row in report["segments"]]
        page.table(("segment between norms", "verdict", *_JUDGED), segments)
    if report["depth"]:
        page.line()
        columns = ("as the whole model runs, at", "side", "error/row RMS", "introduced there")
        page.table(columns, [_depth_row(point) for point in report["depth"]])
    page.line()


def _depth_row(point: Mapping[str, Any]) -> tuple[str, ...]:
    introduced = "-"
    if point["introduced"] is not None:
        introduced = f"{float(point['introduced']):.3g} ({float(point['baseline_introduced']):.3g})"
    error = f"{float(point['error']):.3g} ({float(point['baseline_error']):.3g})"
    return label(point), point["side"], error, introduced


def _verdict(row: Mapping[str, Any]) -> str:
    return verdict_word(row["passed"])


def _error(row: Mapping[str, Any]) -> float:
    """The error of a kind of input, by which the one to show is chosen; least where PyTorch itself is lost."""
    if row["figures"] is None:
        return float("inf")
    return float(row["figures"]["max_rel_row"]) if float(row["baseline_figures"]["max_rel_row"]) < 0.25 else -1.0


def _judged(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """The verdict, and the errors that the default rule compares, each with what it may be; dashes for other rules."""
    margin = row.get("margin")
    if margin is None:
        return _verdict(row), "-", "-"
    pairs = (("worst", "allowed_worst"), ("rms", "allowed_rms"))
    largest, mean = (f"{float(margin[a]):.3g} ({float(margin[b]):.3g})" for a, b in pairs)
    return _verdict(row), largest, mean


def _needs_reason(row: Mapping[str, Any]) -> bool:
    """Whether the reason of a verdict is printed: it failed, or the table does not show what decided it."""
    return row["passed"] is False or (row["passed"] is True and row.get("margin") is None)


def _with_reasons(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows whose reasons are printed: of those within explicit limits, only the one that the table shows."""
    worst = [max(group, key=_closeness) for group in _passed(rows).values()]
    limited = [row for row in rows if row["passed"] and row.get("margin") is None and _size(row) > 0.0]
    return [row for row in rows if _needs_reason(row) and (row not in limited or row in worst)]


def _size(row: Mapping[str, Any]) -> float:
    """The RMS of the errors of a row, relative to its scale; 0 if it was not measured."""
    return float((row["figures"] or {}).get("rms_rel_row", 0.0))


def _passed(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows that passed, by output."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["passed"]:
            found.setdefault(_PLACE.sub("*", row["name"]), []).append(row)
    return found


def _shown_outputs(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The rows of the table: every one that did not pass, and of the others the nearest to its limit of each output."""
    shown: list[tuple[str, ...]] = []
    for row in rows:
        if not row["passed"]:
            shown.append((row["case"], row["name"], *_judged(row), _cosine(row)))
    for name, group in _passed(rows).items():
        worst = max(group, key=_closeness)
        case = worst["case"] if len(group) == 1 else f"{worst['case']} (worst of {len(group)})"
        shown.append((case, name, *_judged(worst), _cosine(worst)))
    return shown


def _closeness(row: Mapping[str, Any]) -> float:
    """How near the errors of a row are to what they may be, 1 being the limit; without a limit, their size."""
    share = row_share(row)
    return _size(row) if share is None else share


def _print_reasons(page: Page, rows: Iterable[tuple[str, str]]) -> None:
    """Print each reason once, with the places that it applies to."""
    places: dict[str, list[str]] = {}
    for place, reason in rows:
        places.setdefault(str(reason), []).append(place)
    for reason, names in places.items():
        page.line(f"{'; '.join(dict.fromkeys(names))}: {reason}")


def brief(payload: Mapping[str, Any]) -> list[str]:
    """The lines of a result in quiet mode: what failed, and the verdict; none for a result without a verdict."""
    page = TextPage()
    rows: list[tuple[str, Any]] = [
        (_place(row), row.get("reason")) for row in payload.get("outputs", ()) if row.get("passed") is False
    ]
    rows += [(f"{row['kind']} {row['name']}", row["reason"]) for row in payload.get("culprits", ())]
    rows += [(row["name"], row.get("reason", "fail")) for row in payload.get("verdicts", ()) if row["after"] == "fail"]
    rows += [(f"{row['kind']} {row['name']}", "missing") for row in payload.get("missing", ())]
    rows += [(row["target"], "fail") for row in payload.get("targets", ()) if row.get("verdict") == "fail"]
    _print_reasons(page, [(place, str(reason)) for place, reason in rows])
    for row in payload.get("unjudged", ()):
        page.line(f"cannot be judged: {few(row['parts'])}: {row['reason']}")
    if payload.get("proof"):
        page.line(f"proof: {payload['proof']['verdict']} ({payload['proof']['reason']})")
    if "verdict" in payload:
        page.line(f"verdict: {payload['verdict']}")
    return page.lines


def _place(row: Mapping[str, Any]) -> str:
    return f"{row['case']}, {row['name']}" if "case" in row else str(row["name"])


def _cosine(row: Mapping[str, Any]) -> str:
    return "-" if row["figures"] is None else f"{float(row['figures']['cosine']):.9f}"


def print_deviations(page: Page, deviations: Iterable[Mapping[str, Any]]) -> None:
    """One line for each deviation."""
    for row in deviations:
        bound = "without a bound" if row["at_most_ulp"] is None else f"at most {row['at_most_ulp']:g} ULP"
        page.line(f"not exact, {bound}: {row['reason']} ({counted(len(row['sites']), 'norm')})")


def print_risk(page: Page, risk: Mapping[str, Any]) -> None:
    """The table of a risk report, its notes, and the verdict on each dtype."""
    columns = ("norm", "max |x|", "fp16 margin", "eps decides", "outliers", "weight", *_DTYPES.values())
    page.table(columns, [_risk_row(norm) for norm in risk["norms"]])
    page.line(
        "fp16 margin: largest float16 value / the norm's largest value; eps decides: rows whose mean square is at most "
        "eps; outliers: channels with more than 6 times the median RMS; weight: largest / smallest"
    )
    for note in risk["notes"]:
        page.line(f"Note: {note}.")
    for dtype, verdict in risk["verdicts"].items():
        where = (
            "" if verdict["verdict"] == "safe" else f", {verdict['norm'] or 'the model itself'}: {verdict['reason']}"
        )
        page.line(f"{dtype}: {verdict['verdict']}{where}")


def _risk_row(norm: Mapping[str, Any]) -> tuple[str, ...]:
    weight = norm["weight"]
    spread = (
        "-"
        if weight is None
        else f"{float(weight['ratio']):.3g}" + (f", {weight['zeros']} zeros" * bool(weight["zeros"]))
    )
    return (
        _shortened(norm["path"] or "the model itself"),
        f"{norm['largest']:.3g}",
        f"{float(norm['least_margin']['float16']):.3g}",
        f"{100 * norm['eps_decides']:.3g}%",
        str(norm["outliers"]),
        spread,
        *(norm["verdicts"][dtype]["verdict"] for dtype in _DTYPES),
    )


def _shortened(path: str) -> str:
    return path if len(path) <= _PATH_LENGTH else f"...{path[3 - _PATH_LENGTH :]}"


def print_comparison(page: Page, content: Mapping[str, Any]) -> None:
    """What differs between two files of arrays or two reports, and the verdict."""
    if content["kind"] == "arrays":
        _print_arrays(page, content["outputs"])
    else:
        _print_reports(page, content)
    page.line(f"{content['summary']}.")
    page.line(f"verdict: {content['verdict']}")


def _print_arrays(page: Page, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = ("array", "verdict", *_JUDGED, "max |error|", "differing")
    page.table(columns, [_array_row(row) for row in rows])
    page.line("errors in eps x row scale; in parentheses the largest that passes")
    _print_reasons(page, [(row["name"], row["reason"]) for row in rows if _needs_reason(row)])


def _array_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    figures = row["figures"]
    if figures is None:
        return row["name"], *_judged(row), "-", "-"
    differing = "-" if figures["differing"] is None else f"{figures['differing']} of {figures['count']}"
    return row["name"], *_judged(row), _short(figures["max_abs"]), differing


def _print_reports(page: Page, content: Mapping[str, Any]) -> None:
    if content["verdicts"]:
        rows = [(row["kind"], row["name"], row["before"], row["after"]) for row in content["verdicts"]]
        page.table(("verdict of", "name", "before", "after"), rows)
    for row in content["verdicts"]:
        if row["after"] != "pass" and "reason" in row:
            page.line(f"{row['name']}: {row['reason']}")
    for title, key in (("missing", "missing"), ("new", "added")):
        for row in content[key]:
            page.line(f"{title}: {row['kind']} {row['name']}")
    if content["figures"]:
        columns = ("figure of", "name", "figure", "before", "after", "ratio")
        page.table(columns, [_figure_row(row) for row in content["figures"]])
    if content["settings"]:
        rows = [(row["kind"], row["name"], row["before"], row["after"]) for row in content["settings"]]
        page.table(("part", "key", "before", "after"), rows)


def _figure_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    return row["kind"], row["name"], row["figure"], *(_short(row[key]) for key in ("before", "after", "ratio"))


def _short(number: float | str) -> str:
    return f"{float(number):.3g}"
