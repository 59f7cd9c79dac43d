"""What the checks need of either side: each norm alone, the segments between norms, and their values in a whole run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from ...models.spec import NormSpec
from ..runners.base import Array
from .activation_store import ActivationStore, Key


@dataclass(frozen=True, slots=True)
class NormFeed:
    """What goes into one norm: x `[..., *normalized dims]`, and a gate of x's shape or None."""

    x: Array
    gate: Array | None = None


@dataclass(frozen=True, slots=True)
class NormResult:
    """What comes out of one norm: y, and the sum where the norm adds a residual itself (None elsewhere)."""

    y: Array
    total: Array | None = None


@dataclass(frozen=True, slots=True)
class CalledNorm:
    """One call of a norm, as PyTorch makes it.

    Attributes:
        key: module path and number of the call.
        spec: what it computes, as called.
        shape: of x.
        x_dtype: numpy's name of x's dtype.
        y_dtype: of the result.
        gate_dtype: of the gate, or None.
        forced: whether its x can be replaced while the model runs.
        off: how far PyTorch's result is from the float64 reference of its formula, in eps x max(|truth|, row RMS).
    """

    key: Key
    spec: NormSpec
    shape: tuple[int, ...]
    x_dtype: str
    y_dtype: str
    gate_dtype: str | None
    forced: bool
    off: float = 0.0


@dataclass(frozen=True, slots=True)
class Sources:
    """What goes into a segment.

    Attributes:
        keys: the norms whose values go in.
        paths: modules of norms whose nodes lie inside the segment.
        reads_inputs: whether the model's inputs go in too, or may do so.
    """

    keys: list[Key]
    paths: frozenset[str] = frozenset()
    reads_inputs: bool = True


RunNorms = Callable[[Mapping[Key, NormFeed]], dict[Key, NormResult]]
# Takes a norm's key, `x`, `y` or `gate`, and the value there; nothing is kept that it does not keep.
Sink = Callable[[Key, str, Array], None]


class NormAccess(Protocol):
    """One side of a comparison, opened at its norms."""

    @property
    def keys(self) -> list[Key]:
        """The norms that were found, in order of execution."""
        ...

    @property
    def problems(self) -> Mapping[str, str]:
        """Module paths of norms that are there and cannot be opened, with the reason."""
        ...

    @property
    def remarks(self) -> list[str]:
        """How the parts are run otherwise than the whole is; for the report."""
        ...

    @property
    def unused(self) -> frozenset[Key]:
        """Norms whose result nothing reads."""
        ...

    def sources(self, keys: list[Key], end: Key | str) -> Sources:
        """What goes into the segment that ends before the norm `end`, or before the output of that name.

        Args:
            keys: the norms that are cut.
            end: a norm, or the name of an output.
        """
        ...

    def alone(self, keys: Iterable[Key]) -> AbstractContextManager[RunNorms]:
        """A function that runs each of these norms alone."""
        ...

    def between(
        self, feeds: Mapping[str, Array], keys: list[Key], store: ActivationStore, sink: Sink
    ) -> dict[str, Array]:
        """Run the segments between the norms `keys`, each norm's x and y replaced by the store's `fed_x` and `fed_y`.

        Args:
            feeds: the model's inputs.
            keys: norms to cut at, in order of execution.
            store: what goes in at the cuts.
            sink: gets what arrives at each norm: `x`, and `gate` where it has one.

        Returns:
            The model's outputs.
        """
        ...

    def trace(self, feeds: Mapping[str, Array], keys: list[Key], sink: Sink) -> dict[str, Array]:
        """Run the whole model as it is; the sink gets `x` and `y` of each norm. Returns the model's outputs."""
        ...


def norm_name(key: Key) -> str:
    """A norm's name for people: its path, with the call's number where it is not the first."""
    path = key[0] or "the model itself"
    return path if key[1] == 0 else f"{path} (call {key[1] + 1})"
