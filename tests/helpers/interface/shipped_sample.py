"""The results of a recipe as `rmsnorm ship` writes them, made without shipping anything (`ship_sample`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rmsnorm_deploy.runtime.shipping.summary import SCHEMA, write_summary
from tests.helpers.interface.report_sample import sample_report, with_margins

Row = dict[str, Any]


def sample_row(output: Path, name: str, **changes: Any) -> Row:
    """A row that was exported, validated and packaged."""
    result = {"bytes": 2_500_000, "notes": []}
    steps = [
        {"step": step, "status": "done", "seconds": seconds, "result": result, "error": None}
        for step, seconds in (("export", 3.5), ("validate", 8.25), ("package:triton", 0.5))
    ]
    row = {"row": name, "model": name, "folder": str(output / name), "target": "ort", "dtype": "float16"}
    rest = {"exit_code": 0, "seconds": 12.25, "bytes": 5_000_000, "notes": [], "steps": steps}
    return {**row, "status": "done", "reason": "new", **rest, **changes}


def failed_step(row: Row, step: str, message: str, kind: str = "MismatchError", code: int = 1) -> Row:
    """The row with a step that failed, after which none was run."""
    names = [part["step"] for part in row["steps"]]
    for part in row["steps"][names.index(step) :]:
        part.update(status="not run", seconds=0.0, result=None)
    row["steps"][names.index(step)].update(
        status="failed", seconds=1.0, error={"kind": kind, "message": message, "exit_code": code}
    )
    return {**row, "status": "failed", "exit_code": code}


def write_report(
    output: Path, name: str, *, passed: bool = True, limit: float = 4.0, file: str = "report.json"
) -> None:
    """The report of a row, written after its record."""
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "row.json").write_text("{}")
    (folder / file).write_text(json.dumps(with_margins(sample_report(passed), limit)))
    (folder / "report.html").write_text("<!DOCTYPE html><title>A report</title>")


def ship_sample(output: Path, rows: list[Row], created: str, verdict: str | None = None) -> dict[str, Any]:
    """Write the files of one run."""
    code = max((row["exit_code"] for row in rows), default=0)
    summary = {
        "schema": SCHEMA,
        "verdict": verdict or ("fail" if code else "pass"),
        "exit_code": code,
        "created": created,
        "recipe": str(output.parent / "rmsnorm.toml"),
        "output": str(output),
        "rows": rows,
    }
    output.mkdir(parents=True, exist_ok=True)
    write_summary(summary, output)
    return summary
