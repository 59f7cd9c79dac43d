"""The summary of a run: `summary.json` and `junit.xml` (`write_summary`), and the rows of its table (`table_rows`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..report.junit import Case, document
from ..report.text import write_text
from .row_record import EXPORT, PACKAGE, VALIDATE

SCHEMA = "rmsnorm_deploy.ship/1"
SUMMARY, JUNIT = "summary.json", "junit.xml"


def junit(summary: Mapping[str, Any]) -> str:
    """The summary as JUnit XML: suites `export`, `validate` and `package`, with a case for each row and step."""
    suites: dict[str, list[Case]] = {EXPORT: [], VALIDATE: [], PACKAGE: []}
    for row in summary["rows"]:
        for step in row["steps"]:
            kind, _, server = step["step"].partition(":")
            suites[kind].append(_case(f"{row['row']}: {server}" if server else row["row"], step))
    return document(suites, summary)


def _case(name: str, step: Mapping[str, Any]) -> Case:
    error = step["error"]
    problem = None if error is None else (error["message"], f"{error['kind']}: {error['message']}")
    skipped = "an earlier step of the row failed, or the run ended before" if step["status"] == "not run" else None
    return Case(name, problem, error is None or error["kind"] == "MismatchError", step["seconds"], skipped)


def write_summary(summary: Mapping[str, Any], output: Path) -> None:
    """Write both files into the folder of the results.

    Raises:
        UsageError: a file cannot be written, or is not one of this package.
    """
    write_text(json.dumps(summary, indent=2) + "\n", output / SUMMARY)
    write_text(junit(summary), output / JUNIT)


def step_word(row: Mapping[str, Any], kind: str) -> str:
    """What became of the steps of one kind: the first of `failed`, `not run`, `done` and `unchanged`; else a dash."""
    found = [step["status"] for step in row["steps"] if step["step"].partition(":")[0] == kind]
    for status in ("failed", "not run", "done", "unchanged"):
        if status in found:
            return status
    return "-"
