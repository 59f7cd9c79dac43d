"""The positions of the tokens of a prompt with images (`Positions`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...models.calling.media_parts import IMAGES
from ..runners.base import Array, Runner


class Positions:
    """The positions of the tokens, in the form that a decoder reads them.

    A decoder whose positions have rank 3 reads time, height and width of the patches of an image, in three or, after
    the position in the text, four rows (Qwen2-VL, https://arxiv.org/abs/2409.12191).
    """

    def __init__(self, runner: Runner, prompt: Sequence[int], manifest: Mapping[str, Any]) -> None:
        shape = next((info.shape for info in runner.inputs() if info.name == "position_ids"), None) or ()
        self._rows = shape[0] if len(shape) == 3 and isinstance(shape[0], int) else 0
        grid = (manifest.get("image_grid_thw") or [[1, 1, 1]])[0]
        merge = manifest.get("image_merge_size") or 1
        self._known = image_positions(prompt, manifest.get(IMAGES.token_field), grid, merge)

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


def image_positions(prompt: Sequence[int], token: int | None, grid: Sequence[int], merge: int) -> Array:
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
