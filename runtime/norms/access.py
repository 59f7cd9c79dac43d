"""The interface to a model's norms (`NormAccess`): run norms alone, the segments between norms, or the whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from ...models.spec import NormSpec
from ..runners.base import Array
from .activation_store import ActivationStore, Key


@dataclass(frozen=True, slots=True)
class NormFeed:
    """The inputs of one norm: x `[..., *normalized dims]`, and a gate of x's shape or None."""

    x: Array
    gate: Array | None = None


@dataclass(frozen=True, slots=True)
class NormResult:
    """The outputs of one norm: y, and the sum if a residual add is fused into the norm, else None."""

    y: Array
    total: Array | None = None


@dataclass(frozen=True, slots=True)
class CalledNorm:
    """One call of a norm in PyTorch.

    Attributes:
        key: module path and number of the call.
        spec: the formula that this call computes.
        shape: shape of x.
        x_dtype: numpy's name of x's dtype.
        y_dtype: numpy's name of the result's dtype.
        gate_dtype: numpy's name of the gate's dtype, or None.
        forced: whether its x can be replaced while the model runs.
        off: the largest error of PyTorch's result against the float64 reference of its formula, in
            eps x max(|reference|, row RMS).
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
class RecordedNorm:
    """A norm of an exported file that is not a module: what the export recorded of it.

    Attributes:
        spec: what it computes.
        parameters: the names of its weight and its bias, of those that it has, in the PyTorch model.
    """

    spec: NormSpec
    parameters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NormDtypes:
    """numpy's names of the dtypes of one norm: of x, of the result, and of the gate, or None."""

    x: str
    y: str
    gate: str | None


@dataclass(frozen=True, slots=True)
class Sources:
    """The inputs of a segment.

    Attributes:
        keys: the norms whose values the segment reads.
        paths: modules of norms whose nodes are inside the segment.
        reads_inputs: whether the segment reads, or may read, the model's inputs too.
        attentions: modules of attentions whose main nodes are inside the segment.
    """

    keys: list[Key]
    paths: frozenset[str] = frozenset()
    reads_inputs: bool = True
    attentions: frozenset[str] = frozenset()


RunNorms = Callable[[Mapping[Key, NormFeed]], dict[Key, NormResult]]
# Receives a norm's key, the role (`x`, `y` or `gate`) and the value; it must copy what it keeps.
Sink = Callable[[Key, str, Array], None]


@dataclass(frozen=True, slots=True)
class Formula:
    """What one norm computes.

    Attributes:
        spec: its formula.
        dtype: numpy's name of x's dtype.
        weight: the weight, of any float dtype; None if there is none or it is not a constant.
        bias: the bias, like the weight.
    """

    spec: NormSpec
    dtype: str
    weight: Array | None = None
    bias: Array | None = None


class NormAccess(Protocol):
    """The norms of one side of a comparison."""

    @property
    def keys(self) -> list[Key]:
        """The norms that were found, in order of execution."""
        ...

    @property
    def problems(self) -> Mapping[str, str]:
        """Module paths of norms that exist but cannot be accessed, with the reason."""
        ...

    @property
    def remarks(self) -> list[str]:
        """Notes for the report on differences between running the parts and running the whole model."""
        ...

    @property
    def unused(self) -> frozenset[Key]:
        """Norms whose result is not read."""
        ...

    @property
    def recorded(self) -> Mapping[Key, RecordedNorm]:
        """The norms in `keys` that the export found outside of modules."""
        ...

    def formula(self, key: Key) -> Formula | str | None:
        """What a norm computes; or why it is none that is known; None if neither can be said."""
        ...

    def dtypes(self, key: Key) -> NormDtypes:
        """The dtypes of a norm in `keys`."""
        ...

    def sources(self, keys: list[Key], end: Key | str) -> Sources:
        """The inputs of the segment that ends at the input of the norm `end`, or at the output of that name.

        Args:
            keys: the norms at which the model is cut.
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
            store: the values that replace each norm's x and y.
            sink: receives the inputs of each norm: `x`, and `gate` if it has one.

        Returns:
            The model's outputs.
        """
        ...

    def trace(self, feeds: Mapping[str, Array], keys: list[Key], sink: Sink) -> dict[str, Array]:
        """Run the whole model unchanged; the sink receives `x`, `y` and a `gate` of each norm. Returns the outputs."""
        ...


class NormBaseline(Protocol):
    """The side whose norms the norms of the other side are compared with."""

    def formula(self, key: Key) -> Formula:
        """What a norm computes."""
        ...

    def exact(self, key: Key, feed: NormFeed) -> Array:
        """The float64 reference of a norm on these inputs."""
        ...

    def alone(self, keys: Iterable[Key]) -> AbstractContextManager[RunNorms]:
        """See `NormAccess.alone`."""
        ...


def as_deployed(called: Mapping[Key, CalledNorm], access: NormAccess) -> dict[Key, CalledNorm]:
    """The norms that PyTorch called, in the dtypes that the other side has for them."""
    found = dict(called)
    for key in access.keys:
        if key in called:
            dtypes = access.dtypes(key)
            gate = dtypes.gate if called[key].gate_dtype is not None else None
            found[key] = dataclasses.replace(called[key], x_dtype=dtypes.x, y_dtype=dtypes.y, gate_dtype=gate)
    return found


def windows(keys: Sequence[Key], size: int | None) -> list[list[Key]]:
    """The norms, at most `size` at a time; all together if it is None. Without a norm there is one empty window."""
    step = size or max(len(keys), 1)
    return [list(keys[first : first + step]) for first in range(0, max(len(keys), 1), step)]
