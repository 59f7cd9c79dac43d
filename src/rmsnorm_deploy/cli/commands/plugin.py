"""`rmsnorm plugin`: build the library of the TensorRT plugin, find it, and describe it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.screen import Screen, file_size

SCHEMA = "rmsnorm_deploy.plugin/1"

app = typer.Typer(
    help="Build, find and describe the TensorRT plugin's library.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("build")
def build(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="The folder to write to; the default one if omitted.",
            show_default=False,
        ),
    ] = None,
    tensorrt_include: Annotated[
        Path | None,
        typer.Option("--tensorrt-include", metavar="DIR", help="Folder of NvInferRuntime.h; searched for if omitted."),
    ] = None,
    nvcc: Annotated[
        Path | None, typer.Option("--nvcc", metavar="FILE", help="The CUDA compiler; searched for if omitted.")
    ] = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Compile the library, or list what is missing and where to get it."""
    from rmsnorm_deploy.plugins.tensorrt.library import build_library, read_library

    screen = Screen(as_json, quiet)
    with screen.working("building the plugin's library") as progress:
        files = build_library(output, tensorrt_include, nvcc, progress)
    info = read_library(files[0])
    payload = {"schema": SCHEMA, "files": [str(file) for file in files], **info.to_dict()}
    screen.result(payload, lambda: _print(screen, payload))


@app.command("path")
def path(as_json: options.AsJson = False) -> None:
    """Print the path of the library that builds use."""
    from rmsnorm_deploy.models.errors import EnvironmentMissingError
    from rmsnorm_deploy.plugins.tensorrt.library import LIBRARY_NAME, default_folder, find_library

    screen = Screen(as_json)
    found = find_library()
    if found is None:
        raise EnvironmentMissingError(
            f"the library is missing: expected {default_folder() / LIBRARY_NAME}. Build it with: rmsnorm plugin build"
        )
    payload = {"schema": SCHEMA, "path": str(found)}
    screen.result(payload, lambda: screen.line(payload["path"]))


@app.command("info")
def info(
    library: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="A library; the one that builds use if omitted.", show_default=False),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Describe a library: creators, versions, architectures."""
    from rmsnorm_deploy.plugins.tensorrt.library import LIBRARY_NAME, default_folder, find_library, read_library

    screen = Screen(as_json)
    place = library or find_library() or default_folder() / LIBRARY_NAME
    payload = {"schema": SCHEMA, "files": [str(place)], **read_library(place).to_dict()}
    screen.result(payload, lambda: _print(screen, payload))


def _print(screen: Screen, payload: dict[str, Any]) -> None:
    for file in payload["files"]:
        screen.line(f"{file}  {file_size(Path(file))}")
    screen.table(
        ("creator", "version", "namespace"),
        [(row["name"], row["version"], row["namespace"]) for row in payload["creators"]],
    )
    architectures = ", ".join(f"sm_{number}" for number in payload["generic_architectures"])
    screen.line(f"built with the headers of TensorRT {payload['tensorrt_headers']}")
    screen.line(f"generic kernel for {architectures}, and PTX for later GPUs")
    screen.line(f"NVRTC {payload['nvrtc']}" if payload["nvrtc"] else "NVRTC is not found: the generic kernel is used")
    if not payload["is_current"]:
        screen.line("Warning: this library was built for another version of rmsnorm-deploy; build it again.")
