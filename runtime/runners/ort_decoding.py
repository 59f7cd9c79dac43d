"""The steps of a decoder in ONNX Runtime (`OrtDecoding`): its cache is never copied to arrays and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...export.graph.cache_names import is_present, present_to_past
from .base import Array

_LOGITS = "logits"
# Runs the model with arrays, and with values of the runtime in place of some of them; returns its values.
Compute = Callable[[Mapping[str, Array], Mapping[str, Any], Sequence[str]], list[Any]]

View = Callable[[Any], Array]
ToValue = Callable[[Array], Any]


class OrtDecoding:
    """Keeps the cache as the values that ONNX Runtime returned.

    Args:
        compute: runs the model.
        view: an array over the memory of a value.
        to_value: a value over the memory of an array.
        outputs: names of the model's outputs.
    """

    def __init__(self, compute: Compute, view: View, to_value: ToValue, outputs: Sequence[str]) -> None:
        self._compute, self._view, self._to_value = compute, view, to_value
        self._names = [_LOGITS, *filter(is_present, outputs)]
        self._past: dict[str, Any] = {}

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """See `Decoding.step`."""
        arrays = {name: array for name, array in feeds.items() if name not in self._past}
        values = self._compute(arrays, self._past, self._names)
        self._past = present_to_past(dict(zip(self._names[1:], values[1:], strict=True)))
        return self._view(values[0])[:, -1].astype("float32")

    def restart(self) -> None:
        """See `Decoding.restart`."""
        self._past = {}

    def select(self, rows: Sequence[int]) -> bool:
        """See `Decoding.select`."""
        self._past = {name: self._to_value(self._view(value)[list(rows)]) for name, value in self._past.items()}
        return True
