"""Read tokens through a decoder's cache (`Reader`)."""

from __future__ import annotations

import numpy as np

from ..runners.base import Array
from .decoder import Decoder


class Reader:
    """Gives the logits after any tokens, and runs only those that the decoder's cache does not hold.

    So a text that continues the last one is not read again, and a search that keeps several texts may reorder them.

    Args:
        decoder: computes the logits.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._forget()

    def logits(self, ids: Array, mask: Array) -> Array:
        """The logits of the token after each row, `[batch, vocabulary]`, float32.

        Args:
            ids: token ids, `[batch, length]`, int64, padded on the left.
            mask: 0 at padding and otherwise 1, as `ids`.
        """
        new = self._not_read(ids, mask)
        try:
            logits = self._decoder.read(ids, mask, new)
        except BaseException:
            self._forget()  # a part of the tokens may have been read
            raise
        self._ids, self._mask = ids, mask
        return logits

    def _forget(self) -> None:
        self._ids = self._mask = np.zeros((0, 0), np.int64)

    def _not_read(self, ids: Array, mask: Array) -> int:
        total, read = ids.shape[1], self._ids.shape[1]
        if self._decoder.has_cache and 0 < read < total:
            before, seen = ids[:, :read], mask[:, :read]
            if np.array_equal(before, self._ids) and np.array_equal(seen, self._mask):
                return total - read
            places = {_key(*row): place for place, row in enumerate(zip(self._ids, self._mask, strict=True))}
            rows = [places.get(_key(*row)) for row in zip(before, seen, strict=True)]
            found = [row for row in rows if row is not None]
            if len(found) == len(rows) and self._decoder.select(found):
                return total - read
        self._decoder.restart()
        return total


def _key(ids: Array, mask: Array) -> tuple[bytes, bytes]:
    return ids.tobytes(), mask.tobytes()
