"""Greedy text generation with an exported decoder in ONNX Runtime (`generate`)."""

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
from ..models.regular_files import read_json
from .generate_parts import with_parts
from .inputs.exported import Exported, component_folders, open_exported
from .inputs.synthetic import make_feeds, present_to_past
from .inputs.tokenizer import Tokenizer, has_tokenizer, load_tokenizer, token_ids
from .runners.base import Array, Runner
from .runners.open import open_runner

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
    inputs: Mapping[str, Array] | None = None,
) -> Generation:
    """Continue a prompt with the most likely token at each step.

    With a KV cache in the exported file, the prompt runs once and every further step runs one token; without a cache,
    every step runs the whole sequence. It ends at `max_new_tokens` or at the model's end-of-sequence token.

    Args:
        folder: an exported folder of a decoder.
        prompt: text, which requires a tokenizer in the folder, or token ids.
        max_new_tokens: at least 1.
        provider: ONNX Runtime's execution provider.
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
        place = Path(folder).expanduser()
        ids, seconds = with_parts(place, parts, prompt_ids, inputs or {}, max_new_tokens, _end_tokens(place), provider)
        text = tokenizer.decode(ids) if tokenizer is not None else None
        return Generation(ids, prompt_ids, text, len(ids) / seconds, True)
    if inputs:
        raise UsageError(
            f"{folder} reads text only, got {', '.join(inputs)} too. Export the model with example inputs that have "
            "images or sounds (--with-past --inputs)."
        )
    exported = open_exported(folder)
    with open_runner(exported.model, provider) as runner:
        _check_decoder(runner, exported, prompt_ids)
        start = time.perf_counter()
        piece = range_ends(exported.manifest).get("sequence", (1, None))[1]
        restart = exported.manifest.get(RESTART_FIELD)
        ids = _greedy(runner, prompt_ids, max_new_tokens, _end_tokens(exported.folder), piece, restart)
        seconds = time.perf_counter() - start
    text = tokenizer.decode(ids) if tokenizer is not None else None
    return Generation(ids, prompt_ids, text, len(ids) / seconds, any(is_past(i.name) for i in runner.inputs()))


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
    past: dict[str, Array] = {}
    while True:
        part = pending[:piece] if cached else pending
        read = len(all_ids) - len(pending) + len(part)
        feeds = make_feeds(infos, 1, len(part), 0, vocabulary=1)
        feeds["input_ids"] = np.array([part], feeds["input_ids"].dtype)
        if "position_ids" in feeds:
            feeds["position_ids"] += read - len(part)
        if "attention_mask" in feeds:
            feeds["attention_mask"] = np.ones((1, read), feeds["attention_mask"].dtype)
        feeds.update({name: value for name, value in past.items() if name in feeds})
        outputs = runner.run(feeds)
        past, pending = present_to_past(outputs), pending[len(part) :]
        if pending:
            continue
        token = int(outputs["logits"][0, -1].astype(np.float32).argmax())
        all_ids.append(token)
        if len(all_ids) - len(prompt) == count or token in ends:
            return all_ids[len(prompt) :]
        again = restart is not None and len(all_ids) == restart + 1
        pending = [token] if cached and not again else list(all_ids)
        past = {} if again else past


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


def _end_tokens(folder: Path | None) -> set[int]:
    """End-of-sequence ids, from generation_config.json or else config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name if folder is not None else None
        if path is None or not path.is_file():
            continue
        config = read_json(path, "Export the model again.")
        end = config.get("eos_token_id") if isinstance(config, dict) else None
        if end is not None:
            ids = end if isinstance(end, list) else [end]
            if not all(isinstance(number, int) for number in ids):
                raise UsageError(f"{path}: eos_token_id: expected a token id or a list of them, got {str(end)[:80]}.")
            return set(ids)
    return set()
