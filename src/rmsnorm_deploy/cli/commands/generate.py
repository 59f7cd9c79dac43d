"""`rmsnorm generate`: continue a prompt with an exported decoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.screen import Screen
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.inputs.arrays import read_arrays

if TYPE_CHECKING:
    from rmsnorm_deploy.runtime.generate import Generation

SCHEMA = "rmsnorm_deploy.generate/1"


def generate(
    path: Annotated[
        Path, typer.Argument(metavar="DIR", help="An exported decoder, or an engine of one.", show_default=False)
    ],
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="The text to continue.")] = None,
    prompt_ids: Annotated[
        str | None, typer.Option("--prompt-ids", metavar="1,2,3", help="The prompt as token ids, without a tokenizer.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Maximum number of new tokens.")
    ] = 32,
    inputs: Annotated[
        str | None,
        typer.Option(
            "--inputs",
            metavar="FILE",
            help="The images (pixel_values) or sounds (input_features) of the prompt: .npz or .safetensors.",
        ),
    ] = None,
    provider: options.Provider = "cpu",
    runner: options.Runner = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Continue a prompt with an exported decoder or its engine."""
    screen = Screen(as_json, quiet)
    wanted = _prompt(prompt, prompt_ids)
    given = read_arrays(Path(inputs)) if inputs is not None else None
    with screen.working(f"generating with {path}"):
        from rmsnorm_deploy.runtime.generate import generate as generate_tokens

        result = generate_tokens(
            path, wanted, max_new_tokens=max_new_tokens, provider=provider, runner=runner, inputs=given
        )
    screen.result(_payload(result), lambda: _print(screen, result), is_answer=True)


def _payload(result: Generation) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "text": result.text,
        "ids": result.ids,
        "prompt_ids": result.prompt_ids,
        "tokens_per_second": result.tokens_per_second,
        "with_past": result.with_past,
    }


def _print(screen: Screen, result: Generation) -> None:
    screen.line(result.text if result.text is not None else ",".join(map(str, result.ids)))
    cache = "with" if result.with_past else "without"
    screen.note(f"{len(result.ids)} new tokens, {result.tokens_per_second:.1f} tokens/s, {cache} KV cache")


def _prompt(text: str | None, ids: str | None) -> str | list[int]:
    if (text is None) == (ids is None):
        raise UsageError("expected either --prompt TEXT or --prompt-ids 1,2,3.")
    if text is not None:
        return text
    try:
        return [int(part) for part in str(ids).split(",")]
    except ValueError as error:
        raise UsageError(f"--prompt-ids: expected integers separated by commas, such as 1,2,3, got {ids!r}.") from error
