"""`rmsnorm validate`: compare a deployed model with PyTorch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmsnorm_deploy.cli import options, validation
from rmsnorm_deploy.cli.screen import Screen
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.validation.options import ValidationOptions

if TYPE_CHECKING:
    from rmsnorm_deploy.runtime.validation.replay import Replay


@options.takes_hub()
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
    allow_code: validation.AllowCode = False,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_missing: options.AllowMissing = None,
    allow_pickle: options.AllowPickle = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> int:
    """Compare a deployed model with PyTorch.

    Both run on the same inputs. Every output, every norm alone on adversarial inputs, and every segment between two
    norms is compared with a float64 reference. Exits with 1 if anything is less accurate than PyTorch, or
    than explicit limits or a profile (--lossy) allow.
    """
    screen = Screen(as_json, quiet)
    files = validation.ReportFiles(
        html, junit, output, {"--replay": replay, **validation.input_files(candidate, given)}
    )
    if replay is not None:
        if candidate or against or given != ValidationOptions():
            raise UsageError("--replay reads the candidate and the options from the report; omit them.")
        return _again(_read(replay, allow_code), files, screen, norms, trust_remote_code, allow_missing)
    candidate = validation.required(candidate, "validate")
    asked = dataclasses.replace(given, depth=norms or (html is not None and not given.outputs_only))
    return validation.run_validation(
        candidate,
        against,
        asked,
        files,
        screen,
        show_norms=norms,
        trust_remote_code=trust_remote_code,
        allow_missing=allow_missing,
        allow_code=allow_code,
    )


def _read(replay: Path, allow_code: bool) -> Replay:
    """Read the report; code that it names is only run if the user allows it, because anyone can write a report."""
    from rmsnorm_deploy.runtime.validation.replay import read_replay

    before = read_replay(replay)
    code = {} if allow_code else before.code()
    if code:
        named = ", ".join(f"{source} ({setting})" for setting, source in code.items())
        raise UsageError(
            f"{replay} names Python code that a replay would run: {named}. Read that code, and if you trust it, add "
            "--allow-code."
        )
    return before


def _again(
    before: Replay,
    files: validation.ReportFiles,
    screen: Screen,
    show_norms: bool,
    trust_remote_code: bool,
    allow_missing: list[str] | None,
) -> int:
    return validation.run_validation(
        before.candidate,
        before.against,
        before.options,
        files,
        screen,
        show_norms=show_norms or before.options.bisect,
        trust_remote_code=trust_remote_code,
        allow_missing=allow_missing,
        before=before.report,
    )
