"""Columns of a table of Arrow and arrays: `cells` of a column, and `to_column`, the way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...models.errors import UsageError
from ..runners.base import Array


class _MissingError(Exception):
    """A value is missing."""


def cells(column: Any, name: str, first: int = 0) -> list[Array]:
    """The value of each row: a number as an array of rank 0, a list of rank 1, a list of lists of rank 2 and so on.

    Args:
        column: a chunked array of numbers, or of lists, of lists of lists, of numbers.
        name: of the column, for messages.
        first: the number of the first row, for messages.

    Raises:
        UsageError: a value is missing, is not a number, or has rows of several lengths inside.
    """
    import pyarrow as pa

    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(whole, pa.ChunkedArray):  # of no chunks, or of too many bytes for one
        whole = pa.concat_arrays(whole.chunks) if whole.num_chunks else pa.array([], whole.type)
    try:
        return _cells(decoded(whole), name)
    except _MissingError:
        row = next(number for number, value in enumerate(whole.to_pylist()) if _has_none(value))
        raise UsageError(f"column {name}: expected a value everywhere, got none in row {first + row}.") from None


def decoded(values: Any) -> Any:
    """An array without a dictionary of its values; as it is, if it has none."""
    import pyarrow as pa

    return values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values


def _has_none(value: Any) -> bool:
    return any(map(_has_none, value)) if isinstance(value, list) else value is None


def _cells(whole: Any, name: str) -> list[Array]:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = whole.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return list(_numbers(whole, name))
    _refuse_missing(whole)
    lengths = pc.list_value_length(whole).to_numpy(zero_copy_only=False).astype(np.int64)
    ends = np.cumsum(lengths)
    places = list(zip((ends - lengths).tolist(), ends.tolist(), strict=True))
    inner = decoded(whole.flatten())
    if not pa.types.is_nested(inner.type):
        values = _numbers(inner, name)
        return [values[start:end] for start, end in places]
    items = _cells(inner, name)
    return [_joined(items[start:end], name) for start, end in places]


def _numbers(whole: Any, name: str) -> Array:
    import pyarrow as pa

    kind = whole.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise UsageError(f"column {name}: expected numbers, or lists of numbers, got {kind}.")
    _refuse_missing(whole)
    numbers: Array = whole.to_numpy(zero_copy_only=False)
    return numbers


def _refuse_missing(whole: Any) -> None:
    if whole.null_count:
        raise _MissingError


def _joined(items: Sequence[Array], name: str) -> Array:
    """The lists of one row as one array."""
    if not items:
        raise UsageError(f"column {name}: expected lists of lists with elements, got an empty one.")
    shapes = {item.shape for item in items}
    if len(shapes) > 1:
        two = " and ".join(str(list(shape)) for shape in sorted(shapes)[:2])
        raise UsageError(f"column {name}: expected the lists of a row to have one length, got {two}.")
    return np.stack(items)


def to_column(values: Sequence[Array]) -> Any:
    """A column of Arrow with one value for each row, as nested lists.

    Args:
        values: of each row, of one rank and dtype; bfloat16 becomes float32, which Parquet has.
    """
    import pyarrow as pa

    dtype = values[0].dtype if values else np.dtype(np.float32)
    rank = values[0].ndim if values else 0
    flat = np.concatenate([value.reshape(-1) for value in values]) if values else np.empty(0, dtype)
    if flat.dtype.name == "bfloat16":
        flat = flat.astype(np.float32)
    column = pa.array(flat)
    for axis in range(rank - 1, -1, -1):
        # for each list of this depth, the number of its elements
        counts = np.concatenate(
            [np.full(int(np.prod(value.shape[:axis], dtype=np.int64)), value.shape[axis], np.int64) for value in values]
        )
        offsets = np.concatenate([[0], np.cumsum(counts)])
        column = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), column)
    return column
