"""`rmsnorm compare`: compare arrays with reference arrays, or a report with an earlier one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.screen import Screen
from rmsnorm_deploy.runtime.report.printed import print_comparison

_LIMIT = "X|NAME:X"


def compare(
    reference: Annotated[
        Path,
        typer.Argument(
            metavar="REFERENCE", help="Arrays (.npz, .safetensors), or a report (.json).", show_default=False
        ),
    ],
    candidate: Annotated[
        Path,
        typer.Argument(metavar="CANDIDATE", help="The arrays or the report to compare with it.", show_default=False),
    ],
    atol: Annotated[
        list[str] | None,
        typer.Option(
            "--atol",
            metavar=_LIMIT,
            help="Allow errors of X + rtol x |reference|, in every array or in NAME; may be repeated.",
        ),
    ] = None,
    rtol: Annotated[
        list[str] | None, typer.Option("--rtol", metavar=_LIMIT, help="See --atol; relative to the reference.")
    ] = None,
    ulp: Annotated[
        list[str] | None, typer.Option("--ulp", metavar=_LIMIT, help="Allow errors of X ULPs; see --atol.")
    ] = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> int:
    """Compare arrays with reference arrays, or a report with an earlier one.

    Exits with 1 if an array differs, or if a row that passed before fails or is missing.
    """
    screen = Screen(as_json, quiet)
    from rmsnorm_deploy.runtime.accuracy.tolerances import parse_limits
    from rmsnorm_deploy.runtime.report.compare import compare as compare_files

    limits = parse_limits(atol or (), rtol or (), ulp or ())
    with screen.working(f"comparing {reference} and {candidate}"):
        result = compare_files(reference, candidate, limits)
    content = result.to_dict()
    screen.result(content, lambda: print_comparison(screen, content))
    return 0 if result.passed else 1
