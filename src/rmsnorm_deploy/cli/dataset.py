"""`rmsnorm run --dataset`: a model on the rows of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmsnorm_deploy.cli.screen import Screen
from rmsnorm_deploy.models.errors import UsageError

SCHEMA = "rmsnorm_deploy.dataset_run/1"


@dataclass(frozen=True, slots=True)
class DatasetOptions:
    """The options of `rmsnorm run` that concern a data set."""

    batch: int
    rows: int
    columns: tuple[str, ...]
    outputs: tuple[str, ...]
    tokenizer: str | None
    max_tokens: int | None
    ray: str | None
    worker: str | None


def run_on_dataset(
    path: Path, dataset: Path, output: Path, options: DatasetOptions, runner: str | None, provider: str, screen: Screen
) -> None:
    """Run, and print what was done."""
    from rmsnorm_deploy.runtime.dataset.run_dataset import run_dataset
    from rmsnorm_deploy.runtime.report.text import counted

    columns = dict(_pair(text) for text in options.columns)
    with screen.working(f"reading {dataset}") as progress:
        done = run_dataset(
            path, dataset, output, batch=options.batch, rows=options.rows, columns=columns, outputs=options.outputs,
            runner=runner, provider=provider, tokenizer=options.tokenizer, max_tokens=options.max_tokens,
            ray=options.ray, needs=_needs(options.worker), progress=progress,
        )  # fmt: skip
    payload = {
        "schema": SCHEMA, "output": str(done.output), "rows": done.rows, "parts": done.parts, "ran": done.ran,
        "seconds": done.seconds,
    }  # fmt: skip
    there = f", {done.parts - done.ran} were there" if done.ran < done.parts else ""
    what = f"{counted(done.rows, 'row')} in {counted(done.parts, 'file')}"
    line = f"{done.output}: {what}; {done.ran} run now{there}, in {done.seconds:.1f} s"
    screen.result(payload, lambda: screen.line(line))


def _pair(text: str) -> tuple[str, str]:
    name, equals, column = text.partition("=")
    if not (name and equals and column):
        raise UsageError(f"--column: expected INPUT=COLUMN, got {text!r}.")
    return name, column


def _needs(text: str | None) -> Any:
    """What a worker occupies, of a text such as cpus=4,gpus=1."""
    from rmsnorm_deploy.runtime.cluster.calls import Needs

    found: dict[str, float] = {}
    for part in (text or "").split(",") if text else []:
        name, _, number = part.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1
        if name not in Needs.__slots__ or not 0 <= value < float("inf"):
            names = ", ".join(f"{known}=N" for known in Needs.__slots__)
            raise UsageError(f"--worker: expected some of {names} with commas between, got {part!r}.")
        found[name] = value
    return Needs(**found)
