"""`rmsnorm bisect`: which norm, or which segment between two norms, introduces error."""

from __future__ import annotations

from rmsnorm_deploy.cli import options, validation
from rmsnorm_deploy.cli.screen import Screen


def bisect(
    candidate: validation.Candidate = None,
    against: validation.Against = None,
    dtype: validation.Dtype = None,
    provider: options.Provider = "cpu",
    seed: validation.Seed = 0,
    shape: validation.Shapes = None,
    inputs: validation.Inputs = None,
    prompt: validation.Prompts = None,
    tokenizer: validation.Tokenizer = None,
    window: validation.Window = None,
    html: validation.Html = None,
    junit: validation.Junit = None,
    output: validation.Output = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
) -> int:
    """Find the norm, or the segment between two norms, that introduces error.

    Each norm and each segment is fed what PyTorch has there, so that an error counts where it begins and not where it
    shows. Exits with 1 if there is one.
    """
    screen = Screen(as_json)
    validation.check_files(html, junit, output)
    sides = validation.sides(candidate, against, "bisect")
    shapes = validation.shapes_of(shape)
    from rmsnorm_deploy.runtime.validation.replay import ValidationRequest

    request = ValidationRequest(
        *sides, dtype=dtype, provider=provider, seed=seed, shapes=shapes, inputs=inputs, prompts=prompt or [],
        tokenizer=tokenizer, depth=True, window=window, bisect=True,
    )  # fmt: skip
    return validation.run_request(
        request, screen, html=html, junit=junit, output=output, show_norms=True, trust_remote_code=trust_remote_code
    )
