"""The steps of a decoder with a cache (`Decoding`): the cache stays where the model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from ...export.graph.cache_names import present_to_past
from .base import Array, Runner


class Decoding(Protocol):
    """A decoder that keeps its cache from one step to the next."""

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """Run the next tokens.

        Args:
            feeds: every input of the decoder; those of the cache may be left out after the first step, and are not
                read then.

        Returns:
            The logits of the last token, `[batch, vocabulary]`, float32.
        """
        ...

    def restart(self) -> None:
        """Forget the cache."""
        ...

    def select(self, rows: Sequence[int]) -> bool:
        """Let the rows of the cache be these of the present ones, in this order; False if it cannot."""
        ...


class HostDecoding:
    """Keeps the cache as arrays.

    Args:
        runner: runs the decoder.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._names = {info.name for info in runner.inputs()}
        self._past: dict[str, Array] = {}

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """See `Decoding.step`."""
        outputs = self._runner.run({**feeds, **self._past})
        self._past = {name: value for name, value in present_to_past(outputs).items() if name in self._names}
        return outputs["logits"][:, -1].astype("float32")

    def restart(self) -> None:
        """See `Decoding.restart`."""
        self._past = {}

    def select(self, rows: Sequence[int]) -> bool:
        """See `Decoding.select`."""
        self._past = {name: value[list(rows)] for name, value in self._past.items()}
        return True


def open_decoding(runner: Runner) -> Decoding:
    """The steps of a decoder in its runner's own memory, or else in the host's."""
    own = getattr(runner, "decoding", None)
    return HostDecoding(runner) if own is None else own()
