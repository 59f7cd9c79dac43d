"""`rmsnorm validate`: hold a deployed model against PyTorch."""

from __future__ import annotations

from typing import Annotated

import typer

from rmsnorm_deploy.cli import options, validation
from rmsnorm_deploy.cli.screen import Screen
from rmsnorm_deploy.models.errors import UsageError


def validate(
    candidate: validation.Candidate = None,
    against: validation.Against = None,
    dtype: validation.Dtype = None,
    provider: options.Provider = "cpu",
    seed: validation.Seed = 0,
    shape: validation.Shapes = None,
    inputs: validation.Inputs = None,
    prompt: validation.Prompts = None,
    tokenizer: validation.Tokenizer = None,
    atol: validation.Atol = None,
    rtol: validation.Rtol = None,
    ulp: validation.Ulp = None,
    norms: Annotated[
        bool, typer.Option("--norms", help="Show every norm, every segment between norms, and errors along the depth.")
    ] = False,
    outputs_only: Annotated[
        bool, typer.Option("--outputs-only", help="Compare outputs only: quicker, and it sees less.")
    ] = False,
    window: validation.Window = None,
    html: validation.Html = None,
    junit: validation.Junit = None,
    output: validation.Output = None,
    replay: validation.Replay = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
) -> int:
    """Hold a deployed model against PyTorch.

    Both run on the same inputs. Every output, every norm alone on adversarial inputs, and everything between two norms
    is judged against a float64 truth. Exits with 1 if anything is less accurate than PyTorch.
    """
    screen = Screen(as_json)
    validation.check_files(html, junit, output)
    shapes = validation.shapes_of(shape)
    if replay is None:
        sides = validation.sides(candidate, against, "validate")
    elif any(
        (candidate, against, dtype, seed, shape, inputs, prompt, tokenizer, atol, rtol, ulp, outputs_only, window)
    ):
        raise UsageError("--replay takes what to run from the report; leave the other options and the candidate out.")
    from rmsnorm_deploy.runtime.validation.replay import ValidationRequest

    before = None
    if replay is not None:
        request, before = ValidationRequest.from_report(replay)
    else:
        request = ValidationRequest(
            *sides, dtype=dtype, provider=provider, seed=seed, shapes=shapes, inputs=inputs, prompts=prompt or [],
            tokenizer=tokenizer, atol=atol or [], rtol=rtol or [], ulp=ulp or [], outputs_only=outputs_only,
            depth=norms or (html is not None and not outputs_only), window=window,
        )  # fmt: skip
    return validation.run_request(
        request, screen, html=html, junit=junit, output=output, show_norms=norms or request.bisect,
        trust_remote_code=trust_remote_code, before=before,
    )  # fmt: skip
