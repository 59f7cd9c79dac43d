"""What each step of a row does (`STEPS`): export or rewrite, build, validate, package."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from ...export.onnx_io.atomic_files import new_file
from ...export.onnx_io.owned_files import is_own_report, sha256
from ...models.errors import (
    EnvironmentMissingError,
    MismatchError,
    RmsnormDeployError,
    UnsupportedError,
    UsageError,
    few,
)
from ..engines.api import ORT
from ..recipe.step_options import build_options, validation_options
from ..recipe.steps import BUILD, EXPORT, PACKAGE, REWRITE, TRITON, VALIDATE, kind_of, subject_of
from .row_record import ENGINE, MODEL, folder_name, report_name

Progress = Callable[[str], None]
Result = dict[str, Any]
Row = Mapping[str, Any]
Step = Mapping[str, Any]


def _export(row: Row, step: Step, progress: Progress) -> Result:
    """The model of PyTorch as an exported folder."""
    from ...export.from_torch.export_model import ExportOptions, export_model
    from ..inputs.arrays import read_arrays

    of_plugin = row["target"] == "plugin"
    options = ExportOptions(
        dtype=row["dtype"],
        opset=row["opset"],
        with_past=row["with_past"],
        attention=row["attention"],
        quantize=row["quantize"],
        dynamic=not row["static"],
        function=row["function"] or not of_plugin,
        ort_trt=row["ort_trt"] and of_plugin,
        **({} if row["weights"] is None else {"weights": row["weights"]}),
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
    return _written(folder, made.manifest)


def _rewrite(row: Row, step: Step, progress: Progress) -> Result:
    """The .onnx file for the row's target, proven where nothing else compares it."""
    from ..inputs.arrays import read_arrays
    from ..rewriting.rewrite_file import rewrite_model

    of_plugin = row["target"] == "plugin"
    folder = Path(row["folder"]) / MODEL
    made = rewrite_model(
        row["source"],
        folder,
        target=row["target"],
        opset=row["opset"],
        function=row["function"] or not of_plugin,
        ort_trt=row["ort_trt"] and of_plugin,
        weights=row["weights"],
        attention=row["attention"],
        inputs=None if row["inputs"] is None else read_arrays(Path(row["inputs"])),
        progress=progress,
    )
    manifest = made.manifest
    proof = manifest["proof"]
    if proof["verdict"] != "pass" and row["must_be_proven"]:
        raise UnsupportedError(
            f"{folder}: it was written, but not proven to compute the same: {proof['reason']}. Name the PyTorch model "
            "with against, or accept it with validate = false."
        )
    notes = [*manifest.get("notes", ()), *_left(manifest)]
    if proof["verdict"] != "pass":
        notes.append(f"the rewriting is {proof['verdict']}: {proof['reason']}")
    if row["against"] is None:
        notes.append("it was compared before and after the rewriting, not with PyTorch: add against = MODEL for that")
    return {**_written(folder, {**manifest, "notes": notes}), "proof": proof["verdict"], "reason": proof["reason"]}


def _left(manifest: Mapping[str, Any]) -> list[str]:
    """That norms of the file were not rewritten, or that it has none."""
    refusals = manifest.get("refusals") or []
    if not refusals and not manifest.get("sites"):
        return ["no norm was rewritten: expected RMSNorms in the file, got none"]
    if not refusals:
        return []
    first = refusals[0]
    names = few([str(row["node"] or row["path"]) for row in refusals])
    return [f"{len(refusals)} norms were left as they are ({names}); the reason of the first: {first['reason']}"]


def _written(folder: Path, manifest: Mapping[str, Any]) -> Result:
    kept = {name: manifest.get(name) for name in ("dtype", "opset", "notes")}
    kept |= {"hub": manifest["hub"]} if "hub" in manifest else {}
    return {"folder": folder.name, "bytes": _size(folder), "norms": len(manifest.get("sites", ())), **kept}


