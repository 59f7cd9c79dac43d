"""Write a folder that a server runs from an exported folder or an engine (`package_model`)."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ...export.onnx_io.atomic_files import copy_or_link, new_folder
from ...export.onnx_io.manifest import write_manifest
from ...export.onnx_io.owned_files import MANIFEST
from ...models.errors import UsageError
from ..engines.engine_file import is_engine
from ..inputs.exported import component_folders
from .contents import VERSION, Contents, Source, of_engine, of_folder, of_parts
from .genai import FILE as GENAI
from .genai import genai_config, genai_notes
from .ort_server import SCRIPT as SERVE
from .ort_server import server_texts
from .reports import REPORT, report_on
from .triton import ENGINE, Backend, add_triton
from .trtexec import FILE as BUILD
from .trtexec import build_script

Server = Literal["genai", "triton", "trtexec", "ort-server"]
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
    backend: Backend | None = None,
) -> Package:
    """Write a folder that a server runs, completely or not at all.

    It holds the model's files as they were exported, what the server must know of them, and a manifest with the hash of
    every file, so that `verify_folder` checks it on the machine that serves it; it is an exported folder too.

    Args:
        folder: an exported folder; for `triton` also an engine of TensorRT that `rmsnorm build` wrote, and the export
            of an encoder and its decoder, which become the models NAME-encoder and NAME-decoder of one repository.
        server: `genai` (onnxruntime-genai); `triton` (a model repository of Triton Inference Server, with a script that
            starts it); `trtexec` (a script that builds an engine with TensorRT's own tool, and the plugin's library
            where the file needs it and it is built); or `ort-server` (a script that serves the folder with `rmsnorm
            serve`).
        output: the folder to create.
        name: of the model in the server; None is the exported folder's name.
        report: a JSON report of `validate` on this folder or engine, which is added.
        weights: whether files are copied, or hard-linked where the file system can.
        max_batch: for `triton`, the most rows of a batch that it joins of several requests; 0 for no batches.
        backend: for `triton`, what runs the model there: `onnxruntime`, `python` (the runners of this package, which
            must be installed there), or `tensorrt`; None is `tensorrt` for an engine, else `onnxruntime`.

    Raises:
        UsageError: the folder is not as it was exported, lacks what the server needs, or the report is of another
            model; or the output cannot be written.
        UnsupportedError: the server cannot run such a model.
    """
    source = Path(folder).expanduser()
    check_server(server)
    if max_batch < 0:
        raise UsageError(f"max_batch: expected at least 0, got {max_batch}.")
    chosen = _checked_backend(backend, server, is_engine(source))
    given = source.resolve().name if not is_engine(source) else source.stem
    wanted = _checked_name(name if name is not None else given)
    inner = f"{wanted}/{VERSION}/" if server == "triton" else ""
    if server == "triton" and component_folders(source):
        contents = of_parts(source, wanted)
    else:
        contents = of_engine(source, inner, ENGINE) if chosen == "tensorrt" else of_folder(source, inner)
    validated = None if report is None else _checked_report(Path(report), contents)
    _add_texts(contents, server, wanted, chosen, max_batch)
    contents.manifest["package"] = {"for": server, "name": wanted, "validated": validated}
    with new_folder(output) as place:
        hashes = _place_files(contents, place, weights)
        for path, text in contents.texts.items():
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_text(text, encoding="utf-8")
        for path in contents.scripts:
            (place / path).chmod((place / path).stat().st_mode | 0o111)
        if report is not None:
            shutil.copyfile(report, place / REPORT)
        written = write_manifest(place, contents.manifest, hashes)
    if validated is None:
        contents.notes.append("no validation report is in it; add one with --report, from rmsnorm validate --json")
    return Package(Path(output), server, wanted, [*written["files"], MANIFEST], validated, contents.notes)


def check_server(text: str) -> None:
    """Check the name of a server.

    Raises:
        UsageError: it names none.
    """
    if text not in get_args(Server):
        raise UsageError(f"for: expected one of {', '.join(get_args(Server))}, got {text!r}.")


def _checked_backend(backend: str | None, server: str, of_engine: bool) -> Backend:
    """The backend of Triton; of other servers `onnxruntime`, which then says nothing."""
    if backend is not None and (backend not in get_args(Backend) or server != "triton"):
        expected = f"one of {', '.join(get_args(Backend))}" if server == "triton" else f"none for {server}"
        raise UsageError(f"backend: expected {expected}, got {backend!r}.")
    if of_engine and server != "triton":
        raise UsageError(f"for: expected triton for an engine, got {server}. Package the folder it was built from.")
    if of_engine and backend in (None, "tensorrt"):
        return "tensorrt"
    if of_engine or backend == "tensorrt":
        what, other = ("an engine", "tensorrt") if of_engine else ("an exported folder", "onnxruntime or python")
        raise UsageError(
            f"backend: expected {other} for {what}, got {backend}. Build one with rmsnorm build, or name a folder."
        )
    return "python" if backend == "python" else "onnxruntime"


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"name: expected letters, digits, '.', '-' and '_' that begin with a letter or digit, got {name[:80]!r}. "
            "Choose one with --name."
        )
    return name


def _checked_report(path: Path, contents: Contents) -> str:
    """The verdict of a report of this model."""
    content = report_on(path, contents.hashes, contents.source)
    if content["verdict"] != "pass":
        raise UsageError(f"{path}: expected the verdict pass, got {content['verdict']!r}. Repair the model first.")
    return str(content["verdict"])


def _add_texts(contents: Contents, server: Server, name: str, backend: Backend, max_batch: int) -> None:
    """Add the server's own files."""
    match server:
        case "genai":
            contents.texts[GENAI] = json.dumps(genai_config(contents.source), indent=2) + "\n"
            contents.notes += genai_notes(contents.source)
        case "triton":
            for part, inner in (contents.parts or {name: contents}).items():
                add_triton(inner, part, backend, max_batch)
            for inner in contents.parts.values():
                contents.texts |= inner.texts
                contents.scripts |= inner.scripts
                contents.notes = list(dict.fromkeys([*contents.notes, *inner.notes]))
        case "trtexec":
            script = build_script(contents.source, contents.model)
            contents.texts[BUILD] = script.text
            contents.scripts.add(BUILD)
            contents.notes += script.notes
            if script.library is not None:
                contents.files[script.library.name] = Source(script.library, None)
        case "ort-server":
            contents.texts.update(server_texts())
            contents.scripts.add(SERVE)


def _place_files(contents: Contents, place: Path, weights: Literal["copy", "link"]) -> dict[str, str | None]:
    """Copy or link the files; returns the hashes that are known of them."""
    hashes: dict[str, str | None] = {}
    copied = []
    for name, source in contents.files.items():
        if name in contents.texts:  # of the checkpoint, which had a configuration of its own
            continue
        target = place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not copy_or_link(source.path, target, weights):
            copied.append(name)
        if source.sha256 is not None:  # other weights are hashed here, for those who check the copy
            hashes[name] = source.sha256
    if weights == "link" and copied:
        contents.notes.append(f"{', '.join(copied[:4])}: copied, because the file system cannot link to them")
    return hashes
