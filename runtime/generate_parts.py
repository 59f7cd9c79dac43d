"""Greedy generation with the parts of a model: an encoder and a decoder, or an encoder of images or sounds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ..export.graph.cache_names import is_past, present_to_past
from ..export.onnx_io.manifest import read_manifest
from ..models.calling.media_parts import EMBEDDING, IMAGES, MODALITIES, Modality
from ..models.calling.modalities import TOKEN_TYPES
from ..models.calling.parts import DECODER, ENCODER
from ..models.dtypes import numpy_dtype
from ..models.errors import UnsupportedError, UsageError
from ..models.regular_files import read_json
from .inputs.encoder_decoder import encoder_decoder_tokens
from .inputs.exported import open_exported
from .inputs.synthetic import cast_feeds, make_feeds
from .runners.base import Array, OnnxSession
from .runners.open import open_runner

_ENCODER_PARTS = {ENCODER, DECODER}


def with_parts(
    folder: Path,
    parts: Mapping[str, Path],
    prompt: list[int],
    media: Mapping[str, Array],
    count: int,
    ends: set[int],
    provider: str,
) -> tuple[list[int], float]:
    """The new tokens after a prompt, and the seconds of all runs.

    Args:
        folder: the exported folder.
        parts: its models, by name.
        prompt: token ids; of the encoder, where there is one.
        media: inputs of the encoder of images or sounds, of all of them in order; empty for a prompt of text.
        count: the most new tokens.
        ends: token ids after which to stop.
        provider: ONNX Runtime's execution provider.

    Raises:
        UsageError: the images or sounds do not fit the model or the prompt, or config.json lacks a field.
        UnsupportedError: the folder has other parts.
    """
    modality = next((found for found in MODALITIES if set(parts) == {found.part, EMBEDDING, DECODER}), None)
    if modality is None and set(parts) != _ENCODER_PARTS:
        raise UnsupportedError(f"{folder}: expected an encoder and a decoder, got the models {', '.join(parts)}.")
    with ExitStack() as stack:
        runners = {
            name: stack.enter_context(open_runner(open_exported(part).model, provider)) for name, part in parts.items()
        }
        start = time.perf_counter()
        if modality is None:
            if media:
                raise UsageError(f"{folder}: expected a prompt only, got {', '.join(media)} too: it reads text only.")
            both = runners[ENCODER], runners[DECODER]
            ids = encoder_decoder_tokens(both, prompt, _start_token(folder), ends, count)
        else:
            ids = _from_media(runners, modality, read_manifest(folder), prompt, media, count, ends)
        return ids, time.perf_counter() - start


def _from_media(
    runners: Mapping[str, OnnxSession],
    modality: Modality,
    manifest: Mapping[str, Any],
    prompt: list[int],
    media: Mapping[str, Array],
    count: int,
    ends: set[int],
) -> list[int]:
    features = _features(runners[modality.part], modality, media, prompt, manifest)
    decoder, new = runners[DECODER], list[int]()
    past = _empty_cache(decoder)
    positions = _Positions(decoder, prompt, manifest)
    # New tokens are text.
    types = np.zeros((1, len(prompt) + count), np.int64)
    types[0, : len(prompt)] = np.array(prompt) == manifest.get(modality.token_field)
    pending, length = list(prompt), len(prompt)
    while True:
        ids = np.array([pending], np.int64)
        embedded = runners[EMBEDDING].run({"input_ids": ids, **features})
        given = {**embedded, "attention_mask": np.ones((1, length), np.int64)}
        given |= dict.fromkeys(TOKEN_TYPES, types[:, :length])
        outputs = _run(decoder, {**given, **past, "position_ids": positions.last(len(pending), length)})
        new.append(_next_token(outputs))
        if len(new) == count or new[-1] in ends:
            return new
        past, pending, length = present_to_past(outputs), new[-1:], length + 1


def _features(
    runner: OnnxSession,
    modality: Modality,
    media: Mapping[str, Array],
    prompt: Sequence[int],
    manifest: Mapping[str, Any],
) -> dict[str, Array]:
    """The features of all images or sounds, one row for each of their tokens; one row of zeros without them."""
    wanted = sum(token == manifest.get(modality.token_field) for token in prompt)
    if not media:
        if wanted:
            raise UsageError(
                f"the prompt has {wanted} {modality.name} tokens, and there are no {modality.plural}; give them "
                "(--inputs)."
            )
        return {o.name: np.zeros((1, int((o.shape or (0,))[-1] or 0)), numpy_dtype(o.dtype)) for o in runner.outputs()}
    (info,) = [info for info in runner.inputs() if info.name == modality.values]
    media = cast_feeds(media, runner.inputs())
    rows, *size = info.shape or (1,)
    values = media.get(modality.values)
    if values is None or not isinstance(rows, int) or values.shape[0] % rows or [*values.shape[1:]] != size:
        got = "none" if values is None else "x".join(map(str, values.shape))
        raise UsageError(
            f"{modality.values}: expected {modality.plural} of shape {'x'.join(map(str, info.shape or ()))}, as the "
            f"model was exported for this size, got {got}."
        )
    others = {i.name: media[i.name] for i in runner.inputs() if i.name != modality.values and i.name in media}
    number = values.shape[0] // rows
    found = [
        runner.run({modality.values: values[n * rows : (n + 1) * rows], **{k: v[n : n + 1] for k, v in others.items()}})
        for n in range(number)
    ]
    features = {name: np.concatenate([outputs[name] for outputs in found]) for name in found[0]}
    if (count := len(features[modality.features])) != wanted:
        raise UsageError(
            f"the prompt: expected {count} {modality.name} tokens for {number} {modality.plural}, got {wanted}."
        )
    return features


class _Positions:
    """The positions of the tokens, in the form that a decoder reads them.

    A decoder whose positions have rank 3 reads time, height and width of the patches of an image, in three or, after
    the position in the text, four rows (Qwen2-VL, https://arxiv.org/abs/2409.12191).
    """

    def __init__(self, runner: OnnxSession, prompt: Sequence[int], manifest: Mapping[str, Any]) -> None:
        shape = next((info.shape for info in runner.inputs() if info.name == "position_ids"), None) or ()
        self._rows = shape[0] if len(shape) == 3 and isinstance(shape[0], int) else 0
        grid = (manifest.get("image_grid_thw") or [[1, 1, 1]])[0]
        merge = manifest.get("image_merge_size") or 1
        self._known = _image_positions(prompt, manifest.get(IMAGES.token_field), grid, merge)

    def last(self, count: int, length: int) -> Array:
        """The positions of the last tokens of a text of this length."""
        text = np.arange(length - count, length, dtype=np.int64)[None]
        if not self._rows:
            return text
        missing = length - self._known.shape[1]
        if missing > 0:
            following = self._known.max() + 1 + np.arange(missing)
            self._known = np.concatenate([self._known, np.broadcast_to(following, (3, missing))], axis=1)
        axes = self._known[:, None, length - count : length]
        return np.concatenate([text[None], axes]) if self._rows == 4 else axes


def _image_positions(prompt: Sequence[int], token: int | None, grid: Sequence[int], merge: int) -> Array:
    """Time, height and width of each token of a prompt, `[3, length]`: equal for text, and those of an image's patches.

    Args:
        prompt: token ids; each image is a block of its image tokens.
        token: the image token.
        grid: numbers of patches in time, height and width of an image.
        merge: how many patches in height and in width are one token.
    """
    frames, height, width = grid[0], grid[1] // merge, grid[2] // merge
    block = np.stack(np.unravel_index(np.arange(frames * height * width), (frames, height, width)))
    columns: list[Array] = []
    start = place = 0
    while place < len(prompt):
        if prompt[place] == token:
            columns.append(start + block)
            place += block.shape[1]
            start = int(columns[-1].max()) + 1
        else:
            columns.append(np.full((3, 1), start))
            start, place = start + 1, place + 1
    return np.concatenate(columns, axis=1)[:, : len(prompt)].astype(np.int64)


def _run(runner: OnnxSession, feeds: Mapping[str, Array]) -> dict[str, Array]:
    names = {info.name for info in runner.inputs()}
    return runner.run({name: value for name, value in feeds.items() if name in names})


def _empty_cache(runner: OnnxSession) -> dict[str, Array]:
    return make_feeds([info for info in runner.inputs() if is_past(info.name)], 1, 1, 0, None)


def _next_token(outputs: Mapping[str, Array]) -> int:
    return int(outputs["logits"][0, -1].astype(np.float32).argmax())


def _start_token(folder: Path) -> int:
    """The decoder's first token."""
    found = None
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            content = read_json(folder / name, "Export the model again.")
            found = content.get("decoder_start_token_id", found) if isinstance(content, dict) else found
    if not isinstance(found, int):
        raise UsageError(f"{folder / 'config.json'}: decoder_start_token_id: expected a token id, got {found!r}.")
    return found