def _build(row: Row, step: Step, progress: Progress) -> Result:
    """An engine of the file."""
    from ..inputs.exported import component_folders
    from ..tensorrt.build import build_engine

    folder = Path(row["folder"])
    place = folder / folder_name(step)
    parts = component_folders(folder / MODEL)
    if parts:
        raise UnsupportedError(
            f"{folder / MODEL}: expected one model, got several: {', '.join(parts)}. Build each with rmsnorm build."
        )
    if place.exists() and not place.is_dir():
        raise UsageError(f"{place} exists and is not a folder; move it away, and ship again.")
    place.mkdir(exist_ok=True)
    engine = build_engine(
        folder / MODEL,
        place / ENGINE,
        build_options(row, step["subject"]),
        progress=lambda now: progress(f"{now.phase}{f' {now.step} of {now.steps}' if now.steps else ''}"),
    )
    record = engine.record
    kept = {name: record[name] for name in ("runtime", "architectures", "gpu", "plugin_layers", "layer_source")}
    notes = [f"TensorRT warns: {text}" for text in record["warnings"]]
    if step["subject"] not in row["runners"]:
        notes.append(f"{place.name}/{ENGINE} was not compared with PyTorch: rmsnorm validate {place / ENGINE}")
    return {"folder": place.name, "bytes": _size(place), "norms": len(record["norms"]), "notes": notes, **kept}


def _validate(row: Row, step: Step, progress: Progress) -> Result:
    """The file, or an engine, beside PyTorch; the report of the comparison before is kept."""
    from ..report.html import check_installed
    from ..validation.api import validate

    folder, runner = Path(row["folder"]), step["subject"]
    with_html = "html" in row["reports"]
    try:
        check_installed()
    except EnvironmentMissingError:
        with_html = False
    try:
        report = validate(
            folder / MODEL if runner == ORT else folder / runner / ENGINE,
            row["against"] or row["source"],
            validation_options(row, runner),
            depth=with_html and not row["outputs_only"],
            trust_remote_code=row["trust_remote_code"],
            progress=progress,
        )
    except EnvironmentMissingError as error:
        if runner == ORT:
            raise
        raise EnvironmentMissingError(f'{error} To ship without comparing engines, set runners = ["ort"].') from error
    path, html, xml = (folder / report_name(runner, suffix) for suffix in (".json", ".html", ".junit.xml"))
    if is_own_report(path):
        with new_file(folder / report_name(runner, ".before.json"), is_own_report) as partial:
            shutil.copyfile(path, partial)
    report.save(path)
    with_xml = "junit" in row["reports"]
    for place, is_wanted, write in ((html, with_html, report.to_html), (xml, with_xml, report.to_junit)):
        if is_wanted:
            write(place)
        elif is_own_report(place):
            place.unlink()  # of an earlier comparison
    if report.verdict != "pass":
        kind: type[RmsnormDeployError] = MismatchError if report.verdict == "fail" else UnsupportedError
        raise kind(f"{report.summary} See {html if with_html else path}.")
    written = {"report": path.name, "sha256": sha256(path), "html": html.name if with_html else None}
    return {"verdict": report.verdict, "summary": report.summary, **written}


def _package(row: Row, step: Step, progress: Progress) -> Result:
    """A folder for a server, of the file or of an engine, with the report on it."""
    from ..packaging.api import package_model

    folder, server = Path(row["folder"]), step["subject"]
    progress(f"packaging for {server}")
    engine = next((subject_of(name) for name in step["after"] if kind_of(name) == BUILD), None)
    is_validated = any(kind_of(name) == VALIDATE for name in step["after"])
    triton = {"backend": row["backend"], "max_batch": row["max_batch"]} if server == TRITON else {}
    made = package_model(
        folder / MODEL if engine is None else folder / engine / ENGINE,
        server,
        folder / folder_name(step),
        name=row["row"],
        report=folder / report_name(engine or ORT) if is_validated else None,
        **triton,
    )
    return {"folder": server, "bytes": _size(folder / server), "validated": made.validated, "notes": made.notes}


STEPS: Final[dict[str, Callable[[Row, Step, Progress], Result]]] = {
    EXPORT: _export, REWRITE: _rewrite, BUILD: _build, VALIDATE: _validate, PACKAGE: _package,
}  # fmt: skip


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
