"""`rmsnorm plugin`: build the library of the TensorRT plugin, find it, and describe it; compile one kernel."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.screen import Screen, file_size

SCHEMA = "rmsnorm_deploy.plugin/1"
KERNEL_SCHEMA = "rmsnorm_deploy.kernel/1"

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


@app.command("compile")
def compile_(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The new file to write.")],
    hidden: Annotated[int, typer.Option("--hidden", metavar="N", help="Elements that are normalized together.")],
    op: Annotated[str, typer.Option("--op", metavar="OP", help="rms_norm, or add_rms_norm.")] = "rms_norm",
    dtype: options.Dtype = "float16",
    arch: Annotated[
        str, typer.Option("--arch", metavar="ARCH", help="The GPU's architecture, such as sm_90 or 9.0.")
    ] = "sm_90",
    kind: Annotated[
        str, typer.Option("--kind", metavar="KIND", help="cubin for this architecture, or ptx for it and later ones.")
    ] = "cubin",
    epsilon: Annotated[
        float, typer.Option("--epsilon", metavar="X", help="The number added to the mean of squares.")
    ] = 1e-6,
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows", metavar="N", min=1, help="Choose the layout for this many rows.", show_default="any number"
        ),
    ] = None,
    driver: Annotated[
        str | None,
        typer.Option(
            "--driver", metavar="CUDA", help="Refuse PTX that a driver of this CUDA version, such as 12.8, cannot load."
        ),
    ] = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Compile one kernel with NVRTC into a file, and print its layout and its resources."""
    from rmsnorm_deploy.export.onnx_io.atomic_files import new_file
    from rmsnorm_deploy.export.onnx_io.destinations import check_new_file
    from rmsnorm_deploy.models.errors import UsageError
    from rmsnorm_deploy.plugins.kernel.compiler import check_driver, compile_kernel, nvrtc_version
    from rmsnorm_deploy.plugins.kernel.launch_config import choose
    from rmsnorm_deploy.plugins.kernel.norm_kernel import NormKernel
    from rmsnorm_deploy.plugins.tensorrt.images import known_architectures

    screen = Screen(as_json, quiet)
    check_new_file(output)
    architectures = known_architectures([arch])
    if len(architectures) != 1:
        raise UsageError(f"--arch: expected one architecture, got {arch}. Run the command once for each.")
    kernel = NormKernel(hidden, epsilon, op, dtype)  # type: ignore[arg-type]
    config = choose(kernel, rows, architectures[0])
    if driver is not None and kind == "ptx":
        check_driver(_cuda_version(driver))
    with screen.working("compiling the kernel"):
        compiled = compile_kernel(kernel, config, architectures[0], kind)  # type: ignore[arg-type]
    with new_file(output) as partial:
        partial.write_bytes(compiled.image)
    described = {name: value for name, value in dataclasses.asdict(compiled).items() if name != "image"}
    payload = {
        "schema": KERNEL_SCHEMA,
        "file": str(output),
        "bytes": len(compiled.image),
        **described,
        "nvrtc": ".".join(map(str, nvrtc_version())),
        "kernel": dataclasses.asdict(kernel),
        "layout": dataclasses.asdict(config),
    }
    screen.result(payload, lambda: _print_kernel(screen, payload))


def _cuda_version(text: str) -> tuple[int, int]:
    from rmsnorm_deploy.models.errors import UsageError

    major, _, minor = text.partition(".")
    if not (major.isdecimal() and (minor or "0").isdecimal()):
        raise UsageError(f"--driver: expected a CUDA version such as 12.8, as nvidia-smi prints it, got {text!r}.")
    return int(major), int(minor or 0)


def _print_kernel(screen: Screen, payload: dict[str, Any]) -> None:
    layout = payload["layout"]
    screen.line(f"{payload['file']}  {file_size(Path(payload['file']))}")
    screen.line(f"{payload['name']}, {payload['kind']} for sm_{payload['architecture']}, NVRTC {payload['nvrtc']}")
    screen.table(
        ("threads a row", "rows a block", "blocks a row", "vectors", "elements", "prefetch"),
        [[layout[name] for name in ("threads", "rows", "cluster", "vectors", "elements", "prefetch")]],
    )
    screen.table(
        ("registers", "shared memory", "stack", "spilled"),
        [(payload["registers"], *(f"{payload[f'{name}_bytes']} B" for name in ("shared", "stack", "spilled")))],
    )
    if payload["kind"] == "ptx":
        screen.line(f"its PTX is for drivers of CUDA {payload['nvrtc']} or later")


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
