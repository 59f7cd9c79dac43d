"""The history of a recipe: a line for each run, which nothing can take away, and the figures of its rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.shipping import history
from rmsnorm_deploy.runtime.shipping.history import Run, RunRow, append, own_file, read_history, row_report, run_of
from tests.helpers.interface.shipped_sample import failed_step, sample_row, write_report


def _run(created: str, worst: float | None = None) -> Run:
    row = RunRow(row="first", status="done", seconds=1.5, bytes=10, worst=worst)
    return Run(created=created, verdict="pass", rows=[row])


def test_lines_are_added_and_read_again(tmp_path: Path) -> None:
    runs = [_run("a", 0.25), _run("b", float("inf")), _run("c")]
    for run in runs:
        append(run, tmp_path)
    assert read_history(tmp_path) == (runs, 0)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "schema": "rmsnorm_deploy.ship_history/1", "created": "b", "verdict": "pass",
        "rows": [{"row": "first", "status": "done", "seconds": 1.5, "bytes": 10, "worst": "inf"}],
    }  # fmt: skip
    assert runs[0].row("first") == runs[0].rows[0]
    assert runs[0].row("second") is None


def test_a_write_that_fails_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(_run("a"), tmp_path)

    def full(self: Path, data: Any) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UsageError, match="No space left"):
            append(_run("b"), tmp_path)
    assert read_history(tmp_path) == ([_run("a")], 0)
    assert [path.name for path in tmp_path.iterdir()] == ["history.jsonl"]


def test_lines_that_cannot_be_read_stay_and_are_counted(tmp_path: Path) -> None:
    append(_run("a"), tmp_path)
    path = tmp_path / "history.jsonl"
    broken = (
        path.read_bytes() + b'{"schema": "rmsnorm_deploy.ship_history/9"}\n[1]\n' + b"[" * 100_000 + b'\n\xff{"sche'
    )
    path.write_bytes(broken)
    append(_run("b"), tmp_path)
    assert read_history(tmp_path) == ([_run("a"), _run("b")], 4)
    assert path.read_bytes().startswith(broken + b"\n")


def test_another_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text("mine\n")
    with pytest.raises(UsageError, match="rmsnorm did not write it"):
        append(_run("a"), tmp_path)
    assert (tmp_path / "history.jsonl").read_text() == "mine\n"


def test_figures_of_a_run(tmp_path: Path) -> None:
    write_report(tmp_path, "first", limit=8.0)
    summary = {"created": "a", "verdict": "pass", "rows": [sample_row(tmp_path, name) for name in ("first", "second")]}
    first, second = run_of(summary, tmp_path).rows
    assert (first.status, first.seconds, first.bytes) == ("done", 12.25, 5_000_000)
    assert first.worst == pytest.approx(0.449, abs=1e-3)
    assert second.worst is None
    # An unchanged row took no time now, and keeps what it took when it was made.
    summary["rows"][0].update(status="unchanged", seconds=0.004)
    assert run_of(summary, tmp_path).rows[0] == first.model_copy(update={"status": "unchanged"})


def test_a_report_of_an_earlier_run_is_not_that_of_a_failure(tmp_path: Path) -> None:
    write_report(tmp_path, "first")
    row = sample_row(tmp_path, "first")
    report = tmp_path / "first" / "report.json"
    assert row_report(row, tmp_path) == report
    assert row_report(failed_step(row, "validate", "too far off"), tmp_path) == report
    os.utime(tmp_path / "first" / "row.json")
    os.utime(report, ns=(0, 0))
    assert row_report(row, tmp_path) is None
    assert row_report(failed_step(sample_row(tmp_path, "first"), "export", "no luck"), tmp_path) is None


def test_a_damaged_report_gives_no_figures(tmp_path: Path) -> None:
    write_report(tmp_path, "first")
    row = sample_row(tmp_path, "first")
    report = tmp_path / "first" / "report.json"
    content = json.loads(report.read_text())
    content["norms"][0]["inputs"][0]["margin"] = {"worst": "much"}
    report.write_text(json.dumps(content))
    assert history.row_nearness(row, tmp_path) is None
    report.write_text("{")
    assert history.row_nearness(row, tmp_path) is None


def test_own_files_are_in_the_folder(tmp_path: Path) -> None:
    output = tmp_path / "dist"
    (output / "row").mkdir(parents=True)
    for path in (output / "a.json", output / "row" / "a.json", tmp_path / "a.json"):
        path.write_text("{}")
    (output / "link.json").symlink_to(output / "a.json")
    (output / "other").symlink_to(output / "row")
    (tmp_path / "way").symlink_to(output)
    assert own_file(output, "a.json") == own_file(tmp_path / "way", "a.json") == output / "a.json"
    assert own_file(output, "row", "a.json") == output / "row" / "a.json"
    for parts in (("..", "a.json"), ("link.json",), ("other", "a.json"), ("row",), ("row/a.json",), ("",), ("a\0",)):
        assert own_file(output, *parts) is None
