"""The summary of a run: `summary.json`, `junit.xml` and `summary.html` (`write_summary`, `read_summary`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from ...export.onnx_io.manifest_fields import Text, checked
from ...models.errors import EnvironmentMissingError, UsageError
from ...models.regular_files import read_json
from ..recipe.steps import KINDS, VALIDATE, kind_of
from ..report.junit import Case, document
from ..report.text import counted, write_text
from .history import (
    HISTORY,
    Amount,
    append,
    own_file,
    read_history,
    row_drift,
    row_nearness,
    row_report,
    run_of,
    runners_of,
)
from .row_record import report_name

if TYPE_CHECKING:
    from ..report.summary_page import ReportLinks

SCHEMA = "rmsnorm_deploy.ship/1"
SUMMARY, JUNIT, PAGE = "summary.json", "junit.xml", "summary.html"
# Every file that a run writes beside the folders of its rows.
FILES = (SUMMARY, JUNIT, PAGE, HISTORY)


class _Fields(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Error(_Fields):
    kind: Text
    message: Text
    exit_code: int


class _Step(_Fields):
    step: Text
    status: Text
    seconds: Amount
    error: _Error | None


class _Row(_Fields):
    row: Text
    model: Text
    target: Text
    dtype: Text | None
    status: Text
    seconds: Amount
    bytes: int = Field(ge=0)
    notes: list[Text]
    steps: list[_Step]


class SummaryFields(_Fields):
    """The fields of `summary.json` that a page reads."""

    verdict: Text
    exit_code: int
    created: Text
    recipe: Text
    rows: list[_Row]


def junit(summary: Mapping[str, Any]) -> str:
    """The summary as JUnit XML: a suite for each kind of step, with a case for each row and step."""
    suites: dict[str, list[Case]] = {kind: [] for kind in kinds_in(summary)}
    for row in summary["rows"]:
        for step in row["steps"]:
            kind, _, subject = step["step"].partition(":")
            suites[kind].append(_case(f"{row['row']}: {subject}" if subject else row["row"], step))
    return document(suites, summary)


def kinds_in(summary: Mapping[str, Any]) -> list[str]:
    """The kinds of steps that a summary's table shows: those that a row has, and the comparison with PyTorch."""
    used = {kind_of(step["step"]) for row in summary["rows"] for step in row["steps"]} | {VALIDATE}
    return [kind for kind in KINDS if kind in used]


def _case(name: str, step: Mapping[str, Any]) -> Case:
    error = step["error"]
    problem = None if error is None else (error["message"], f"{error['kind']}: {error['message']}")
    skipped = "an earlier step of the row failed, or the run ended before" if step["status"] == "not run" else None
    return Case(name, problem, error is None or error["kind"] == "MismatchError", step["seconds"], skipped)


def write_progress(summary: Mapping[str, Any], output: Path) -> None:
    """Write `summary.json` alone, while rows remain.

    Raises:
        UsageError: it cannot be written, or is not a file of this package.
    """
    write_text(json.dumps(summary, indent=2) + "\n", output / SUMMARY)


def write_summary(summary: Mapping[str, Any], output: Path) -> list[str]:
    """Write all files into the folder of the results, and add the run to the history.

    Returns:
        Notes for the user: why there is no page.

    Raises:
        UsageError: a file cannot be written, or is not one of this package.
    """
    write_progress(summary, output)
    write_text(junit(summary), output / JUNIT)
    append(run_of(summary, output), output)
    try:
        write_text(page(summary, output), output / PAGE)
    except EnvironmentMissingError as error:
        return [f"{PAGE} was not written: {error}"]
    return []


def page(summary: Mapping[str, Any], output: Path, *, is_served: bool = False) -> str:
    """The summary as an HTML page, with the history and the reports of its rows as they are in the folder.

    Raises:
        UsageError: the history cannot be read.
        EnvironmentMissingError: jinja2 is not installed.
    """
    from ..report.summary_page import Results, render

    runs, others = read_history(output)
    if not runs or runs[-1].created != summary["created"]:  # the summary is that of a run that goes on
        runs.append(run_of(summary, output))
    files = [name for name in (SUMMARY, JUNIT, HISTORY) if own_file(output, name)]
    notes = [f"{counted(others, 'line')} of {HISTORY} cannot be read and were left out"] if others else []
    return render(
        Results(
            summary,
            {row["row"]: [*_report_links(row, output)] for row in summary["rows"]},
            kinds_in(summary),
            [run.model_dump() for run in runs],
            files,
            notes,
            is_served,
        )
    )


def _report_links(row: Mapping[str, Any], output: Path) -> Iterator[ReportLinks]:
    from ..report.summary_page import ReportLinks

    for runner in runners_of(row):
        if row_report(row, output, runner) is not None:
            page, name = report_name(runner, ".html"), row["row"]
            html = f"{name}/{page}" if own_file(output, name, page) else None
            near, drift = row_nearness(row, output, runner), row_drift(row, output, runner)
            yield ReportLinks(runner, f"{name}/{report_name(runner)}", html, near, drift)


def read_summary(output: Path) -> dict[str, Any]:
    """The summary in a folder of results.

    Raises:
        UsageError: there is none, or it is not of this version.
    """
    remedy = "Write it with: rmsnorm ship"
    path = own_file(output, SUMMARY)
    if path is None:
        raise UsageError(f"{output}: expected a folder with {SUMMARY}, got none there. {remedy}")
    content = read_json(path, remedy)
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise UsageError(f"{path}: expected the schema {SCHEMA}, got {schema!r}. {remedy}")
    checked(path, content, SummaryFields, remedy)
    return dict(content)


def step_word(row: Mapping[str, Any], kind: str) -> str:
    """What became of the steps of one kind: the first of `failed`, `not run`, `done` and `unchanged`; else a dash."""
    found = [step["status"] for step in row["steps"] if kind_of(step["step"]) == kind]
    for status in ("failed", "not run", "done", "unchanged"):
        if status in found:
            return status
    return "-"
