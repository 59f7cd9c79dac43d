"""Greedy text generation with an exported decoder in ONNX Runtime or TensorRT (`generate`)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..export.graph.cache_names import is_past
from ..export.graph.sizes import range_ends
from ..models.calling.rotary import RESTART_FIELD
from ..models.errors import UnsupportedError, UsageError
from .engines.api import ORT
from .generate_parts import with_parts
from .inputs.exported import Exported, component_folders, open_exported
from .inputs.synthetic import make_feeds
from .inputs.tokenizer import Tokenizer, end_tokens, has_tokenizer, load_tokenizer, token_ids
from .runners.base import Array, Runner
from .runners.decoding import open_decoding
from .tensorrt.on_demand import open_model

__all__ = ["Generation", "generate"]


@dataclass(frozen=True, slots=True)
class Generation:
    """The result of a generation.

    Attributes:
        ids: the new token ids.
        prompt_ids: the token ids of the prompt.
        text: the new tokens as text, or None without a tokenizer.
        tokens_per_second: new tokens divided by the time of all runs, prefill included.
        with_past: whether the KV cache was used.
    """

    ids: list[int]
    prompt_ids: list[int]
    text: str | None
    tokens_per_second: float
    with_past: bool


def generate(
    folder: str | Path,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 32,
    provider: str = "cpu",
    runner: str | None = None,
    inputs: Mapping[str, Array] | None = None,
) -> Generation:
    """Continue a prompt with the most likely token at each step.

    With a KV cache in the exported file, the prompt runs once and every further step runs one token; without a cache,
    every step runs the whole sequence. It ends at `max_new_tokens` or at the model's end-of-sequence token.

    Args:
        folder: an exported folder of a decoder, or an engine of one.
        prompt: text, which requires a tokenizer in the folder, or token ids.
        max_new_tokens: at least 1.
        provider: ONNX Runtime's execution provider.
        runner: `ort`, `tensorrt` or `rtx`; see `open_model`. A model of several parts runs in ONNX Runtime.
        inputs: of a model that reads images or sounds, `pixel_values` or `input_features` of all of them in the
            prompt, in the exported size.

    Raises:
        UsageError: the folder, the prompt or the number is wrong.
        UnsupportedError: the model is not a decoder that reads `input_ids` and returns `logits`.
        EnvironmentMissingError: the tokenizer requires transformers, or ONNX Runtime or the provider is not installed.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens: expected at least 1, got {max_new_tokens}.")
    parts = component_folders(folder)
    tokenizer = _tokenizer(Path(folder).expanduser(), parts) if isinstance(prompt, str) else None
    prompt_ids = tokenizer.encode(prompt) if isinstance(prompt, str) and tokenizer is not None else token_ids(prompt)
    if parts:
        if runner not in (None, ORT):
            raise UnsupportedError(f"{folder} holds several models, which run in ONNX Runtime only; omit --runner.")
        place = Path(folder).expanduser()
        ids, seconds = with_parts(place, parts, prompt_ids, inputs or {}, max_new_tokens, end_tokens(place), provider)
        text = tokenizer.decode(ids) if tokenizer is not None else None
        return Generation(ids, prompt_ids, text, len(ids) / seconds, True)
    if inputs:
        raise UsageError(
            f"{folder} reads text only, got {', '.join(inputs)} too. Export the model with example inputs that have "
            "images or sounds (--with-past --inputs)."
        )
    exported = open_exported(folder)
    with open_model(exported, runner, provider) as opened:
        _check_decoder(opened, exported, prompt_ids)
        start = time.perf_counter()
        piece = range_ends(exported.manifest).get("sequence", (1, None))[1]
        restart = exported.manifest.get(RESTART_FIELD)
        ends = end_tokens(exported.folder) | set(exported.end_tokens)
        ids = _greedy(opened, prompt_ids, max_new_tokens, ends, piece, restart)
        seconds = time.perf_counter() - start
    text = tokenizer.decode(ids) if tokenizer is not None else None
    return Generation(ids, prompt_ids, text, len(ids) / seconds, any(is_past(i.name) for i in opened.inputs()))


def _tokenizer(path: Path, parts: Mapping[str, Path]) -> Tokenizer:
    """The tokenizer of an exported folder, in the folder itself if it holds several models."""
    folder = path if parts else open_exported(path).folder
    if folder is None or not has_tokenizer(folder):
        raise UsageError(
            f"{folder or path.parent} contains no tokenizer; give the prompt as token ids: --prompt-ids 1,2,3"
        )
    return load_tokenizer(folder)


def _greedy(
    runner: Runner,
    prompt: list[int],
    count: int,
    ends: set[int],
    piece: int | None = None,
    restart: int | None = None,
) -> list[int]:
    """The new tokens after a prompt.

    A decoder with a cache reads the prompt in pieces of at most `piece` tokens, and all tokens again as soon as there
    are more than `restart`.
    """
    infos = runner.inputs()
    cached = any(is_past(info.name) for info in infos)
    all_ids, pending = list(prompt), list(prompt)
    decoding = open_decoding(runner)
    while True:
        part = pending[:piece] if cached else pending
        read = len(all_ids) - len(pending) + len(part)
        feeds = make_feeds(infos, 1, len(part), 0, vocabulary=1)
        feeds["input_ids"] = np.array([part], feeds["input_ids"].dtype)
        if "position_ids" in feeds:
            feeds["position_ids"] += read - len(part)
        if "attention_mask" in feeds:
            feeds["attention_mask"] = np.ones((1, read), feeds["attention_mask"].dtype)
        logits, pending = decoding.step(feeds), pending[len(part) :]
        if pending:
            continue
        token = int(logits[0].argmax())
        all_ids.append(token)
        if len(all_ids) - len(prompt) == count or token in ends:
            return all_ids[len(prompt) :]
        again = restart is not None and len(all_ids) == restart + 1
        pending = [token] if cached and not again else list(all_ids)
        if again:
            decoding.restart()


def _check_decoder(runner: Runner, exported: Exported, prompt: list[int]) -> None:
    inputs = {info.name for info in runner.inputs()}
    outputs = {info.name: info for info in runner.outputs()}
    if "input_ids" not in inputs or "logits" not in outputs or "decoder_input_ids" in inputs:
        raise UnsupportedError(
            f"{exported.model}: expected a decoder that reads input_ids and returns logits, got a model that reads "
            f"{', '.join(sorted(inputs))} and returns {', '.join(sorted(outputs))}."
        )
    shape = outputs["logits"].shape
    vocabulary = shape[-1] if shape else None
    wrong = [token for token in prompt if token < 0 or (isinstance(vocabulary, int) and token >= vocabulary)]
    if wrong:
        raise UsageError(f"prompt ids: expected ids in the model's vocabulary of {vocabulary} tokens, got {wrong}.")
