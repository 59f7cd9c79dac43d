"""`rmsnorm doctor`: show what this machine can run, and how to install what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.screen import Screen

if TYPE_CHECKING:
    from rmsnorm_deploy.runtime.doctor import Diagnosis

CANNOT_RUN = 4


def doctor(
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="TARGET", help="Exit with 4 if this machine cannot run this target."),
    ] = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> int:
    """Show what this machine can run and what is missing."""
    from rmsnorm_deploy.export.lowering.table import parse_target

    screen = Screen(as_json, quiet)
    if target is not None:
        target = parse_target(target)
    with screen.working("examining this machine") as progress:
        from rmsnorm_deploy.runtime.doctor import examine

        diagnosis = examine(progress)
    screen.result(diagnosis.to_dict(), lambda: _print(screen, diagnosis), is_answer=True)
    return 0 if target is None or diagnosis.can_run(target) else CANNOT_RUN


def _print(screen: Screen, diagnosis: Diagnosis) -> None:
    content = diagnosis.to_dict()
    screen.line(f"Python {content['python']} on {content['platform']}")
    versions = [(name, version or "not installed") for name, version in content["versions"].items()]
    screen.table(("package", "version"), versions)
    screen.line()
    screen.line("GPU: " + ("; ".join(content["gpus"]) or "none found"))
    screen.line("TensorRT for Python: " + (content["tensorrt"]["version"] or content["tensorrt"]["problem"]))
    screen.line(
        "TensorRT-RTX for Python: " + (content["tensorrt_rtx"]["version"] or content["tensorrt_rtx"]["problem"])
    )
    library, toolchain = content["plugin"]["library"], content["plugin"]["toolchain_problem"]
    get = toolchain or "build it with: rmsnorm plugin build"
    screen.line(f"TensorRT plugin's library: {library or f'missing; {get}'}")
    for name, provider in content["onnxruntime"]["providers"].items():
        screen.line(f"ONNX Runtime's provider {name}: {provider['problem'] or 'works'}")
    screen.line()
    _print_ways(screen, diagnosis)
    for warning in diagnosis.warnings:
        screen.line(f"Warning: {warning}")


def _print_ways(screen: Screen, diagnosis: Diagnosis) -> None:
    """Print what can run each target on this machine, then what is missing and how to install it, each once."""
    rows = [(target, *("yes" if way.possible else "no" for way in ways)) for target, ways in diagnosis.targets.items()]
    screen.table(("target", *(way.name for way in next(iter(diagnosis.targets.values())))), rows)
    missing: dict[str, list[str]] = {}
    commands: dict[str, list[str]] = {}
    for way in (way for ways in diagnosis.targets.values() for way in ways):
        for lines, texts in ((missing, way.missing), (commands, way.get)):
            for text in texts:
                lines[text] = list(dict.fromkeys([*lines.get(text, ()), way.name]))
    for title, lines in (("Missing:", missing), ("How to install it:", commands)):
        if lines:
            screen.line()
            screen.line(title)
        for text, users in lines.items():
            screen.line(f"  {text}  (for {', '.join(users)})")
