"""`rmsnorm bisect`: find the norm, or the segment between two norms, that introduces error."""

from __future__ import annotations

import dataclasses

from rmsnorm_deploy.cli import options, validation
from rmsnorm_deploy.cli.screen import Screen
from rmsnorm_deploy.runtime.accuracy.tolerances import KINDS_OF_LIMITS
from rmsnorm_deploy.runtime.validation.options import ValidationOptions


@options.takes_hub()
@validation.takes_options(*KINDS_OF_LIMITS, "outputs_only")
def bisect(
    given: ValidationOptions,
    candidate: validation.Candidate = None,
    against: validation.Against = None,
    html: validation.Html = None,
    junit: validation.Junit = None,
    output: validation.Output = None,
    allow_code: validation.AllowCode = False,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_missing: options.AllowMissing = None,
    allow_pickle: options.AllowPickle = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> int:
    """Find the norm, or the segment between two norms, that introduces error.

    Each norm and each segment gets the inputs that it has in PyTorch, so that an error is reported where it is
    introduced. Exits with 1 if there is one.
    """
    screen = Screen(as_json, quiet)
    files = validation.ReportFiles(html, junit, output, validation.input_files(candidate, given))
    candidate = validation.required(candidate, "bisect")
    asked = dataclasses.replace(given, bisect=True)
    return validation.run_validation(
        candidate,
        against,
        asked,
        files,
        screen,
        show_norms=True,
        trust_remote_code=trust_remote_code,
        allow_missing=allow_missing,
        allow_code=allow_code,
    )
