"""Generate text with an exported decoder in ONNX Runtime or TensorRT (`generate`, `generate_batch`, `Generator`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...models.errors import UsageError
from ..inputs.tokenizer import Tokenizer, has_tokenizer, load_tokenizer, token_ids
from ..runners.base import Array, ClosesOnExit
from .decoder import TextDecoder, vocabulary_of
from .loop import generated_ids, loop_over
from .open import open_decoder
from .reader import Reader
from .settings import generation_config
from .stream import stream_to

__all__ = ["Generation", "Generator", "Prompt", "generate", "generate_batch"]

# A text, the messages of a chat (`{"role": "user", "content": "..."}`), or token ids.
Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]


@dataclass(frozen=True, slots=True)
class Generation:
    """The result of a generation.

    Attributes:
        ids: the new token ids.
        prompt_ids: the token ids of the prompt.
        text: the new tokens as text, or None without a tokenizer.
        tokens_per_second: new tokens of all prompts of the batch divided by the time of all runs, prefill included.
        with_past: whether the KV cache was used.
        finish: `stop` if the model ended the text, `length` at the most new tokens.
    """

    ids: list[int]
    prompt_ids: list[int]
    text: str | None
    tokens_per_second: float
    with_past: bool
    finish: Literal["stop", "length"]


def generate(
    folder: str | Path,
    prompt: Prompt,
    *,
    max_new_tokens: int = 32,
    provider: str = "cpu",
    runner: str | None = None,
    inputs: Mapping[str, Array] | None = None,
    stream: Callable[[str], None] | None = None,
    seed: int | None = None,
    **settings: Any,
) -> Generation:
    """Continue a prompt, by default with the most likely token at each step.

    With a KV cache in the exported file, the prompt runs once and every further step runs one token; without a cache,
    every step runs the whole sequence. It ends at `max_new_tokens` or at the model's end-of-sequence token.

    Args:
        folder: an exported folder of a decoder, or an engine of one.
        prompt: text or the messages of a chat, which require a tokenizer in the folder, or token ids.
        max_new_tokens: at least 1.
        provider: ONNX Runtime's execution provider.
        runner: `ort`, `tensorrt` or `rtx`; see `open_model`. A model of several parts runs in ONNX Runtime.
        inputs: of a model that reads images or sounds, `pixel_values` or `input_features` of all of them in the
            prompt, in the exported size.
        stream: is called with each piece of the text as soon as it is known; requires a tokenizer.
        seed: of the random numbers of sampling; None draws others each time.
        settings: how the next token is chosen, by transformers' names: `do_sample`, `temperature`, `top_p`,
            `num_beams`, `stop_strings` and others; see `Settings`.

    Raises:
        UsageError: the folder, the prompt, a number or a setting is wrong.
        UnsupportedError: the model is not a decoder that reads `input_ids` and returns `logits`.
        EnvironmentMissingError: transformers is not installed, or ONNX Runtime or the provider is not.
    """
    with Generator(folder, provider=provider, runner=runner) as generator:
        return generator.generate(
            prompt, max_new_tokens=max_new_tokens, inputs=inputs, stream=stream, seed=seed, **settings
        )


def generate_batch(
    folder: str | Path,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 32,
    provider: str = "cpu",
    runner: str | None = None,
    seed: int | None = None,
    **settings: Any,
) -> list[Generation]:
    """Continue several prompts in one batch, which is padded on the left; see `generate`.

    Raises:
        RmsnormDeployError: as `generate`, and the file cannot be given padding or a batch of this size.
    """
    with Generator(folder, provider=provider, runner=runner) as generator:
        return generator.generate_batch(prompts, max_new_tokens=max_new_tokens, seed=seed, **settings)


class Generator(ClosesOnExit):
    """An exported decoder that is opened once for many generations; a context manager.

    A prompt that continues the last prompt and its result, as in a chat, is read from there.

    Args:
        folder: an exported folder of a decoder, or an engine of one.
        provider: ONNX Runtime's execution provider.
        runner: `ort`, `tensorrt` or `rtx`; see `open_model`.

    Raises:
        RmsnormDeployError: see `generate`.
    """

    def __init__(self, folder: str | Path, *, provider: str = "cpu", runner: str | None = None) -> None:
        self._where = str(folder)
        self._tokenizer: Tokenizer | None = None
        self._stack = ExitStack()
        self._model = self._stack.enter_context(open_decoder(folder, provider, runner))
        self._reader = Reader(self._model.decoder)

    def close(self) -> None:
        """Release the sessions and their memory."""
        self._stack.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 32,
        inputs: Mapping[str, Array] | None = None,
        stream: Callable[[str], None] | None = None,
        seed: int | None = None,
        **settings: Any,
    ) -> Generation:
        """Continue a prompt; see the function `generate`."""
        return self._generate([prompt], max_new_tokens, inputs or {}, stream, seed, settings)[0]

    def generate_batch(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int = 32, seed: int | None = None, **settings: Any
    ) -> list[Generation]:
        """Continue several prompts in one batch; see the function `generate_batch`."""
        if not prompts:
            raise UsageError("prompts: expected at least one, got none.")
        return self._generate(prompts, max_new_tokens, {}, None, seed, settings)

    def _generate(
        self,
        prompts: Sequence[Prompt],
        count: int,
        media: Mapping[str, Array],
        stream: Callable[[str], None] | None,
        seed: int | None,
        settings: Mapping[str, Any],
    ) -> list[Generation]:
        if count < 1:
            raise UsageError(f"max_new_tokens: expected at least 1, got {count}.")
        rows = [self._ids_of(prompt) for prompt in prompts]
        tokenizer = self._tokenizer if any(not _is_ids(prompt) for prompt in prompts) else None
        if stream is not None or settings.get("stop_strings") is not None:
            tokenizer = self._loaded_tokenizer("--stream and stop texts require a tokenizer")
        ends = self._model.ends
        end = min(ends, default=0)
        config = generation_config(self._model.folder, settings, count, ends, end)
        ids, mask = self._model.decoder.begin(*_padded(rows, end, self._model.decoder.pads_left), media)
        if not isinstance(self._model.decoder, TextDecoder):
            self._reader = Reader(self._model.decoder)  # equal tokens may stand for other images
        model = loop_over(self._reader, vocabulary_of(self._model.runner))
        start = time.perf_counter()
        with _seeded(seed):
            result = generated_ids(
                model, ids, mask, config,
                tokenizer=None if tokenizer is None else tokenizer.of_transformers,
                streamer=None if stream is None or tokenizer is None else stream_to(stream, tokenizer),
            )  # fmt: skip
        seconds = time.perf_counter() - start
        stops = settings.get("stop_strings") or ()
        made = [_ended(row[ids.shape[1] :].tolist(), ends, stops, tokenizer) for row in result]
        speed = sum(len(new) for new, _ in made) / seconds
        return [
            Generation(
                new, prompt, None if tokenizer is None else tokenizer.decode(new), speed, self._model.decoder.has_cache,
                "stop" if is_stopped else "length",
            )
            for prompt, (new, is_stopped) in zip(rows, made, strict=True)
        ]  # fmt: skip

    def _ids_of(self, prompt: Prompt) -> list[int]:
        if _is_ids(prompt):
            ids = token_ids(prompt)
        else:
            tokenizer = self._loaded_tokenizer("give the prompt as token ids: --prompt-ids 1,2,3")
            ids = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(prompt)  # type: ignore[arg-type]
        vocabulary = vocabulary_of(self._model.runner)
        wrong = [token for token in ids if token < 0 or (vocabulary is not None and token >= vocabulary)]
        if wrong:
            raise UsageError(f"prompt ids: expected ids in the model's vocabulary of {vocabulary} tokens, got {wrong}.")
        return ids

    def _loaded_tokenizer(self, otherwise: str) -> Tokenizer:
        if self._tokenizer is None:
            if self._model.folder is None or not has_tokenizer(self._model.folder):
                raise UsageError(f"{self._model.folder or self._where} contains no tokenizer; {otherwise}")
            self._tokenizer = load_tokenizer(self._model.folder)
        return self._tokenizer


def _is_ids(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and not (len(prompt) and isinstance(prompt[0], Mapping))


def _ended(
    ids: list[int], ends: Collection[int], stops: Sequence[str], tokenizer: Tokenizer | None
) -> tuple[list[int], bool]:
    """The tokens up to the first that ends a text or completes a stop text, and whether there is one.

    Behind it, a row of a batch has padding.
    """
    for place, token in enumerate(ids, start=1):
        if token in ends or (stops and tokenizer is not None and _has(tokenizer.decode(ids[:place]), stops)):
            return ids[:place], True
    return ids, False


def _has(text: str, stops: Sequence[str]) -> bool:
    return any(stop in text for stop in stops)


def _padded(rows: Sequence[Sequence[int]], padding: int, left: bool) -> tuple[Array, Array]:
    """The rows as one array, `[batch, length]`, int64, and its mask."""
    length = max(map(len, rows))
    ids = np.full((len(rows), length), padding, np.int64)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(length - len(row), None) if left else slice(None, len(row))
        ids[number, place], mask[number, place] = row, 1
    return ids, mask


def _seeded(seed: int | None) -> Any:
    """PyTorch's random numbers from a seed, within a block that leaves those outside as they were."""
    import torch

    scope = torch.random.fork_rng(devices=[])
    if seed is None:
        return scope
    stack = ExitStack()
    stack.enter_context(scope)
    torch.random.default_generator.manual_seed(seed)
    return stack
