"""`rmsnorm generate`: continue prompts with an exported decoder, or chat with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.screen import Screen
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.inputs.arrays import read_arrays

if TYPE_CHECKING:
    from rmsnorm_deploy.runtime.generation.api import Generation, Generator, Prompt

SCHEMA = "rmsnorm_deploy.generate/2"


def generate(
    path: Annotated[
        Path, typer.Argument(metavar="DIR", help="An exported decoder, or an engine of one.", show_default=False)
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="The text to continue; several are continued in one batch."),
    ] = None,
    prompt_ids: Annotated[
        list[str] | None,
        typer.Option("--prompt-ids", metavar="1,2,3", help="A prompt as token ids, without a tokenizer; repeatable."),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Give the prompt as a message of a user, by the model's chat template; without a prompt, read one "
            "message from each line of stdin.",
        ),
    ] = False,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="With --chat: the system message.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Maximum number of new tokens.")
    ] = 32,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text while it is generated.")] = False,
    sample: Annotated[
        bool,
        typer.Option(
            "--sample",
            help="Draw tokens at random, by default as the model's generation_config.json says, in place of the most "
            "likely one.",
        ),
    ] = False,
    temperature: Annotated[
        float | None, typer.Option("--temperature", metavar="T", help="Of sampling; implies --sample.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="K", help="Draw from the K most likely tokens; implies --sample.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p", metavar="P", help="Draw from the most likely tokens of this probability; implies --sample."
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option("--repetition-penalty", metavar="R", help="Above 1, tokens of the text become less likely."),
    ] = None,
    beams: Annotated[
        int | None, typer.Option("--beams", metavar="N", help="Search the most likely text with N beams.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Of sampling; makes it repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End behind this text; repeatable.")
    ] = None,
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
    """Continue prompts with an exported decoder or its engine, or chat with it."""
    screen = Screen(as_json, quiet)
    wanted = _prompts(prompt or [], prompt_ids or [], chat, system)
    _check(wanted, chat=chat, stream=stream, as_json=as_json, media=inputs)
    given = read_arrays(Path(inputs)) if inputs is not None else None
    settings = {
        "do_sample": sample or None, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "repetition_penalty": repetition_penalty, "num_beams": beams, "stop_strings": stop or None,
    }  # fmt: skip
    settings = {name: value for name, value in settings.items() if value is not None}
    common: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed, **settings}
    with screen.working(f"opening {path}"):
        from rmsnorm_deploy.runtime.generation.api import Generator

        generator = Generator(path, provider=provider, runner=runner)
    with generator:
        if not wanted:
            _chat(screen, generator, system, stream, common)
        elif stream:
            made = [generator.generate(wanted[0], inputs=given, stream=screen.piece, **common)]
            screen.line()
            _note(screen, made)
        else:
            with screen.working(f"generating with {path}"):
                made = (
                    generator.generate_batch(wanted, **common)
                    if len(wanted) > 1
                    else [generator.generate(wanted[0], inputs=given, **common)]
                )
            screen.result(_payload(made), lambda: _print(screen, made), is_answer=True)


def _prompts(texts: Sequence[str], ids: Sequence[str], chat: bool, system: str | None) -> list[Prompt]:
    """The prompts of the command line; none for a chat that reads messages from stdin."""
    if texts and ids:
        raise UsageError("expected either --prompt TEXT or --prompt-ids 1,2,3, got both.")
    if not texts and not ids and not chat:
        raise UsageError("expected either --prompt TEXT or --prompt-ids 1,2,3, got neither (--chat reads from stdin).")
    if ids and chat:
        raise UsageError("--chat: expected --prompt TEXT or no prompt, got --prompt-ids.")
    if system is not None and not chat:
        raise UsageError("--system: expected --chat with it.")
    if chat:
        return [[*_system(system), {"role": "user", "content": text}] for text in texts]
    return list(texts) if texts else [_ids(text) for text in ids]


def _check(wanted: Sequence[Prompt], *, chat: bool, stream: bool, as_json: bool, media: str | None) -> None:
    if stream and as_json:
        raise UsageError("--stream: expected it without --json, which prints the result at the end.")
    if stream and len(wanted) > 1:
        raise UsageError(f"--stream: expected one prompt, got {len(wanted)}.")
    if media is not None and len(wanted) != 1:
        raise UsageError(f"--inputs: expected one prompt, got {len(wanted) or 'none'}.")
    if chat and not wanted and as_json:
        raise UsageError("--json: expected --prompt with it, got a chat that reads messages from stdin.")


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"--prompt-ids: expected integers separated by commas, such as 1,2,3, got {text!r}."
        ) from error


def _system(text: str | None) -> list[dict[str, str]]:
    return [] if text is None else [{"role": "system", "content": text}]


def _chat(screen: Screen, generator: Generator, system: str | None, stream: bool, common: dict[str, Any]) -> None:
    """Answer each line of stdin, with all messages before it."""
    messages = _system(system)
    for text in _messages():
        messages.append({"role": "user", "content": text})
        give: Callable[[str], None] | None = screen.piece if stream else None
        made = generator.generate(messages, stream=give, **common)
        screen.line("" if stream else made.text or "")
        _note(screen, [made])
        messages.append({"role": "assistant", "content": made.text or ""})


def _messages() -> Any:
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if text := line.strip():
            yield text


def _payload(made: Sequence[Generation]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "generations": [
            {"text": result.text, "ids": result.ids, "prompt_ids": result.prompt_ids, "finish": result.finish}
            for result in made
        ],
        "tokens_per_second": made[0].tokens_per_second,
        "with_past": made[0].with_past,
    }


def _print(screen: Screen, made: Sequence[Generation]) -> None:
    for result in made:
        screen.line(result.text if result.text is not None else ",".join(map(str, result.ids)))
    _note(screen, made)


def _note(screen: Screen, made: Sequence[Generation]) -> None:
    cache = "with" if made[0].with_past else "without"
    count = sum(len(result.ids) for result in made)
    screen.note(f"{count} new tokens, {made[0].tokens_per_second:.1f} tokens/s, {cache} KV cache")
