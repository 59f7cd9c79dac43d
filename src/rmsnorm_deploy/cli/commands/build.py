"""`rmsnorm build`: build a TensorRT engine from an exported folder or an .onnx file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.screen import Screen, file_size

if TYPE_CHECKING:
    from rmsnorm_deploy.runtime.tensorrt.build import Engine
    from rmsnorm_deploy.runtime.tensorrt.options import BuildOptions
    from rmsnorm_deploy.runtime.tensorrt.process import Progress

SCHEMA = "rmsnorm_deploy.build/1"
TRTEXEC_SCHEMA = "rmsnorm_deploy.trtexec/1"


def build(
    source: options.Exported,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="ENGINE",
            help="The engine's file; ENGINE.json and ENGINE.log are written beside it.",
        ),
    ] = None,
    runtime: Annotated[
        str, typer.Option("--runtime", metavar="NAME", help="tensorrt, or rtx, which builds without a GPU.")
    ] = "rtx",
    profile: Annotated[
        list[str] | None,
        typer.Option(
            "--profile",
            metavar="NAME:MIN,OPT,MAX",
            help="Shapes of an input, such as input_ids:1x1,4x512,16x4096, or a range of a dim, such as "
            "past_sequence:0,128,4095. Separate shapes of one profile by spaces or semicolons. The other inputs "
            "are derived from the names of their dims. Repeat the option for several profiles.",
        ),
    ] = None,
    norm: Annotated[
        str,
        typer.Option(
            "--norm",
            metavar="CHOICE",
            help="auto: as in the file; plugin: every norm runs in the plugin; native: none does.",
        ),
    ] = "auto",
    plugin: Annotated[
        str,
        typer.Option(
            "--plugin", metavar="KIND", help="library (C++), python, or auto: the library if it exists, else python."
        ),
    ] = "auto",
    plugin_library: Annotated[
        Path | None,
        typer.Option("--plugin-library", metavar="FILE", help="The plugin's library; see `rmsnorm plugin path`."),
    ] = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(
            "--arch", metavar="SM", help="GPU architectures to build for, such as sm_86,sm_89; only with --runtime rtx."
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", metavar="DIR", help="Folder of earlier engines; an equal engine is not built again."),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            "--timing-cache",
            metavar="FILE",
            help="File of kernel timings that TensorRT reads and writes; not with --runtime rtx.",
        ),
    ] = None,
    workspace: Annotated[
        int | None, typer.Option("--workspace", metavar="MIB", min=1, help="Memory limit of one layer at run time.")
    ] = None,
    memory_limit: Annotated[
        int | None,
        typer.Option("--memory-limit", metavar="MIB", min=1, help="Stop the build when it uses more memory."),
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Build an engine that later versions of TensorRT can load.")
    ] = False,
    refit: Annotated[bool, typer.Option("--refit", help="Build an engine whose weights can be replaced.")] = False,
    float64_as_float32: Annotated[
        bool, typer.Option("--float64-as-float32", help="Compute the float64 values of the file in float32.")
    ] = False,
    print_trtexec: Annotated[
        bool,
        typer.Option("--print-trtexec", help="Print the equivalent trtexec command, and build nothing."),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Write all messages of TensorRT to the log.")] = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Build a TensorRT engine and show which layer runs each norm."""
    from rmsnorm_deploy.models.errors import UsageError
    from rmsnorm_deploy.runtime.tensorrt.build import build_engine
    from rmsnorm_deploy.runtime.tensorrt.options import BuildOptions

    screen = Screen(as_json, quiet)
    chosen = BuildOptions(
        runtime=runtime,  # type: ignore[arg-type]
        profiles=tuple(profile or ()),
        norm=norm,  # type: ignore[arg-type]
        plugin=plugin,  # type: ignore[arg-type]
        plugin_library=None if plugin_library is None else str(plugin_library),
        architectures=tuple(arch or ()),  # type: ignore[arg-type]
        timing_cache=None if timing_cache is None else str(timing_cache.expanduser().absolute()),
        workspace=workspace,
        memory_limit=memory_limit,
        float64_as_float32=float64_as_float32,
        version_compatible=version_compatible,
        refit=refit,
        verbose=verbose,
    )
    if print_trtexec:
        _print_trtexec(screen, source, output, chosen)
        return
    if output is None or not str(output).strip():
        raise UsageError("-o: expected the engine's file, such as -o model.engine.")
    with _progress(screen, f"building {source}") as tell:
        engine = build_engine(source, output, chosen, cache=cache, progress=tell)
    payload = payload_of(engine)
    screen.result(payload, lambda: _print(screen, payload))


