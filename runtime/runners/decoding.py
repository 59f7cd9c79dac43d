"""The steps of a decoder with a cache (`Decoding`): the cache stays where the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ...export.graph.cache_names import present_to_past
from .base import Array, Runner


class Decoding(Protocol):
    """A decoder that keeps its cache from one step to the next."""

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """Run the next tokens.

        Args:
            feeds: every input of the decoder; those of the cache are read at the first step only.

        Returns:
            The logits of the last token, `[batch, vocabulary]`, float32.
        """
        ...

    def restart(self) -> None:
        """Forget the cache."""
        ...


class HostDecoding:
    """Keeps the cache as arrays.

    Args:
        runner: runs the decoder.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._past: dict[str, Array] = {}

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """See `Decoding.step`."""
        outputs = self._runner.run({name: self._past.get(name, value) for name, value in feeds.items()})
        self._past = present_to_past(outputs)
        return outputs["logits"][:, -1].astype("float32")

    def restart(self) -> None:
        """See `Decoding.restart`."""
        self._past = {}


def open_decoding(runner: Runner) -> Decoding:
    """The steps of a decoder in its runner's own memory, or else in the host's."""
    own = getattr(runner, "decoding", None)
    return HostDecoding(runner) if own is None else own()
