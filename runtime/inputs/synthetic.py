"""Inputs for an exported model: generated from the names, dtypes and shapes of its inputs, or given ones cast."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ...export.graph.cache_names import is_cross, is_past
from ...export.graph.sizes import formula_value
from ...models.dtypes import numpy_dtype
from ...models.errors import UsageError
from ..runners.base import ANY_DTYPE, Array, TensorInfo

# Default batch and length of the runs of a validation.
DEFAULT_SHAPES: tuple[tuple[int, int], ...] = ((1, 1), (1, 7), (2, 33))
# What the name of a length contains.
_LENGTHS = ("past", "seq", "len")
_TOKENS = ("input_ids", "decoder_input_ids")
_OUTLIER_CHANNELS, _OUTLIER_FACTOR = 2, 30.0
# Most squares of large values overflow float16; for tiny values, eps outweighs the mean square.
_LARGE, _TINY = 1000.0, 1e-4
# Padded tokens in generated masks, and the shortest length that is padded.
_PADDING, _PADDED_FROM = 2, 8
# The most elements of a generated input: 2 GiB of float64. A file may state any size.
_MOST_ELEMENTS = 1 << 28
_HALVES, _INTEGERS = ("float16", "bfloat16"), ("int32", "int64")


def make_feeds(
    infos: Sequence[TensorInfo],
    batch: int,
    length: int,
    seed: int,
    vocabulary: int | None,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """Generate inputs of one shape.

    Token ids are uniform over the vocabulary, masks are ones (in a batch, the last row ends in padding), positions
    count from 0 and a KV cache starts empty.
    Floats are normally distributed, in one of three kinds, so that the default shapes cover all of them:

    - two outlier channels 30 times as large, as in the inputs of deep layers;
    - 1000 times as large, so that a square overflows float16;
    - 1e-4 times as large, so that a norm's eps dominates.

    With seed 0, a batch of two or more gets the first kind, a single sequence of at most two tokens the third, and a
    longer single sequence the second; seed 1 gives each shape the next kind, and so on. A cross-attention
    cache, which holds projections of a norm's result, is standard normal.

    Args:
        infos: the model's inputs.
        batch: size of dynamic dims whose name contains `batch`, or that come first and are not named as a length.
        length: size of every other dynamic dim; one that is named `past` is 0.
        seed: of the random numbers; equal seeds give equal inputs.
        vocabulary: number of token ids, required if the model reads tokens.
        sizes: other sizes of some dynamic dims, by name.

    Raises:
        UsageError: no values can be generated for an input; the user has to give it.
    """
    rng = np.random.default_rng([seed, batch, length])
    known = {**sizes_by_name(infos, batch, length), **(sizes or {})}
    for info in infos:
        for index, field in head_dims(info).items():
            dim = (info.shape or ())[index]
            if dim not in (sizes or {}):
                raise UsageError(
                    f"input {info.name!r}, dim {index} ({dim or 'without a name'}): expected a fixed size or a model "
                    f"whose config states {field}, got neither; give --inputs, or export the file with a fixed size."
                )
    return {info.name: _values(_sized(info, known), batch, length, seed, rng, vocabulary) for info in infos}


def with_empty_cache(feeds: Mapping[str, Array], infos: Sequence[TensorInfo]) -> dict[str, Array]:
    """The feeds, with an empty KV cache added if the model reads one and none is given."""
    missing = [info for info in infos if is_past(info.name) and info.name not in feeds]
    ids = feeds.get("input_ids")
    if not missing or ids is None or ids.ndim != 2:
        return dict(feeds)
    return {**feeds, **make_feeds(missing, ids.shape[0], ids.shape[1], 0, None)}


def cast_feeds(feeds: Mapping[str, Array], infos: Iterable[TensorInfo]) -> dict[str, Array]:
    """Cast given arrays to the dtypes of the inputs where that is safe; leave the others unchanged.

    float32 is rounded if the input is float16 or bfloat16 (an .npz file cannot contain bfloat16), and int32 and int64
    are converted into each other if no value changes.
    """
    wanted = {info.name: info.dtype for info in infos}
    return {name: _cast(array, wanted.get(name, ANY_DTYPE)) for name, array in feeds.items()}


def head_dims(info: TensorInfo) -> dict[int, str]:
    """The dims of a cache's input without a fixed size that count heads or their elements, each with its config field.

    A cache has rank 4: batch, heads, length, head size; or the length before the heads, where its name says so.
    """
    shape = info.shape or ()
    if not is_past(info.name) or len(shape) != 4:
        return {}
    heads = 2 if isinstance(shape[1], str) and any(word in shape[1] for word in _LENGTHS) else 1
    fields = {heads: "num_key_value_heads", 3: "head_dim"}
    return {index: field for index, field in fields.items() if not isinstance(shape[index], int)}


def sizes_by_name(infos: Sequence[TensorInfo], batch: int, length: int) -> dict[str, int]:
    """The size of each named dynamic dim, one for a name wherever it stands: see `make_feeds`.

    A dim that is a formula of others, such as `2*sequence`, is absent.
    """
    alone: dict[str, int] = {}
    parts: dict[str, int] = {}
    for info in infos:
        for index, dim in enumerate(info.shape or ()):
            if isinstance(dim, str):
                names = _names_in(dim)
                alone.update({dim: max(index, alone.get(dim, 0))} if not names else {})
                parts.update(dict.fromkeys(names, 1))
    return {name: dim_size(name, index, batch, length) for name, index in {**parts, **alone}.items()}


def _names_in(dim: str) -> list[str]:
    """The names in a dim that is a formula; none if it is a name, which may contain any character."""
    is_formula = re.search(r"[+*/%(]|\s-|-\s", dim) and not re.search(r"[^\w\s+*/%(),-]|\w-\w", dim)
    return re.findall(r"[A-Za-z_]\w*", dim) if is_formula else []


def _sized(info: TensorInfo, sizes: Mapping[str, int]) -> TensorInfo:
    """The input with the sizes of its named dims, and of those that are formulas of them."""

    def size(dim: int | str | None) -> int | str | None:
        if not isinstance(dim, str):
            return dim
        if dim in sizes or not _names_in(dim):
            return sizes.get(dim, dim)
        try:
            return formula_value(dim, sizes)
        except ValueError:
            return dim

    shape = info.shape
    return info if shape is None else dataclasses.replace(info, shape=tuple(map(size, shape)))


def _values(
    info: TensorInfo, batch: int, length: int, seed: int, rng: np.random.Generator, vocabulary: int | None
) -> Array:
    if info.shape is None:
        raise UsageError(f"input {info.name!r} has an unknown rank, so no values can be generated; give --inputs.")
    shape = _checked(info, _sizes(info, batch, length))
    dtype = numpy_dtype(info.dtype)
    if is_past(info.name):
        return np.zeros(shape, dtype)
    if info.name == "position_ids":
        return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()
    if info.name.endswith("attention_mask") or dtype == np.bool_:
        return _mask(shape, dtype)
    if info.name in _TOKENS or (np.issubdtype(dtype, np.integer) and vocabulary is not None):
        if vocabulary is None:
            raise UsageError(f"input {info.name!r}: the size of the vocabulary is unknown; give --inputs.")
        return rng.integers(0, vocabulary, shape, dtype=dtype)
    if np.issubdtype(dtype, np.integer):
        raise UsageError(f"input {info.name!r} is {info.dtype}, and its meaning is unknown; give --inputs.")
    if is_cross(info.name):  # of large scores, one key has all the weight, and which one is a matter of roundings
        return rng.standard_normal(shape).astype(dtype)
    return _floats(shape, _character(batch, length, seed), rng).astype(dtype)


def _mask(shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    """Ones; in a batch, the last row ends in padding, so that a model that ignores the mask is detected."""
    mask = np.ones(shape, dtype)
    if len(shape) == 2 and shape[0] > 1 and shape[1] >= _PADDED_FROM:
        mask[-1, -_PADDING:] = 0
    return mask


def _cast(array: Array, dtype: str) -> Array:
    if array.dtype.name == "float32" and dtype in _HALVES:
        with np.errstate(over="ignore"):  # a value beyond float16 becomes infinite, as it does in PyTorch
            return array.astype(numpy_dtype(dtype))
    if array.dtype.name in _INTEGERS and dtype in _INTEGERS:
        cast = array.astype(dtype)
        return cast if np.array_equal(cast, array) else array
    return array


def _character(batch: int, length: int, seed: int) -> int:
    """The index of the kind of floats, in the order in which `make_feeds` lists them."""
    own = 0 if batch > 1 else 1 if length > 2 else 2
    return (own + seed) % 3


def _floats(shape: Sequence[int], character: int, rng: np.random.Generator) -> Array:
    values = rng.standard_normal(shape)
    if character > 0:
        return values * (_LARGE if character == 1 else _TINY)
    if values.ndim and shape[-1] >= 8:
        values[..., rng.choice(shape[-1], _OUTLIER_CHANNELS, replace=False)] *= _OUTLIER_FACTOR
    return values


def _sizes(info: TensorInfo, batch: int, length: int) -> list[int]:
    return [
        dim if isinstance(dim, int) else dim_size(dim, index, batch, length)
        for index, dim in enumerate(info.shape or ())
    ]


def _checked(info: TensorInfo, shape: list[int]) -> list[int]:
    """The sizes of a generated input, refused before memory is allocated for sizes that are not possible."""
    elements = 1
    for index, size in enumerate(shape):
        elements *= size
        if size < 0 or elements > _MOST_ELEMENTS:
            wanted = "a size of at least 0" if size < 0 else f"at most {_MOST_ELEMENTS} elements in a generated input"
            raise UsageError(
                f"input {info.name!r}, dim {index}: expected {wanted}, got size {size} in shape "
                f"{'x'.join(map(str, shape[:8]))}; give --inputs, or smaller shapes."
            )
    return shape


def dim_size(dim: str | None, index: int, batch: int, length: int) -> int:
    """The size of a dynamic dim by its name, such as `past_sequence_length + 1`: the past has length 0."""
    parts = [part.strip() for part in (dim or "").split("+")]
    if any("past" in part for part in parts):
        left = [part for part in parts if "past" not in part]
        return sum(int(part) if part.isdigit() else dim_size(part, index, batch, length) for part in left)
    is_length = any(word in parts[0] for word in ("seq", "length"))
    return batch if "batch" in parts[0] or (index == 0 and not is_length) else length
