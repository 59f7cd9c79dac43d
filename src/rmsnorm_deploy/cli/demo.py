"""`rmsnorm demo`: the shipped checkpoint through all targets, with its parity and its task accuracy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.export import details_of
from rmsnorm_deploy.cli.norms import print_deviations
from rmsnorm_deploy.cli.screen import Screen

if TYPE_CHECKING:
    from torch import nn

    from rmsnorm_deploy.export.exporter import ExportResult
    from rmsnorm_deploy.models.addition import Problem, TaskAccuracy

SCHEMA = "rmsnorm_deploy.demo/1"
MODEL = "builtin:addition"
_PROBLEMS = 1000


def demo(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Keep the exported folders; left out, they are removed."),
    ] = None,
    as_json: options.AsJson = False,
) -> int:
    """Take a small trained model through every target.

    It is exported in each, run in ONNX Runtime and held against PyTorch, in its numbers and in the sums it gets right.
    """
    screen = Screen(as_json)
    with screen.working(f"loading {MODEL}") as say, _folder(output) as folder:
        payload = _proved(folder, say)
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


def _proved(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Export, run and judge everything."""
    from rmsnorm_deploy.export.exporter import export_model
    from rmsnorm_deploy.export.lowerings import TARGETS
    from rmsnorm_deploy.models.addition import accuracy, problems, torch_step
    from rmsnorm_deploy.models.loading import load_model

    loaded = load_model(MODEL)
    results = export_model(loaded.model, folder, target=TARGETS, details=details_of(loaded), progress=say)
    asked = problems(_PROBLEMS)
    say(f"asking PyTorch {_PROBLEMS} sums")
    own = accuracy(torch_step(loaded.model), asked)
    rows = [_target_row(result, loaded.model, asked, own, say) for result in results]
    return {
        "schema": SCHEMA,
        "model": MODEL,
        "verdict": "pass" if all(row["verdict"] == "pass" for row in rows) else "fail",
        "problems": own.total,
        "pytorch_accuracy": own.fraction,
        "pytorch_correct": own.correct,
        "targets": rows,
    }


def _target_row(
    result: ExportResult, model: nn.Module, asked: list[Problem], own: TaskAccuracy, say: Callable[[str], None]
) -> dict[str, Any]:
    from rmsnorm_deploy.models.addition import accuracy
    from rmsnorm_deploy.runtime.exported import open_exported
    from rmsnorm_deploy.runtime.ort_runner import OrtRunner
    from rmsnorm_deploy.runtime.validate import validate

    report = validate(result.folder, model, progress=lambda text: say(f"{result.target}: {text}"))
    say(f"{result.target}: asking it {len(asked)} sums")
    with OrtRunner(open_exported(result.folder).model) as runner:
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


def _print(screen: Screen, payload: dict[str, Any]) -> None:
    """The parity table: the worst figures of each file over all its runs, and its task accuracy."""
    total = payload["problems"]
    every = [output for row in payload["targets"] for output in row["outputs"]]
    sums = f"{payload['pytorch_correct']} of {total}"
    rows = [("PyTorch", "-", "-", *_worst(every, "yardstick_figures"), sums)]
    for row in payload["targets"]:
        sums = f"{row['correct']} of {total}"
        rows.append(("ONNX Runtime", row["target"], row["parity"], *_worst(row["outputs"], "figures"), sums))
    screen.table(("runs in", "form", "parity", "max error/row RMS", "mean ULP", "cosine", "sums right"), rows)
    screen.line("errors against PyTorch in float64")
    for row in payload["targets"]:
        print_deviations(screen, row["deviations"])
    screen.line(f"verdict: {payload['verdict']}")


def _worst(outputs: list[dict[str, Any]], kind: str) -> tuple[str, str, str]:
    figures = [output[kind] for output in outputs if output[kind]]
    if not figures:
        return "-", "-", "-"
    largest, mean = (max(float(f[key]) for f in figures) for key in ("max_rel_row", "mean_ulp"))
    return f"{largest:.3g}", f"{mean:.3g}", f"{min(float(f['cosine']) for f in figures):.9f}"
