"""`rmsnorm doctor`: show what this machine can run, and how to install what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

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
    _print_driver(screen, content["driver"])
    for title, key in (("TensorRT", "tensorrt"), ("TensorRT-RTX", "tensorrt_rtx")):
        _print_product(screen, title, content[key])
    _print_plugin(screen, content["plugin"])
    for name, provider in content["onnxruntime"]["providers"].items():
        screen.line(f"ONNX Runtime's provider {name}: {provider['problem'] or 'works'}")
    screen.line()
    screen.line(f"target: {content['suited']['target'] or 'none'} ({content['suited']['reason']})")
    screen.line()
    _print_ways(screen, diagnosis)
    for warning in diagnosis.warnings:
        screen.line(f"Warning: {warning}")


def _print_driver(screen: Screen, driver: dict[str, Any]) -> None:
    cuda = f", for CUDA up to {driver['cuda']}" if driver["cuda"] else ""
    known = driver["version"] or ("of unknown version" if driver["cuda"] else "none found")
    screen.line(f"driver: {known}{cuda}")
    for gpu in driver["gpus"]:
        fits = ", ".join(
            f"{title} {'supports it' if gpu[key] else 'does not support it'}"
            for title, key in (("TensorRT", "tensorrt"), ("TensorRT-RTX", "tensorrt-rtx"))
        )
        screen.line(f"  {gpu['name']} ({gpu['architecture']}): {fits}")


def _print_product(screen: Screen, title: str, product: dict[str, Any]) -> None:
    about = f"{product['version']} ({product['kind']})" if product["version"] else product["problem"]
    if product["version"] is None and product["partial"]:
        about += f"; only {', '.join(product['partial'])}"
    screen.line(f"{title} for Python: {about}")
    if product["version"] is not None:
        names = ", ".join(creator["name"] for creator in product["creators"]) or "none"
        problem = f" ({product['registry_problem']})" if product["registry_problem"] else ""
        screen.line(f"  creators of the plugin's library in its registry: {names}{problem}")


def _print_plugin(screen: Screen, plugin: dict[str, Any]) -> None:
    if plugin["library"] is None:
        get = plugin["toolchain_problem"] or "build it with: rmsnorm plugin build"
        screen.line(f"TensorRT plugin's library: missing, expected {plugin['expected']}; {get}")
    else:
        state = "current" if plugin["is_current"] else "of another version, build it again: rmsnorm plugin build"
        about = plugin["problem"] or (
            f"{state}; TensorRT's headers {plugin['headers']}; "
            f"{'NVRTC ' + plugin['nvrtc'] if plugin['nvrtc'] else 'no NVRTC, so its generic kernel'}"
        )
        screen.line(f"TensorRT plugin's library: {plugin['library']} ({about})")
        names = ", ".join(creator["name"] for creator in plugin["creators"]) or "none"
        screen.line(f"  creators: {names} (namespace {plugin['namespace']}, version {plugin['version']})")
    other = plugin["registering"] or "missing"
    screen.line(f"  library that registers itself, for ONNX Runtime's TensorRT provider: {other}")
    python = f"available (NVRTC: {plugin['nvrtc_path'] or 'of the system'})" if plugin["python"] else "not available"
    screen.line(f"  plugins in Python: {python}")


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
