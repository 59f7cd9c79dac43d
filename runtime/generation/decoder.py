"""Decoders that give the logits of the next tokens (`Decoder`), and an exported decoder as one (`TextDecoder`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from ...export.graph.cache_names import is_past
from ...export.graph.sizes import range_ends
from ...models.calling.modalities import TOKEN_TYPES
from ...models.calling.rotary import RESTART_FIELD
from ...models.errors import UnsupportedError, UsageError
from ..inputs.exported import Exported
from ..inputs.synthetic import make_feeds
from ..runners.base import Array, Runner, TensorInfo
from ..runners.decoding import open_decoding

IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"


class Decoder(Protocol):
    """A decoder that remembers the tokens that it has read."""

    @property
    def has_cache(self) -> bool:
        """Whether it reads only new tokens; otherwise it reads all tokens each time."""
        ...

    @property
    def pads_left(self) -> bool:
        """Whether prompts of a batch are padded on the left; otherwise on the right."""
        ...

    def begin(self, ids: Array, mask: Array, media: Mapping[str, Array]) -> tuple[Array, Array]:
        """Take the prompts of a generation.

        Args:
            ids: token ids, `[batch, length]`, int64, padded on one side.
            mask: 0 at padding and otherwise 1, as `ids`.
            media: inputs of the encoder of images or sounds, of all of them in order; empty for prompts of text.

        Returns:
            The first tokens that the decoder reads, and their mask.

        Raises:
            UsageError: the decoder cannot read these.
        """
        ...

    def read(self, ids: Array, mask: Array, new: int) -> Array:
        """Read the next tokens.

        Args:
            ids: the tokens so far, `[batch, length]`, int64.
            mask: 0 at padding and otherwise 1, as `ids`.
            new: how many tokens at the end have not been read yet; all of them after `restart`.

        Returns:
            The logits of the last token of each row, `[batch, vocabulary]`, float32.
        """
        ...

    def restart(self) -> None:
        """Forget all tokens."""
        ...

    def select(self, rows: Sequence[int]) -> bool:
        """Let the rows of the batch be these of the present ones, in this order; False if it cannot."""
        ...


class TextDecoder:
    """An exported decoder that reads `input_ids`.

    Args:
        runner: runs the decoder.
        exported: the decoder's folder.

    Raises:
        UnsupportedError: the model is not such a decoder.
    """

    def __init__(self, runner: Runner, exported: Exported) -> None:
        _check_decoder(runner, exported)
        self._where = str(exported.model)
        self._infos = runner.inputs()
        self._names = {info.name for info in self._infos}
        self._cache_infos = [info for info in self._infos if is_past(info.name)]
        self._decoding = open_decoding(runner)
        self._piece = range_ends(exported.manifest).get("sequence", (1, None))[1] if self.has_cache else None
        self._switch = exported.manifest.get(RESTART_FIELD)
        self._read = 0

    pads_left = True

    @property
    def has_cache(self) -> bool:
        """See `Decoder.has_cache`."""
        return bool(self._cache_infos)

    def begin(self, ids: Array, mask: Array, media: Mapping[str, Array]) -> tuple[Array, Array]:
        """See `Decoder.begin`.

        Raises:
            UsageError: there are images or sounds, or the file cannot be given padding.
        """
        if media:
            raise UsageError(
                f"{self._where} reads text only, got {', '.join(media)} too. Export the model with example inputs that "
                "have images or sounds (--with-past --inputs)."
            )
        if not mask.all() and MASK not in self._names:
            raise UsageError(
                f"{self._where}: expected prompts of one length, got several: the file has no input {MASK}. Give one "
                "prompt at a time."
            )
        return ids, mask

    def read(self, ids: Array, mask: Array, new: int) -> Array:
        """See `Decoder.read`.

        The tokens are read in pieces of the length that the file was exported for, and all of them again as soon as
        their number exceeds the length at which the rotary embedding changes.
        """
        total = ids.shape[1]
        if self._switch is not None and self._read <= self._switch < total:
            new = total
        if new == total:
            self.restart()
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        start, logits = total - new, np.empty(0)
        while start < total:
            stop = total if self._piece is None else min(total, start + self._piece)
            logits = self._decoding.step(self._feeds(ids[:, start:stop], mask[:, :stop], positions[:, start:stop]))
            start = self._read = stop
        return logits

    def restart(self) -> None:
        """See `Decoder.restart`."""
        self._decoding.restart()
        self._read = 0

    def select(self, rows: Sequence[int]) -> bool:
        """See `Decoder.select`."""
        return self._decoding.select(rows)

    def _feeds(self, ids: Array, mask: Array, positions: Array) -> dict[str, Array]:
        """The inputs of one run; those of the cache only where it is empty."""
        known = {IDS: ids, MASK: mask, POSITIONS: positions, **dict.fromkeys(TOKEN_TYPES, np.zeros_like(mask))}
        feeds = {info.name: _in_form_of(info, known[info.name]) for info in self._infos if info.name in known}
        return feeds if self._read else {**make_feeds(self._cache_infos, len(ids), ids.shape[1], 0, None), **feeds}


def _in_form_of(info: TensorInfo, array: Array) -> Array:
    """The array in the dtype of an input, with one row of positions for each axis where the input has an axis more."""
    if info.shape is not None and len(info.shape) == array.ndim + 1:
        array = np.broadcast_to(array, (int(info.shape[0] or 1), *array.shape))
    return np.ascontiguousarray(array, info.dtype)


def vocabulary_of(runner: Runner) -> int | None:
    """The number of token ids that a decoder knows, or None if its file does not state it."""
    shape = next((info.shape for info in runner.outputs() if info.name == "logits"), None)
    return shape[-1] if shape and isinstance(shape[-1], int) else None


def _check_decoder(runner: Runner, exported: Exported) -> None:
    inputs = {info.name for info in runner.inputs()}
    outputs = {info.name for info in runner.outputs()}
    if IDS not in inputs or "logits" not in outputs or "decoder_input_ids" in inputs:
        raise UnsupportedError(
            f"{exported.model}: expected a decoder that reads input_ids and returns logits, got a model that reads "
            f"{', '.join(sorted(inputs))} and returns {', '.join(sorted(outputs))}."
        )
    known = {IDS, MASK, POSITIONS, *TOKEN_TYPES}
    others = sorted(name for name in inputs - known if not is_past(name))
    if others:
        raise UnsupportedError(
            f"{exported.model}: expected the inputs {IDS}, {MASK}, {POSITIONS} and a cache, got "
            f"{', '.join(others)} too, whose values are not known. Run the model with rmsnorm run --inputs."
        )
