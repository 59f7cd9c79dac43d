"""Write a folder that a server runs from an exported folder (`package_model`)."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ...export.onnx_io.atomic_files import copy_or_link, new_folder
from ...export.onnx_io.manifest import read_manifest, write_manifest
from ...export.onnx_io.owned_files import MANIFEST
from ...export.onnx_io.verify import verify_folder
from ...models.errors import UnsupportedError, UsageError
from ..report.report_file import VALIDATE_SCHEMA, read_report
from .genai import FILE as GENAI
from .genai import genai_config, genai_notes
from .triton import FILE as TRITON
from .triton import Serving, triton_config
from .trtexec import FILE as SCRIPT
from .trtexec import BuildScript, build_script

Server = Literal["genai", "triton", "trtexec"]
REPORT = "report.json"
_VERSION = "1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Package:
    """A folder that was written for a server.

    Attributes:
        folder: the folder.
        server: what runs it.
        name: of the model there.
        files: its files, relative to it, in order.
        validated: the verdict of the validation report in it, or None without one.
        notes: remarks for the user.
    """

    folder: Path
    server: Server
    name: str
    files: list[str]
    validated: str | None
    notes: list[str]


def package_model(
    folder: str | os.PathLike[str],
    server: Server,
    output: str | os.PathLike[str],
    *,
    name: str | None = None,
    report: str | os.PathLike[str] | None = None,
    weights: Literal["copy", "link"] = "copy",
    max_batch: int = 8,
) -> Package:
    """Write a folder that a server runs, completely or not at all.

    It holds the model's files as they were exported, what the server must know of them, and a manifest with the hash of
    every file, so that `verify_folder` checks it on the machine that serves it; it is an exported folder too.

    Args:
        folder: an exported folder.
        server: `genai` (onnxruntime-genai), `triton` (a model repository of Triton Inference Server, with its ONNX
            Runtime backend), or `trtexec` (a script that builds an engine with TensorRT's own tool, and the plugin's
            library where the file needs it and it is built).
        output: the folder to create.
        name: of the model in the server; None is the exported folder's name.
        report: a JSON report of `validate` on this folder, which is added.
        weights: whether files are copied, or hard-linked where the file system can.
        max_batch: for `triton`, the most rows of a batch that it joins of several requests; 0 for no batches.

    Raises:
        UsageError: the folder is not as it was exported, lacks what the server needs, or the report is of another
            model; or the output cannot be written.
        UnsupportedError: the server cannot run such a model.
    """
    source = Path(folder).expanduser()
    check_server(server)
    manifest = read_manifest(source)
    if manifest.get("components"):
        raise UnsupportedError(
            f"{source}: expected one model, got several: {', '.join(manifest['components'])}. Package each of them, "
            f"such as {source / manifest['components'][0]}."
        )
    wanted = _checked_name(name if name is not None else source.resolve().name)
    if max_batch < 0:
        raise UsageError(f"max_batch: expected at least 0, got {max_batch}.")
    broken = [file for file in verify_folder(source) if file.problem is not None]
    if broken:
        raise UsageError(f"{source / broken[0].name}: {broken[0].problem}. Restore the file, or export again.")
    validated = None if report is None else _checked_report(Path(report), manifest, source)
    inner = f"{wanted}/{_VERSION}/" if server == "triton" else ""
    model = str(manifest.get("model", "model.onnx"))
    script = build_script(source, model) if server == "trtexec" else None
    texts = _texts(source, server, manifest, Serving(wanted, "onnxruntime", model, max_batch), script)
    notes = genai_notes(source) if server == "genai" else [] if script is None else list(script.notes)
    with new_folder(output) as place:
        hashes = _place_files(source, manifest, place, inner, weights, set(texts), notes)
        for path, text in texts.items():
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_text(text, encoding="utf-8")
        if script is not None:
            (place / SCRIPT).chmod((place / SCRIPT).stat().st_mode | 0o111)
            if script.library is not None:
                shutil.copyfile(script.library, place / script.library.name)
        if report is not None:
            shutil.copyfile(report, place / REPORT)
        record = {"for": server, "name": wanted, "validated": validated}
        written = write_manifest(place, _moved(manifest, inner, record), hashes)
    if validated is None:
        notes.append("no validation report is in it; add one with --report, from rmsnorm validate --json")
    return Package(Path(output), server, wanted, [*written["files"], MANIFEST], validated, notes)


def check_server(text: str) -> None:
    """Check the name of a server.

    Raises:
        UsageError: it names none.
    """
    if text not in get_args(Server):
        raise UsageError(f"for: expected one of {', '.join(get_args(Server))}, got {text!r}.")


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"name: expected letters, digits, '.', '-' and '_' that begin with a letter or digit, got {name[:80]!r}. "
            "Choose one with --name."
        )
    return name


def _checked_report(path: Path, manifest: Mapping[str, Any], source: Path) -> str:
    """The verdict of a report of this model."""
    content = read_report(path)
    if content["schema"] != VALIDATE_SCHEMA:
        raise UsageError(f"{path}: expected a report of rmsnorm validate, got one of {content['schema']}.")
    candidate = (content.get("provenance") or {}).get("candidate") or {}
    got = (candidate.get("model") or {}).get("sha256")
    expected = (manifest["files"].get(manifest.get("model", "model.onnx")) or {}).get("sha256")
    if got is None or got != expected:
        raise UsageError(
            f"{path}: expected a report on the model in {source} (sha256 {str(expected)[:12]}), got one on "
            f"{content.get('model')} (sha256 {str(got)[:12]}). Validate the folder again."
        )
    if content["verdict"] != "pass":
        raise UsageError(f"{path}: expected the verdict pass, got {content['verdict']!r}. Repair the model first.")
    return str(content["verdict"])


def _texts(
    source: Path, server: Server, manifest: Mapping[str, Any], serving: Serving, script: BuildScript | None
) -> dict[str, str]:
    """The server's own files, by their place in the folder."""
    match server:
        case "genai":
            return {GENAI: json.dumps(genai_config(source), indent=2) + "\n"}
        case "triton":
            return {f"{serving.name}/{TRITON}": triton_config(serving, manifest)}
        case "trtexec":
            assert script is not None
            return {SCRIPT: script.text}


