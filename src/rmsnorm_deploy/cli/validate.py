"""`rmsnorm validate`: hold an exported model against PyTorch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.arrays import read_npz
from rmsnorm_deploy.cli.norms import print_deviations
from rmsnorm_deploy.cli.screen import Screen
from rmsnorm_deploy.models.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from rmsnorm_deploy.runtime.exported import Exported

_SHAPE = re.compile(r"([1-9]\d*)x([1-9]\d*)")


def validate(
    path: options.Exported,
    against: Annotated[
        str, typer.Option("--against", metavar="MODEL", help="The PyTorch model that was exported, as for export.")
    ],
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", help="Dtype to load MODEL in; the exported one when left out."),
    ] = None,
    provider: options.Provider = "cpu",
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the made-up inputs.")] = 0,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="BATCHxLENGTH",
            help="Size of a run, such as 3x33; may be given several times.",
            show_default="1x1, 1x7, 3x33",
        ),
    ] = None,
    atol: Annotated[
        float | None,
        typer.Option("--atol", metavar="X", help="With --rtol, a fixed limit in place of PyTorch's own error."),
    ] = None,
    rtol: Annotated[
        float | None, typer.Option("--rtol", metavar="X", help="See --atol; relative to the truth.")
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option("--inputs", metavar="FILE.npz", help="Inputs by name, in place of made-up ones.")
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
) -> int:
    """Hold an exported model against PyTorch.

    Both run on the same inputs, and every output is judged. Exits with 1 if one fails.
    """
    screen = Screen(as_json)
    shapes = [_parsed(text) for text in shape] if shape else None
    arrays = read_npz(inputs) if inputs is not None else None
    with screen.working(f"opening {path}") as say:
        from rmsnorm_deploy.runtime.exported import open_exported
        from rmsnorm_deploy.runtime.validate import validate as validate_model

        exported = open_exported(path)
        report = validate_model(
            path,
            _load(against, dtype, exported, trust_remote_code, say),
            provider=provider,
            shapes=shapes,
            seed=seed,
            atol=atol,
            rtol=rtol,
            inputs=arrays,
            progress=say,
        )
    content = report.to_dict()
    screen.result(content, lambda: print_report(screen, content))
    return 0 if report.verdict == "pass" else 1


def print_report(screen: Screen, report: dict[str, Any]) -> None:
    """The table of a validation report, the reasons of what failed, the deviations and the verdict."""
    columns = ("case", "output", "verdict", "max error/row RMS", "max ULP", "mean ULP", "cosine")
    screen.table(columns, [_row(row) for row in report["outputs"]])
    screen.line("errors against PyTorch in float64; in brackets those of PyTorch in the exported dtype")
    for row in report["outputs"]:
        if not row["passed"]:
            screen.line(f"{row['case']}, {row['name']}: {row['reason']}")
    print_deviations(screen, report["deviations"])
    screen.line(f"verdict: {report['verdict']}")


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    mine, theirs = row["figures"], row["yardstick_figures"]
    verdict = "pass" if row["passed"] else "fail"
    if mine is None:
        return row["case"], row["name"], verdict, "-", "-", "-", "-"
    pairs = (f"{float(mine[key]):.3g} ({float(theirs[key]):.3g})" for key in ("max_rel_row", "max_ulp", "mean_ulp"))
    return row["case"], row["name"], verdict, *pairs, f"{float(mine['cosine']):.9f}"


def _load(source: str, dtype: str | None, exported: Exported, trust: bool, say: Callable[[str], None]) -> nn.Module:
    """The model in the dtype asked for, or else in the one that was exported."""
    say(f"loading {source}")
    from rmsnorm_deploy.models.loading import load_model

    model = load_model(source, dtype=dtype, trust_remote_code=trust).model
    own = next((str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()), None)
    if dtype is not None or own is None or exported.dtype in (None, own):
        return model
    # Only now: casting a model to the dtype it has already would change one that mixes dtypes.
    return load_model(source, dtype=exported.dtype, trust_remote_code=trust).model


def _parsed(text: str) -> tuple[int, int]:
    match = _SHAPE.fullmatch(text.lower())
    if match is None:
        raise UsageError(f"--shape {text} is no batch and length; write them as 3x33, both at least 1.")
    return int(match[1]), int(match[2])
