"""Seeded inputs for an exported model, made from what its inputs say of themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..models.errors import UsageError
from .runner import Array, TensorInfo, numpy_dtype

# Batch and length of the runs that a validation makes when it is not told others.
DEFAULT_SHAPES: tuple[tuple[int, int], ...] = ((1, 1), (1, 7), (3, 33))
_TOKENS = ("input_ids", "decoder_input_ids")
# The KV cache as it goes in and as it comes out.
PAST, PRESENT = "past_key_values.", "present."
_OUTLIER_CHANNELS, _OUTLIER_FACTOR = 2, 30.0


def make_feeds(
    infos: Sequence[TensorInfo], batch: int, length: int, seed: int, vocabulary: int | None
) -> dict[str, Array]:
    """Inputs of one shape.

    Token ids are uniform over the vocabulary, masks are ones, positions count from 0, a KV cache starts empty, and
    floats are normal with two outlier channels, which is what the inputs of deep layers look like.

    Args:
        infos: the model's inputs.
        batch: size of the first dynamic dim.
        length: size of every other dynamic dim.
        seed: of the random numbers; equal seeds give equal inputs.
        vocabulary: number of token ids, needed where there are tokens.

    Raises:
        UsageError: an input whose values cannot be guessed; it has to be given.
    """
    rng = np.random.default_rng([seed, batch, length])
    return {info.name: _values(info, batch, length, rng, vocabulary) for info in infos}


def is_past(name: str) -> bool:
    """Whether an input is part of the KV cache."""
    return name.startswith(PAST)


def present_to_past(outputs: Mapping[str, Array]) -> dict[str, Array]:
    """The cache that came out, named as it goes in again."""
    return {PAST + name.removeprefix(PRESENT): value for name, value in outputs.items() if name.startswith(PRESENT)}


def _values(info: TensorInfo, batch: int, length: int, rng: np.random.Generator, vocabulary: int | None) -> Array:
    if info.shape is None:
        raise UsageError(f"input {info.name!r} has no known rank, so no values can be made for it; give --inputs.")
    shape = _sizes(info, batch, length)
    dtype = numpy_dtype(info.dtype)
    if is_past(info.name):
        return np.zeros([0 if dim == "past_sequence" else n for n, dim in zip(shape, info.shape, strict=True)], dtype)
    if info.name == "position_ids":
        return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()
    if info.name.endswith("attention_mask") or dtype == np.bool_:
        return np.ones(shape, dtype)
    if info.name in _TOKENS or (np.issubdtype(dtype, np.integer) and vocabulary is not None):
        if vocabulary is None:
            raise UsageError(f"the vocabulary behind input {info.name!r} is unknown; give --inputs.")
        return rng.integers(0, vocabulary, shape, dtype=dtype)
    if np.issubdtype(dtype, np.integer):
        raise UsageError(f"input {info.name!r} is {info.dtype}, whose meaning cannot be guessed; give --inputs.")
    values = rng.standard_normal(shape)
    if values.ndim and shape[-1] >= 8:
        values[..., rng.choice(shape[-1], _OUTLIER_CHANNELS, replace=False)] *= _OUTLIER_FACTOR
    return values.astype(dtype)


def _sizes(info: TensorInfo, batch: int, length: int) -> list[int]:
    sizes = []
    for index, dim in enumerate(info.shape or ()):
        if isinstance(dim, int):
            sizes.append(dim)
        else:
            sizes.append(batch if dim == "batch" or (index == 0 and dim != "sequence") else length)
    return sizes
