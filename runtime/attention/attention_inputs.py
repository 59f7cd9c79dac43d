"""Inputs for an attention (`KINDS`), each of which exposes some faults."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...models.attention.find_attention import lowest
from ...models.attention.spec import AttentionSpec
from ...models.dtypes import numpy_dtype, torch_dtype
from .torch_attentions import AttentionFeed

Values = NDArray[np.float64]
# The standard deviation of large scores: exp overflows in float32 from 88 on.
_LARGE = 200.0
# Keys and values that a mask hides are that many times larger than others.
_HIDDEN = 8.0
_WINDOW = 7


@dataclass(frozen=True, slots=True)
class Heads:
    """The sizes of an attention: heads of queries and of keys, and their widths."""

    queries: int
    keys: int
    width: int
    value_width: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """Inputs in float64; see `AttentionFeed`. `shown` is which keys a query attends to, bool `[B, 1, S, T]`."""

    query: Values
    key: Values
    value: Values
    shown: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class InputKind:
    """A kind of input.

    Attributes:
        name: the name in reports.
        shows: the fault that it exposes.
        batch, length, keys: sizes B, S and T.
        tame: PyTorch's own result must be close to its formula.
        needs_mask: it says nothing without a bias.
        make: changes the inputs, which are normal numbers, and a causal mask of queries behind the keys before.
    """

    name: str
    shows: str
    batch: int = 2
    length: int = 5
    keys: int = 9
    tame: bool = True
    needs_mask: bool = False
    make: Callable[[Drawn, AttentionSpec], Drawn] = field(default=lambda drawn, spec: drawn)


def _every_key(drawn: Drawn, spec: AttentionSpec) -> Drawn:
    return dataclasses.replace(drawn, shown=np.ones_like(drawn.shown))


def _large(drawn: Drawn, spec: AttentionSpec) -> Drawn:
    factor = np.sqrt(_LARGE / (abs(spec.scale) * np.sqrt(drawn.query.shape[-1])))
    return dataclasses.replace(drawn, query=drawn.query * factor, key=drawn.key * factor)


def _hiding(drawn: Drawn, shown: NDArray[np.bool_]) -> Drawn:
    """The inputs with another mask; keys that some query does not attend to have larger values."""
    sometimes = ~np.all(shown, axis=2, keepdims=True).swapaxes(2, 3)
    return dataclasses.replace(drawn, value=np.where(sometimes, _HIDDEN * drawn.value, drawn.value), shown=shown)


def _window(drawn: Drawn, spec: AttentionSpec) -> Drawn:
    length, keys = drawn.shown.shape[2:]
    last = np.arange(keys - length, keys)[:, None]
    place = np.arange(keys)[None, :]
    return _hiding(drawn, np.broadcast_to((place <= last) & (place > last - _WINDOW), drawn.shown.shape))


def _left_padding(drawn: Drawn, spec: AttentionSpec) -> Drawn:
    padding = np.array([0, 2, 5])[:, None, None, None]
    return _hiding(drawn, drawn.shown & (np.arange(drawn.shown.shape[3]) >= padding))


def _nothing(drawn: Drawn, spec: AttentionSpec) -> Drawn:
    shown = drawn.shown.copy()
    shown[1, :, :3] = False
    return dataclasses.replace(drawn, shown=shown)


def _groups(drawn: Drawn, spec: AttentionSpec) -> Drawn:
    count = drawn.key.shape[1]
    apart = 1.0 + np.arange(count)[:, None, None]
    return dataclasses.replace(drawn, value=drawn.value + 4.0 * apart)


NOTHING = "nothing to attend to"
KINDS: tuple[InputKind, ...] = (
    InputKind("normal", "a wrong scale, order or axis"),
    InputKind("long cache", "sums over many keys", 1, 1, 1025, make=_every_key),
    InputKind("large scores", "exponents that overflow, a softcap that is missing", tame=False, make=_large),
    InputKind("window edges", "a mask that is off by one", 2, 4, 24, needs_mask=True, make=_window),
    InputKind("left padding", "padding that is attended to", 3, 6, 6, needs_mask=True, make=_left_padding),
    InputKind(NOTHING, "NaN where a row is masked", needs_mask=True, make=_nothing),
    InputKind("grouped heads", "heads that read the keys or values of others", 1, 2, 5, make=_groups),
    InputKind("one key", "a result that is not the value itself", 2, 1, 1),
)
# Not generated: the values that an attention receives while PyTorch runs the model.
AS_IT_RUNS = InputKind("as it runs", "any fault that affects the model's own values", tame=False)


def kinds_for(spec: AttentionSpec, *, masked: bool) -> Iterator[InputKind]:
    """The kinds that say something of an attention with or without a bias."""
    for kind in KINDS:
        if kind.needs_mask and not masked:
            continue
        if spec.causal and kind.length != kind.keys:
            if kind.length == 1:
                continue
            kind = dataclasses.replace(kind, keys=kind.length)
        yield kind


def drawn(kind: InputKind, spec: AttentionSpec, heads: Heads, dtype: str, seed: int, *, masked: bool) -> AttentionFeed:
    """The inputs of a kind.

    Args:
        kind: one of `KINDS`.
        spec: the attention.
        heads: its sizes.
        dtype: numpy's name of the dtype of the inputs.
        seed: seed of the random numbers.
        masked: whether it has a bias.
    """
    rng = np.random.default_rng([seed, zlib.crc32(kind.name.encode())])
    shown = np.tri(kind.length, kind.keys, kind.keys - kind.length, dtype=bool)
    values = Drawn(
        rng.standard_normal((kind.batch, heads.queries, kind.length, heads.width)),
        rng.standard_normal((kind.batch, heads.keys, kind.keys, heads.width)),
        rng.standard_normal((kind.batch, heads.keys, kind.keys, heads.value_width)),
        np.broadcast_to(shown, (kind.batch, 1, kind.length, kind.keys)),
    )
    # Scores of normal numbers have a standard deviation of 1.
    usual = np.sqrt(1.0 / (abs(spec.scale) * np.sqrt(heads.width))) if spec.scale else 1.0
    made = kind.make(values, spec)
    if made.query is values.query:
        made = dataclasses.replace(made, query=made.query * usual, key=made.key * usual)
    target: Any = numpy_dtype(dtype)
    bias = np.where(made.shown, 0.0, lowest(torch_dtype(dtype))).astype(target) if masked else None
    return AttentionFeed(made.query.astype(target), made.key.astype(target), made.value.astype(target), bias)
