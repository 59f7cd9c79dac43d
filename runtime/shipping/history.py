"""The runs of a recipe, one line each in `history.jsonl` (`append`, `read_history`), and the reports of their rows."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ...export.onnx_io.atomic_files import new_file
from ...export.onnx_io.manifest_fields import Text
from ...export.onnx_io.owned_files import is_own_report
from ...models.errors import UsageError
from ...models.regular_files import LARGEST_JSON, FileStamp, read_bytes
from ..accuracy.error_stats import json_value
from ..engines.api import ORT
from ..recipe.steps import VALIDATE, kind_of, subject_of
from ..report.compare import compare
from ..report.margins import Nearness, nearness, worst_of
from ..report.report_fields import Number
from ..report.report_file import read_report
from .row_record import FILE, report_name

SCHEMA = "rmsnorm_deploy.ship_history/1"
HISTORY = "history.jsonl"
# The norms of a row that are kept of its report.
_NORMS = 5
# The names of rows and files; they need no quoting in a link.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class RunRow(BaseModel):
    """A row in one run.

    Attributes:
        row: its name.
        status: `done`, `unchanged`, `failed` or `not run`.
        seconds: what its steps took, those of earlier runs included.
        bytes: the size of its folders.
        worst: the largest error of its report divided by its limit; None without one.
    """

    model_config = ConfigDict(strict=True)

    row: Text
    status: Text
    seconds: Amount
    bytes: Annotated[int, Field(ge=0)]
    worst: Number | None


class Run(BaseModel):
    """One run of a recipe: when its summary was written, its verdict, and its rows."""

    model_config = ConfigDict(strict=True)

    created: Text
    verdict: Text
    rows: list[RunRow]

    def row(self, name: str) -> RunRow | None:
        """The row of a name; None if it was not in the run."""
        return next((row for row in self.rows if row.row == name), None)


def run_of(summary: Mapping[str, Any], output: Path) -> Run:
    """The figures of a run, from its summary and the reports of its rows.

    A row that is unchanged has the figures of the run that made it.
    """
    rows = []
    for row in summary["rows"]:
        seconds = round(sum(step["seconds"] for step in row["steps"]), 3)
        worst = worst_of(row_nearness(row, output, runner) for runner in runners_of(row))
        rows.append(RunRow(row=row["row"], status=row["status"], seconds=seconds, bytes=row["bytes"], worst=worst))
    return Run(created=summary["created"], verdict=summary["verdict"], rows=rows)


def append(run: Run, output: Path) -> None:
    """Add a line to the history. The file is replaced by a longer one at once, so that no earlier line can be lost.

    Raises:
        UsageError: the file cannot be written, or is not one of this package.
    """
    path = output / HISTORY
    before = read_bytes(path, LARGEST_JSON) if path.exists() else b""
    before += b"" if before.endswith(b"\n") or not before else b"\n"
    line = json.dumps({"schema": SCHEMA, **json_value(run.model_dump())})
    with new_file(path, is_own_report) as partial:
        partial.write_bytes(before + line.encode() + b"\n")


def read_history(output: Path) -> tuple[list[Run], int]:
    """The runs from the first to the last, and the number of lines that are not of this format.

    Raises:
        UsageError: there is a history that cannot be read.
    """
    path = own_file(output, HISTORY)
    if path is None:
        return [], 0
    runs, others = [], 0
    for line in read_bytes(path, LARGEST_JSON).decode("utf-8", "replace").split("\n"):
        if not line:
            continue
        try:
            content = json.loads(line)
            if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA:
                raise ValueError(f"expected the schema {SCHEMA}")
            runs.append(Run.model_validate(content))
        except (ValueError, RecursionError):  # also ValidationError
            others += 1
    return runs, others


def runners_of(row: Mapping[str, Any]) -> list[str]:
    """What a row compares with PyTorch: `ort` for the file, and the runtimes of engines."""
    return [subject_of(step["step"]) for step in row["steps"] if kind_of(step["step"]) == VALIDATE]


def row_report(row: Mapping[str, Any], output: Path, runner: str = ORT) -> Path | None:
    """The report of the validation that a row's result tells of; None if there is none.

    Where the validation failed, the report is its own only if it was written after the row's last finished step.
    """
    status = next(
        (
            step["status"]
            for step in row["steps"]
            if kind_of(step["step"]) == VALIDATE and subject_of(step["step"]) == runner
        ),
        None,
    )
    report, record = own_file(output, row["row"], report_name(runner)), own_file(output, row["row"], FILE)
    if report is None or status in ("done", "unchanged"):
        return report
    try:
        is_later = record is not None and report.stat().st_mtime_ns >= record.stat().st_mtime_ns
    except OSError:
        return None
    return report if status == "failed" and is_later else None


def own_file(output: Path, *parts: str) -> Path | None:
    """A regular file in the folder of the results, or in that of a row; None for a link, and for anything elsewhere.

    Args:
        output: the folder.
        parts: the name of the file, or the names of a row and of the file.
    """
    if not all(_NAME.fullmatch(part) for part in parts):
        return None
    path = Path(os.path.realpath(output), *parts)
    return path if os.path.realpath(path) == str(path) and path.is_file() else None


def row_nearness(row: Mapping[str, Any], output: Path, runner: str = ORT) -> Nearness | None:
    """How near a row is to its limits; None without a report that can be read."""
    path = row_report(row, output, runner)
    try:
        return None if path is None else _nearness(FileStamp.of(path))
    except (OSError, UsageError, KeyError, TypeError, ValueError, AttributeError):
        return None


def row_drift(row: Mapping[str, Any], output: Path, runner: str = ORT) -> dict[str, Any] | None:
    """The comparison of a row's report with that of its validation before; None where one is missing or unreadable."""
    path = row_report(row, output, runner)
    earlier = own_file(output, row["row"], report_name(runner, ".before.json"))
    try:
        return None if path is None or earlier is None else _drift(FileStamp.of(earlier), FileStamp.of(path))
    except (OSError, UsageError):
        return None


# Reports of large models are slow to read: each state of a file is read once.


@lru_cache(maxsize=256)
def _nearness(report: FileStamp) -> Nearness:
    return nearness(read_report(report.path), _NORMS)


@lru_cache(maxsize=256)
def _drift(earlier: FileStamp, report: FileStamp) -> dict[str, Any]:
    return compare(earlier.path, report.path).to_dict()
