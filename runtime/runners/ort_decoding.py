"""The steps of a decoder in ONNX Runtime (`OrtDecoding`): its cache is never copied to arrays and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...export.graph.cache_names import is_present, present_to_past
from .base import Array

_LOGITS = "logits"
# Runs the model with arrays, and with values of the runtime in place of some of them; returns its values.
Compute = Callable[[Mapping[str, Array], Mapping[str, Any], Sequence[str]], list[Any]]


class OrtDecoding:
    """Keeps the cache as the values that ONNX Runtime returned.

    Args:
        compute: runs the model.
        to_array: copies a value.
        outputs: names of the model's outputs.
    """

    def __init__(self, compute: Compute, to_array: Callable[[Any], Array], outputs: Sequence[str]) -> None:
        self._compute, self._to_array = compute, to_array
        self._names = [_LOGITS, *filter(is_present, outputs)]
        self._past: dict[str, Any] = {}

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """See `Decoding.step`."""
        arrays = {name: array for name, array in feeds.items() if name not in self._past}
        values = self._compute(arrays, self._past, self._names)
        self._past = present_to_past(dict(zip(self._names[1:], values[1:], strict=True)))
        return self._to_array(values[0])[:, -1].astype("float32")

    def restart(self) -> None:
        """See `Decoding.restart`."""
        self._past = {}
