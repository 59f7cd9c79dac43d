"""The steps of a decoder in ONNX Runtime (`OrtDecoding`): its cache is never copied to arrays and back.

A cache that the file writes in place (`OrtBuffers`) has buffers that grow by doubling, to which a step adds its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ...export.graph.cache_names import is_present, past_to_present, present_to_past
from .base import Array

_LOGITS = "logits"
_MASK = "attention_mask"
# Runs the model with arrays, with values of the runtime in place of some of them, and with values that some outputs are
# written to; returns the values of the others.
Compute = Callable[[Mapping[str, Array], Mapping[str, Any], Sequence[str], Mapping[str, Any]], list[Any]]
View = Callable[[Any], Array]
ToValue = Callable[[Array], Any]
# Tokens for which a buffer has room at first.
_LEAST = 64


class OrtDecoding:
    """Keeps the cache as the values that ONNX Runtime returned, and in buffers where the file writes it in place.

    Args:
        compute: runs the model.
        view: an array over the memory of a value.
        to_value: a value over the memory of an array.
        outputs: names of the model's outputs.
        in_place: names of the inputs of the cache that the file writes in place.
    """

    def __init__(
        self, compute: Compute, view: View, to_value: ToValue, outputs: Sequence[str], in_place: Collection[str] = ()
    ) -> None:
        self._compute, self._view, self._to_value = compute, view, to_value
        self._names = [_LOGITS, *filter(is_present, outputs)]
        self._past: dict[str, Any] = {}
        self._buffers = OrtBuffers(to_value, in_place)

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """See `Decoding.step`."""
        buffers = self._buffers.with_room(feeds)
        own = {**self._past, **buffers}
        arrays = {name: array for name, array in feeds.items() if name not in own}
        targets = self._buffers.targets
        values = self._compute(arrays, own, self._names, targets)
        kept = [name for name in self._names[1:] if name not in targets]
        self._past = present_to_past(dict(zip(kept, values[1:], strict=True)))
        self._buffers.take(feeds)
        return self._view(values[0])[:, -1].astype("float32")

    def restart(self) -> None:
        """See `Decoding.restart`."""
        self._past = {}
        self._buffers.clear()

    def select(self, rows: Sequence[int]) -> bool:
        """See `Decoding.select`."""
        self._past = {name: self._to_value(self._view(value)[list(rows)]) for name, value in self._past.items()}
        self._buffers.select(rows)
        return True


class OrtBuffers:
    """The buffers of a cache that is written in place.

    Args:
        to_value: a value over the memory of an array.
        names: the inputs of the cache.

    Attributes:
        values: the buffers as values of ONNX Runtime, by the names of the inputs.
        targets: the same values, by the names of the outputs that are written to them.
        used: the number of tokens in them.
    """

    def __init__(self, to_value: ToValue, names: Collection[str]) -> None:
        self.names = frozenset(names)
        self._to_value = to_value
        self.clear()

    def clear(self) -> None:
        """Forget the tokens."""
        self._set({})
        self.used = 0

    def with_room(self, feeds: Mapping[str, Array]) -> dict[str, Any]:
        """The buffers, with room for all tokens of a step; none if no cache is written in place.

        Args:
            feeds: the inputs of the step, with those of the cache where there are no buffers yet.
        """
        if not self.names:
            return {}
        if not self._arrays:
            self._set({name: feeds[name] for name in self.names})
            self.used = self._size()
        total = feeds[_MASK].shape[1]
        if self._size() < total:
            room = max(total, 2 * self._size(), _LEAST)
            self._set({name: self._copied(array, range(len(array)), room) for name, array in self._arrays.items()})
        return self.values

    def take(self, feeds: Mapping[str, Array]) -> None:
        """Note that a step has written its tokens."""
        if self.names:
            self.used = feeds[_MASK].shape[1]

    def _size(self) -> int:
        return int(next(iter(self._arrays.values())).shape[2])

    def select(self, rows: Sequence[int]) -> None:
        """Let the rows of the batch be these."""
        self._set({name: self._copied(array, rows, array.shape[2]) for name, array in self._arrays.items()})

    def _copied(self, array: Array, rows: Sequence[int], size: int) -> Array:
        """The used part of these rows in a new buffer of this size."""
        _, heads, _, width = array.shape
        copy = np.zeros((len(rows), heads, size, width), array.dtype)
        for place, row in enumerate(rows):
            copy[place, :, : self.used] = array[row, :, : self.used]
        return copy

    def _set(self, arrays: dict[str, Array]) -> None:
        self._arrays = arrays
        self.values = {name: self._to_value(array) for name, array in arrays.items()}
        self.targets = {past_to_present(name): value for name, value in self.values.items()}
