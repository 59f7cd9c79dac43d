"""`rmsnorm demo`: export the shipped checkpoint for all targets, and check parity and task accuracy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.screen import Screen
from rmsnorm_deploy.runtime.report.printed import print_deviations

if TYPE_CHECKING:
    from torch import nn

    from rmsnorm_deploy.export.from_torch.save import ExportResult
    from rmsnorm_deploy.models.builtin.addition_task import Problem, TaskAccuracy

SCHEMA = "rmsnorm_deploy.demo/1"
MODEL = "builtin:addition"
_PROBLEMS = 1000


def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Keep the exported folders here; by default they are deleted."
        ),
    ] = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> int:
    """Export and check a small trained model for every target.

    Each file runs in ONNX Runtime and is compared with PyTorch: the numbers, and the sums that it computes correctly.
    With TensorRT-RTX, or with TensorRT and a GPU, an engine is built from each file.
    """
    screen = Screen(as_json, quiet)
    with screen.working(f"loading {MODEL}") as progress, _folder(output) as folder:
        payload = _proved(folder, progress)
        if output is None:
            for row in payload["targets"]:
                row["folder"] = None
    screen.result(payload, lambda: _print(screen, payload))
    return 0 if payload["verdict"] == "pass" else 1


@contextmanager
def _folder(output: Path | None) -> Iterator[Path]:
    if output is not None:
        yield output
        return
    with tempfile.TemporaryDirectory(prefix="rmsnorm-demo-") as folder:
        yield Path(folder)


def _proved(folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """Export, run and check every target."""
    from rmsnorm_deploy.export.from_torch.export_model import export_model
    from rmsnorm_deploy.export.lowering.table import TARGETS
    from rmsnorm_deploy.models.builtin.addition_task import accuracy, problems, torch_step
    from rmsnorm_deploy.models.loading import load_model

    loaded = load_model(MODEL)
    results = export_model(loaded, folder, target=TARGETS, progress=progress)
    asked = problems(_PROBLEMS)
    progress(f"computing {_PROBLEMS} sums with PyTorch")
    own = accuracy(torch_step(loaded.model), asked)
    rows = [_target_row(result, loaded.model, asked, own, progress) for result in results]
    runtime, problem = _engine_runtime()
    for row in rows:
        row["engine"] = None if runtime is None else _engine_row(row, folder, runtime, progress)
        if row["engine"] is not None and row["engine"]["problem"] and row["engine"]["expected"]:
            row["verdict"] = "fail"
    return {
        "schema": SCHEMA,
        "model": MODEL,
        "verdict": "pass" if all(row["verdict"] == "pass" for row in rows) else "fail",
        "engines": {"runtime": runtime, "problem": problem},
        "problems": own.total,
        "pytorch_accuracy": own.fraction,
        "pytorch_correct": own.correct,
        "targets": rows,
    }


def _target_row(
    result: ExportResult, model: nn.Module, asked: list[Problem], own: TaskAccuracy, progress: Callable[[str], None]
) -> dict[str, Any]:
    from rmsnorm_deploy.models.builtin.addition_task import accuracy
    from rmsnorm_deploy.runtime.inputs.exported import open_exported
    from rmsnorm_deploy.runtime.runners.open import open_runner
    from rmsnorm_deploy.runtime.validation.api import validate

    report = validate(result.folder, model, progress=lambda text: progress(f"{result.target}: {text}"))
    progress(f"{result.target}: computing {len(asked)} sums")
    with open_runner(open_exported(result.folder).model) as runner:
        name = runner.inputs()[0].name
        answered = accuracy(lambda ids: next(iter(runner.run({name: ids}).values())), asked)
    return {
        "target": result.target,
        "folder": str(result.folder),
        "verdict": "pass" if report.verdict == "pass" and answered.correct >= own.correct else "fail",
        "parity": report.verdict,
        "accuracy": answered.fraction,
        "correct": answered.correct,
        "outputs": report.to_dict()["outputs"],
        "deviations": report.deviations,
    }


def _engine_runtime() -> tuple[str | None, str | None]:
    """The runtime to build engines with on this machine, or why none is built."""
    from rmsnorm_deploy.runtime.engines.api import FLAVORS, cuda_device, is_installed

    if is_installed("tensorrt") and cuda_device() is not None:
        return "tensorrt", None
    if is_installed("rtx"):
        return "rtx", None
    return None, f"no engine was built: TensorRT-RTX is not installed; install: {FLAVORS['rtx'].install}"


def _engine_row(row: dict[str, Any], folder: Path, runtime: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """Build the engine of one target; `expected` is whether the lowering table lists the runtime for it."""
    from rmsnorm_deploy.export.lowering.table import cell
    from rmsnorm_deploy.models.errors import RmsnormDeployError
    from rmsnorm_deploy.runtime.tensorrt.build import build_engine

    table_name = {"tensorrt": "tensorrt", "rtx": "tensorrt-rtx"}[runtime]
    expected = table_name in dict(cell(row["target"], "plain").runtimes)
    progress(f"{row['target']}: building an engine")
    try:
        engine = build_engine(row["folder"], folder / "engines" / f"{row['target']}.engine", runtime=runtime)
    except RmsnormDeployError as error:
        return {"expected": expected, "problem": str(error)}
    record = engine.record
    kept = {
        key: record[key] for key in ("runtime", "architectures", "plugin", "plugin_layers", "norms", "layer_source")
    }
    return {"expected": expected, "problem": None, **kept}


def _print_engines(screen: Screen, payload: dict[str, Any]) -> None:
    """Print what runs the norms of each engine."""
    screen.line()
    if payload["engines"]["problem"]:
        screen.line(payload["engines"]["problem"])
        return
    built = [(row["target"], row["engine"]) for row in payload["targets"] if not row["engine"]["problem"]]
    rows = []
    for target, engine in built:
        norms = engine["norms"]
        precisions = sorted({f"{norm['precision']} (statistics {norm['statistics']})" for norm in norms})
        found = sum(norm["layer"] is not None for norm in norms)
        title = f"{engine['runtime']['title']} {engine['runtime']['version']}"
        rows.append((title, target, len(norms), found, engine["plugin_layers"], "; ".join(precisions)))
    screen.table(("built with", "form", "norms", "with a layer", "plugin layers", "precision"), rows)
    for row in payload["targets"]:
        if row["engine"]["problem"]:
            screen.line(f"{row['target']}: not built: {row['engine']['problem']}")
    if built:
        screen.line(
            f"engines for {', '.join(built[0][1]['architectures'])}; built, not run, because running requires a GPU"
        )


def _print(screen: Screen, payload: dict[str, Any]) -> None:
    """Print the parity table: the worst figures of each file over all runs, and its task accuracy."""
    total = payload["problems"]
    every = [output for row in payload["targets"] for output in row["outputs"]]
    sums = f"{payload['pytorch_correct']} of {total}"
    rows = [("PyTorch", "-", "-", *_worst(every, "baseline_figures"), sums)]
    for row in payload["targets"]:
        sums = f"{row['correct']} of {total}"
        rows.append(("ONNX Runtime", row["target"], row["parity"], *_worst(row["outputs"], "figures"), sums))
    screen.table(("runs in", "form", "parity", "max error/row RMS", "mean ULP", "cosine", "sums right"), rows)
    screen.line("errors against PyTorch in float64")
    for row in payload["targets"]:
        print_deviations(screen, row["deviations"])
    _print_engines(screen, payload)
    screen.line(f"verdict: {payload['verdict']}")


def _worst(outputs: list[dict[str, Any]], kind: str) -> tuple[str, str, str]:
    figures = [output[kind] for output in outputs if output[kind]]
    if not figures:
        return "-", "-", "-"
    largest, mean = (max(float(f[key]) for f in figures) for key in ("max_rel_row", "mean_ulp"))
    return f"{largest:.3g}", f"{mean:.3g}", f"{min(float(f['cosine']) for f in figures):.9f}"
