"""`rmsnorm package`: write a folder that a server runs from an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.screen import Screen, file_size
from rmsnorm_deploy.models.errors import UsageError

if TYPE_CHECKING:
    from rmsnorm_deploy.runtime.packaging.api import Package

SCHEMA = "rmsnorm_deploy.package/1"


def package(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="An exported folder; for triton also an engine of TensorRT.", show_default=False
        ),
    ],
    server: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="SERVER",
            help="genai (onnxruntime-genai), triton, trtexec or ort-server.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="The folder to create.", show_default=False)
    ],
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="The model's name in the server.")] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="A JSON report of rmsnorm validate on DIR, which is added."),
    ] = None,
    weights: Annotated[
        str, typer.Option("--weights", metavar="<copy|link>", help="Whether files are copied, or hard-linked.")
    ] = "copy",
    max_batch: Annotated[
        int,
        typer.Option(
            "--max-batch",
            metavar="N",
            min=0,
            help="For triton: the most rows of a batch of several requests; 0: none.",
        ),
    ] = 8,
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            metavar="NAME",
            help="For triton: onnxruntime, python or tensorrt.",
            show_default="tensorrt for an engine, else onnxruntime",
        ),
    ] = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Write a folder that onnxruntime-genai, Triton Inference Server, trtexec or rmsnorm serve runs."""
    from rmsnorm_deploy.runtime.packaging.api import check_server, package_model

    screen = Screen(as_json, quiet)
    check_server(server)
    kind: Any = server
    if weights not in ("copy", "link"):
        raise UsageError(f"--weights: expected copy or link, got {weights!r}.")
    mode: Literal["copy", "link"] = "link" if weights == "link" else "copy"
    with screen.working(f"packaging {folder} for {server}"):
        chosen: Any = backend
        made = package_model(
            folder, kind, output, name=name, report=report, weights=mode, max_batch=max_batch, backend=chosen
        )
    payload = {
        "schema": SCHEMA, "folder": str(made.folder), "for": made.server, "name": made.name, "files": made.files,
        "validated": made.validated, "notes": made.notes,
    }  # fmt: skip
    screen.result(payload, lambda: _print(screen, made))


def _print(screen: Screen, made: Package) -> None:
    for file in made.files:
        screen.line(f"  {file} ({file_size(made.folder / file)})")
    for note in made.notes:
        screen.note(note)
    tested = "validated" if made.validated else "without a validation report"
    screen.line(f"{made.folder}: {made.name} for {made.server}, {tested}. Check it there with: rmsnorm verify")
