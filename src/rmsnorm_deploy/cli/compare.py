"""`rmsnorm compare`: compare arrays with reference arrays, or a report with an earlier one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.screen import Screen

_LIMIT = "X|NAME:X"


def compare(
    reference: Annotated[
        Path,
        typer.Argument(
            metavar="REFERENCE", help="Arrays (.npz, .safetensors), or a report (.json).", show_default=False
        ),
    ],
    candidate: Annotated[
        Path,
        typer.Argument(metavar="CANDIDATE", help="The arrays or the report to compare with it.", show_default=False),
    ],
    atol: Annotated[
        list[str] | None,
        typer.Option(
            "--atol",
            metavar=_LIMIT,
            help="Allow errors of X + rtol x |reference|, in every array or in NAME; may be repeated.",
        ),
    ] = None,
    rtol: Annotated[
        list[str] | None, typer.Option("--rtol", metavar=_LIMIT, help="See --atol; relative to the reference.")
    ] = None,
    ulp: Annotated[
        list[str] | None, typer.Option("--ulp", metavar=_LIMIT, help="Allow errors of X ULPs; see --atol.")
    ] = None,
    as_json: options.AsJson = False,
) -> int:
    """Compare arrays with reference arrays, or a report with an earlier one.

    Exits with 1 if an array differs, or if a row that passed before fails or is missing.
    """
    screen = Screen(as_json)
    from rmsnorm_deploy.runtime.accuracy.tolerances import parse_limits
    from rmsnorm_deploy.runtime.report.compare import compare as compare_files

    limits = parse_limits(atol or (), rtol or (), ulp or ())
    with screen.working(f"comparing {reference} and {candidate}"):
        result = compare_files(reference, candidate, limits)
    content = result.to_dict()
    screen.result(content, lambda: _print(screen, content))
    return 0 if result.passed else 1


def _print(screen: Screen, content: dict[str, Any]) -> None:
    if content["kind"] == "arrays":
        _print_arrays(screen, content["outputs"])
    else:
        _print_reports(screen, content)
    screen.line(f"{content['summary']}.")
    screen.line(f"verdict: {content['verdict']}")


def _print_arrays(screen: Screen, rows: list[dict[str, Any]]) -> None:
    columns = ("array", "verdict", "max error", "max error/row RMS", "max ULP", "mean ULP", "differing")
    screen.table(columns, [_array_row(row) for row in rows])
    for row in rows:
        if not row["passed"]:
            screen.line(f"{row['name']}: {row['reason']}")


def _array_row(row: dict[str, Any]) -> tuple[str, ...]:
    figures, verdict = row["figures"], "pass" if row["passed"] else "fail"
    if figures is None:
        return row["name"], verdict, "-", "-", "-", "-", "-"
    numbers = (_short(figures[key]) for key in ("max_abs", "max_rel_row", "max_ulp", "mean_ulp"))
    differing = "-" if figures["differing"] is None else f"{figures['differing']} of {figures['count']}"
    return row["name"], verdict, *numbers, differing


def _print_reports(screen: Screen, content: dict[str, Any]) -> None:
    if content["verdicts"]:
        rows = [(row["kind"], row["name"], row["before"], row["after"]) for row in content["verdicts"]]
        screen.table(("verdict of", "name", "before", "after"), rows)
    for row in content["verdicts"]:
        if row["after"] == "fail" and "reason" in row:
            screen.line(f"{row['name']}: {row['reason']}")
    for title, key in (("missing", "missing"), ("new", "added")):
        for row in content[key]:
            screen.line(f"{title}: {row['kind']} {row['name']}")
    if content["figures"]:
        columns = ("figure of", "name", "figure", "before", "after", "ratio")
        screen.table(columns, [_figure_row(row) for row in content["figures"]])
    if content["settings"]:
        rows = [(row["kind"], row["name"], row["before"], row["after"]) for row in content["settings"]]
        screen.table(("part", "key", "before", "after"), rows)


def _figure_row(row: dict[str, Any]) -> tuple[str, ...]:
    return row["kind"], row["name"], row["figure"], *(_short(row[key]) for key in ("before", "after", "ratio"))


def _short(number: float | str) -> str:
    return f"{float(number):.3g}"
