"""Export, validate and package one row (`ship_row`): plain data in and out, so that it may run anywhere."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...export.onnx_io.atomic_files import new_file
from ...export.onnx_io.owned_files import is_own_report, sha256
from ...export.onnx_io.partial_files import claimed
from ...models.errors import (
    EnvironmentMissingError,
    MismatchError,
    RmsnormDeployError,
    UnsupportedError,
    explained,
)
from ...models.hub.options import HubOptions, showing_downloads, using_hub
from .row_record import (
    EARLIER,
    EXPORT,
    HTML,
    MODEL,
    PACKAGE,
    REPORT,
    VALIDATE,
    DoneStep,
    RowRecord,
    RowState,
    examine,
    steps_of,
)

Progress = Callable[[str], None]
Result = dict[str, Any]
# From the worst to the best: a mismatch is worse than what could not be tried.
_WORST = (70, 1, 2, 4, 3, 0)


def ship_row(row: Mapping[str, Any], *, force: bool = False, progress: Progress | None = None) -> Result:
    """Do the steps of a row that remain; an error ends the row, and is in its result.

    Args:
        row: one of `rows_of`.
        force: do all steps again.
        progress: called with a line of text at each step.

    Returns:
        JSON values: `row`, `model`, `folder`, `target`, `dtype`; `status`: `done`, `unchanged` or `failed`; `reason`,
        why there was something to do; `exit_code`; `seconds` of this run; `bytes` of its folders; `notes`; and `steps`,
        each with `step`, `status` (`done`, `unchanged`, `failed` or `not run`), `seconds` (when it ran), `result` and
        `error` (`kind`, `message`, `exit_code`).
    """
    start = time.monotonic()
    say = progress or (lambda _: None)
    try:
        Path(row["folder"]).mkdir(parents=True, exist_ok=True)
        with claimed(Path(row["folder"])):
            say(f"{row['row']}: comparing with the last run")
            state = examine(row, force=force)
            notes = _prepare(row, state) if state.steps else []
            steps = _run(row, state, lambda text: say(f"{row['row']}: {text}"))
    except Exception as error:  # of any kind: the other rows go on
        return failed_row(row, error)
    return _result(row, state, steps, notes, round(time.monotonic() - start, 3))


def failed_row(row: Mapping[str, Any], error: BaseException) -> Result:
    """The result of a row, as that of `ship_row`, which an error ended before its first step."""
    return _result(row, RowState([]), [_failed(EXPORT, error, 0.0), *map(_not_run, steps_of(row)[1:])], [], 0.0)


def _result(row: Mapping[str, Any], state: RowState, steps: list[Result], notes: list[str], seconds: float) -> Result:
    codes = [step["error"]["exit_code"] for step in steps if step["error"]]
    results = [step["result"] for step in steps if step["result"]]
    return {
        "row": row["row"],
        "model": row["model"],
        "folder": row["folder"],
        "target": row["target"],
        "dtype": row["dtype"],
        "status": "failed" if codes else "done" if state.steps else "unchanged",
        "reason": state.reason,
        "exit_code": worst(codes),
        "seconds": seconds,
        "bytes": sum(result.get("bytes", 0) for result in results),
        "notes": list(dict.fromkeys([*notes, *(note for result in results for note in result.get("notes", ()))])),
        "steps": steps,
    }


def worst(codes: list[int]) -> int:
    """The exit code of several: that of a bug, else of a mismatch, wrong usage, what is missing or is unsupported."""
    return min(codes, default=0, key=_WORST.index)


def _prepare(row: Mapping[str, Any], state: RowState) -> list[str]:
    """Move away what was changed in the folder, and forget the steps that are done again."""
    folder = Path(row["folder"])
    notes = []
    for place in state.changed:
        number = 1
        while (aside := place.with_name(f"{place.name}.changed-{number}")).exists():
            number += 1
        place.rename(aside)
        notes.append(f"{place.name} was changed since it was written; it was kept as {aside.name}")
    RowRecord(row=row["row"], key=row["key"], facts=dict(row["facts"]), steps=state.done).save(folder)
    return notes


def _run(row: Mapping[str, Any], state: RowState, progress: Progress) -> list[Result]:
    """Every step with what became of it."""
    record = RowRecord(row=row["row"], key=row["key"], facts=dict(row["facts"]), steps=dict(state.done))
    found: list[Result] = []
    for name in steps_of(row):
        if name in state.done:
            found.append(_step(name, "unchanged", state.done[name].seconds, state.done[name].result))
            continue
        if any(step["status"] == "failed" and not step["step"].startswith(PACKAGE) for step in found):
            found.append(_not_run(name))
            continue
        start = time.monotonic()
        try:
            kind, _, server = name.partition(":")
            with using_hub(_hub_of(row), row["source"]), showing_downloads(progress):
                result = _STEPS[kind](row, server, progress)
            seconds = round(time.monotonic() - start, 3)
            record.steps[name] = DoneStep(seconds=seconds, result=result)
            record.save(Path(row["folder"]))
            found.append(_step(name, "done", seconds, result))
        except (Exception, SystemExit) as error:
            found.append(_failed(name, error, round(time.monotonic() - start, 3)))
    return found


def _hub_of(row: Mapping[str, Any]) -> HubOptions:
    return HubOptions(revision=row["revision"], subfolder=row["subfolder"])


def _step(name: str, status: str, seconds: float, result: Result | None = None, error: Result | None = None) -> Result:
    return {"step": name, "status": status, "seconds": seconds, "result": result, "error": error}


def _failed(name: str, error: BaseException, seconds: float) -> Result:
    kind, message, code = explained(error)
    return _step(name, "failed", seconds, error={"kind": kind, "message": message, "exit_code": code})


def _not_run(name: str) -> Result:
    return _step(name, "not run", 0.0)


def _export(row: Mapping[str, Any], server: str, progress: Progress) -> Result:
    from ...export.from_torch.export_model import ExportOptions, export_model
    from ..inputs.arrays import read_arrays

    options = ExportOptions(
        dtype=row["dtype"],
        opset=row["opset"],
        with_past=row["with_past"],
        attention=row["attention"],
        quantize=row["quantize"],
    )
    folder = Path(row["folder"]) / MODEL
    inputs = None if row["inputs"] is None else read_arrays(Path(row["inputs"]))
    made = export_model(
        row["source"],
        folder,
        options,
        target=row["target"],
        inputs=inputs,
        trust_remote_code=row["trust_remote_code"],
        progress=progress,
    )
    manifest = made.manifest
    kept = {name: manifest.get(name) for name in ("dtype", "opset", "notes")}
    kept |= {"hub": manifest["hub"]} if "hub" in manifest else {}
    return {"folder": MODEL, "bytes": _size(folder), "norms": len(manifest.get("sites", ())), **kept}


def _validate(row: Mapping[str, Any], server: str, progress: Progress) -> Result:
    from ..report.html import check_installed
    from ..validation.api import validate

    folder = Path(row["folder"])
    with_html = True
    try:
        check_installed()
    except EnvironmentMissingError:
        with_html = False
    report = validate(
        folder / MODEL,
        row["source"],
        lossy=row["lossy"],
        depth=with_html,
        trust_remote_code=row["trust_remote_code"],
        progress=progress,
    )
    if is_own_report(folder / REPORT):
        with new_file(folder / EARLIER, is_own_report) as partial:
            shutil.copyfile(folder / REPORT, partial)
    report.save(folder / REPORT)
    if with_html:
        report.to_html(folder / HTML)
    if report.verdict != "pass":
        kind: type[RmsnormDeployError] = MismatchError if report.verdict == "fail" else UnsupportedError
        raise kind(f"{report.summary} See {folder / (HTML if with_html else REPORT)}.")
    written = {"report": REPORT, "sha256": sha256(folder / REPORT), "html": HTML if with_html else None}
    return {"verdict": report.verdict, "summary": report.summary, **written}


def _package(row: Mapping[str, Any], server: str, progress: Progress) -> Result:
    from ..packaging.api import package_model

    progress(f"packaging for {server}")
    folder = Path(row["folder"])
    report = folder / REPORT if row["validate"] else None
    made = package_model(folder / MODEL, server, folder / server, name=row["row"], report=report)  # type: ignore[arg-type]
    return {"folder": server, "bytes": _size(folder / server), "validated": made.validated, "notes": made.notes}


_STEPS: dict[str, Callable[[Mapping[str, Any], str, Progress], Result]] = {
    EXPORT: _export, VALIDATE: _validate, PACKAGE: _package,
}  # fmt: skip


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
