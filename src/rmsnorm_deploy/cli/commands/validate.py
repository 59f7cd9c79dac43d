"""`rmsnorm validate`: compare a deployed model with PyTorch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from rmsnorm_deploy.cli import options, validation
from rmsnorm_deploy.cli.screen import Screen
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.validation.options import ValidationOptions


@validation.takes_options()
def validate(
    given: ValidationOptions,
    candidate: validation.Candidate = None,
    against: validation.Against = None,
    norms: Annotated[
        bool, typer.Option("--norms", help="Show every norm, every segment between norms, and the error by depth.")
    ] = False,
    html: validation.Html = None,
    junit: validation.Junit = None,
    output: validation.Output = None,
    replay: validation.Replay = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
) -> int:
    """Compare a deployed model with PyTorch.

    Both run on the same inputs. Every output, every norm alone on adversarial inputs, and every segment between two
    norms is compared with a float64 reference. Exits with 1 if anything is less accurate than PyTorch.
    """
    screen = Screen(as_json)
    files = validation.ReportFiles(html, junit, output)
    if replay is not None:
        return _again(replay, given, (candidate, against), files, screen, norms, trust_remote_code)
    sides = validation.sides(candidate, against, "validate")
    asked = dataclasses.replace(given, depth=norms or (html is not None and not given.outputs_only))
    return validation.run_validation(
        *sides, asked, files, screen, show_norms=norms, trust_remote_code=trust_remote_code
    )


def _again(
    replay: Path,
    given: ValidationOptions,
    sides: tuple[str | None, str | None],
    files: validation.ReportFiles,
    screen: Screen,
    show_norms: bool,
    trust_remote_code: bool,
) -> int:
    from rmsnorm_deploy.runtime.validation.replay import read_replay

    if any(sides) or given != ValidationOptions():
        raise UsageError("--replay reads the candidate and the options from the report; omit them.")
    before = read_replay(replay)
    return validation.run_validation(
        before.candidate,
        before.against,
        before.options,
        files,
        screen,
        show_norms=show_norms or before.options.bisect,
        trust_remote_code=trust_remote_code,
        before=before.report,
    )