def _place_files(
    source: Path,
    manifest: Mapping[str, Any],
    place: Path,
    inner: str,
    weights: Literal["copy", "link"],
    replaced: set[str],
    notes: list[str],
) -> dict[str, str | None]:
    """Copy or link the exported files; the model and its weights into the folder `inner`. Returns their hashes."""
    linked = set((manifest.get("weights") or {}).get("files") or {})
    hashes: dict[str, str | None] = {}
    copied = []
    for name, row in manifest["files"].items():
        if name in replaced:  # of the checkpoint, which had a configuration of its own
            continue
        target = place / (inner + name if _belongs_to_model(name, manifest, linked) else name)
        target.parent.mkdir(parents=True, exist_ok=True)
        file = Path(os.path.realpath(source / name))
        if not copy_or_link(file, target, weights):
            copied.append(name)
        if row.get("sha256") is not None:  # other weights are hashed here, for those who check the copy
            hashes[target.relative_to(place).as_posix()] = row["sha256"]
    missing = sorted(linked - set(manifest["files"]))
    if missing:
        raise UnsupportedError(
            f"{source}: its weights stay in the checkpoint's own files ({', '.join(missing[:3])}), which are not "
            "files of the export. Export with --weights copy or pack."
        )
    if weights == "link" and copied:
        notes.append(f"{', '.join(copied[:4])}: copied, because the file system cannot link to them")
    return hashes


def _belongs_to_model(name: str, manifest: Mapping[str, Any], linked: set[str]) -> bool:
    model = str(manifest.get("model", "model.onnx"))
    return name == model or name in linked or name.startswith(f"{model}.")


def _moved(manifest: Mapping[str, Any], inner: str, record: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the package: that of the export, with the places where its files are now."""
    content = {key: value for key, value in manifest.items() if key not in ("schema", "files")}
    content["package"] = record
    if inner:
        content["model"] = inner + str(manifest.get("model", "model.onnx"))
        if (manifest.get("weights") or {}).get("files"):
            files = {inner + name: row for name, row in manifest["weights"]["files"].items()}
            content["weights"] = {**manifest["weights"], "files": files}
    return content
