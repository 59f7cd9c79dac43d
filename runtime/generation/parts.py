"""Decoders of several models (`open_parts`): an encoder and a decoder, or an encoder of images or sounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...export.graph.cache_names import is_past
from ...export.onnx_io.manifest import read_manifest
from ...models.calling.media_parts import EMBEDDING, MODALITIES, Modality
from ...models.calling.modalities import TOKEN_TYPES
from ...models.calling.parts import DECODER, ENCODER
from ...models.dtypes import numpy_dtype
from ...models.errors import UnsupportedError, UsageError
from ...models.regular_files import read_json
from ..inputs.encoder_decoder import decoder_steps
from ..inputs.exported import open_exported
from ..inputs.synthetic import cast_feeds, make_feeds
from ..runners.base import Array, OnnxSession, Runner
from ..runners.decoding import open_decoding
from ..runners.open import open_runner
from .decoder import IDS, MASK, POSITIONS, Decoder
from .positions import Positions

_ENCODER_PARTS = {ENCODER, DECODER}


@contextmanager
def open_parts(folder: Path, parts: Mapping[str, Path], provider: str) -> Iterator[tuple[Decoder, OnnxSession]]:
    """The decoder of an exported folder of several models, and the runner that computes its logits.

    Args:
        folder: the exported folder.
        parts: its models, by name.
        provider: ONNX Runtime's execution provider.

    Raises:
        UsageError: config.json lacks the first token of a decoder behind an encoder.
        UnsupportedError: the folder has other parts.
    """
    modality = next((found for found in MODALITIES if set(parts) == {found.part, EMBEDDING, DECODER}), None)
    if modality is None and set(parts) != _ENCODER_PARTS:
        raise UnsupportedError(f"{folder}: expected an encoder and a decoder, got the models {', '.join(parts)}.")
    start = _start_token(folder) if modality is None else 0
    with ExitStack() as stack:
        runners = {
            name: stack.enter_context(open_runner(open_exported(part).model, provider)) for name, part in parts.items()
        }
        if modality is None:
            yield EncodedDecoder(folder, (runners[ENCODER], runners[DECODER]), start), runners[DECODER]
        else:
            yield MediaDecoder(runners, modality, read_manifest(folder)), runners[DECODER]


class EncodedDecoder:
    """An exported decoder that reads what an encoder made of the prompts.

    Args:
        folder: of both.
        runners: of the encoder and the decoder.
        start: the decoder's first token.
    """

    has_cache = True
    pads_left = False

    def __init__(self, folder: Path, runners: tuple[Runner, Runner], start: int) -> None:
        self._folder, self._runners, self._start = folder, runners, start
        self._prompts = self._mask = np.zeros((0, 0), np.int64)
        self._step: Callable[[Array], Array] | None = None

    def begin(self, ids: Array, mask: Array, media: Mapping[str, Array]) -> tuple[Array, Array]:
        """See `Decoder.begin`: the encoder reads the prompts, and the decoder starts with its first token."""
        if media:
            raise UsageError(f"{self._folder}: expected a prompt only, got {', '.join(media)} too: it reads text only.")
        self._prompts, self._mask = ids, mask
        first = np.full((len(ids), 1), self._start, np.int64)
        return first, np.ones_like(first)

    def read(self, ids: Array, mask: Array, new: int) -> Array:
        """See `Decoder.read`."""
        if self._step is None:
            times = len(ids) // len(self._prompts)  # the rows of a beam search are those of one prompt
            prompts, seen = np.repeat(self._prompts, times, 0), np.repeat(self._mask, times, 0)
            self._step = decoder_steps(self._runners, prompts, seen)
        return self._step(ids[:, -new:])

    def restart(self) -> None:
        """See `Decoder.restart`."""
        self._step = None

    def select(self, rows: Sequence[int]) -> bool:
        """See `Decoder.select`."""
        return False


class MediaDecoder:
    """An exported decoder that reads embedded tokens, and the features of images or sounds in place of some.

    Args:
        runners: of the parts, by name.
        modality: images or sounds.
        manifest: of the folder.
    """

    has_cache = True
    pads_left = True

    def __init__(self, runners: Mapping[str, OnnxSession], modality: Modality, manifest: Mapping[str, Any]) -> None:
        self._runners, self._modality, self._manifest = runners, modality, manifest
        self._decoding = open_decoding(runners[DECODER])
        self._infos = runners[DECODER].inputs()
        self._features: dict[str, Array] = {}
        self._prompt: list[int] = []
        self._positions: Positions | None = None

    def begin(self, ids: Array, mask: Array, media: Mapping[str, Array]) -> tuple[Array, Array]:
        """See `Decoder.begin`.

        Raises:
            UsageError: the images or sounds do not fit the model or the prompt, or there are several prompts.
        """
        if len(ids) != 1:
            raise UsageError(f"expected one prompt, got {len(ids)}: a model of {self._modality.plural} reads one.")
        self._prompt = ids[0].tolist()
        self._features = _features(
            self._runners[self._modality.part], self._modality, media, self._prompt, self._manifest
        )
        return ids, mask

    def read(self, ids: Array, mask: Array, new: int) -> Array:
        """See `Decoder.read`."""
        batch, length = ids.shape
        features = {
            name: rows if batch == 1 else np.concatenate([rows] * batch) for name, rows in self._features.items()
        }
        embedded = self._runners[EMBEDDING].run({IDS: ids[:, length - new :], **features})
        types = np.zeros((batch, length), np.int64)  # new tokens are text
        types[:, : len(self._prompt)] = np.array(self._prompt) == self._manifest.get(self._modality.token_field)
        if self._positions is None:
            self._positions = Positions(self._runners[DECODER], self._prompt, self._manifest)
        positions = self._positions.last(new, length)
        given = {
            **embedded, **dict.fromkeys(TOKEN_TYPES, types), MASK: mask,
            POSITIONS: np.repeat(positions, batch, positions.ndim - 2),
        }  # fmt: skip
        if new == length:
            given |= make_feeds([info for info in self._infos if is_past(info.name)], batch, 1, 0, None)
        return self._decoding.step({i.name: given[i.name] for i in self._infos if i.name in given})

    def restart(self) -> None:
        """See `Decoder.restart`."""
        self._decoding.restart()
        self._positions = None

    def select(self, rows: Sequence[int]) -> bool:
        """See `Decoder.select`."""
        return self._decoding.select(rows)


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