def _print_trtexec(screen: Screen, source: Path, output: Path | None, chosen: BuildOptions) -> None:
    from rmsnorm_deploy.runtime.tensorrt.plan import plan_build
    from rmsnorm_deploy.runtime.tensorrt.trtexec import shell_line, trtexec_command

    with screen.working(f"reading {source}"), plan_build(source, chosen, elsewhere=True) as plan:
        words = trtexec_command(plan, str(output or "model.engine"))
    payload = {"schema": TRTEXEC_SCHEMA, "command": words}
    screen.result(payload, lambda: screen.line(shell_line(words)), is_answer=True)


def payload_of(engine: Engine) -> dict[str, Any]:
    """An engine as JSON values."""
    record = engine.record
    return {
        "schema": SCHEMA,
        "engine": str(engine.path),
        "record": str(engine.record_file),
        "log": str(engine.log),
        "from_cache": engine.from_cache,
        **{key: record[key] for key in _SHOWN},
    }


_SHOWN = (
    "bytes", "runtime", "architectures", "gpu", "norm", "plugin", "plugin_layers", "norms", "layer_source", "kernels",
    "profiles", "warnings", "seconds",
)  # fmt: skip


@contextmanager
def _progress(screen: Screen, first: str) -> Iterator[Callable[[Progress], None]]:
    """Show a progress bar for each phase of the build on a terminal, else a line for each phase."""
    with screen.working(first) as show:
        seen: set[str] = set()

        def tell(progress: Progress) -> None:
            if screen.is_live and progress.steps:
                done = 20 * (progress.step or 0) // progress.steps
                bar = "#" * done + "-" * (20 - done)
                show(f"{progress.phase} [{bar}] {progress.step} of {progress.steps}")
            elif progress.phase not in seen:
                seen.add(progress.phase)
                show(progress.phase)

        yield tell


def _print(screen: Screen, payload: dict[str, Any]) -> None:
    runtime, engine = payload["runtime"], Path(payload["engine"])
    where = ", ".join(payload["architectures"]) + (f" ({payload['gpu']})" if payload["gpu"] else "")
    screen.line(f"{engine}  {file_size(engine)}, {runtime['title']} {runtime['version']}, for {where}")
    print_norms(screen, payload)
    for number, profile in enumerate(payload["profiles"]):
        screen.line(f"profile {number}: {_shapes(profile)}")
    for text in payload["warnings"]:
        screen.line(f"TensorRT warns: {text}")
    screen.line(f"log: {payload['log']}")


def print_norms(screen: Screen, payload: dict[str, Any]) -> None:
    """Print the table of norms and layers, and where the layers were read from."""
    norms = payload["norms"]
    if not norms:
        screen.line("No RMSNorm was found in the file.")
        return
    screen.table(
        ("norm", "form", "run by", "precision", "statistics", "layer"),
        [
            (
                row["path"],
                row["form"],
                "plugin" if row["plugin"] else (row["kind"] or "unknown"),
                row["precision"] or "unknown",
                row["statistics"] or "unknown",
                row["layer"] or "none found",
            )
            for row in norms
        ],
    )
    plugin = payload["plugin"]
    named = f", {plugin['library']}" if plugin["library"] else ""
    screen.line(f"plugin layers: {payload['plugin_layers']} of {len(norms)} norms (plugin: {plugin['kind']}{named})")
    screen.line(f"why: {plugin['reason']}; layers read from the {payload['layer_source']}")


def _shapes(profile: dict[str, list[list[int]]]) -> str:
    """The shapes of a profile, with inputs of equal shapes together: a KV cache has two for each layer."""
    names: dict[str, list[str]] = {}
    for name, shapes in profile.items():
        names.setdefault(", ".join("x".join(map(str, shape)) for shape in shapes), []).append(name)
    return "; ".join(
        f"{found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''} {shapes}"
        for shapes, found in names.items()
    )
