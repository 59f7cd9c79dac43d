"""Columns of Arrow as arrays, and back."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from rmsnorm_deploy.runtime.dataset.columns import cells, to_column

pa = pytest.importorskip("pyarrow")


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int64", "bool"])
@pytest.mark.parametrize("shapes", [[(), ()], [(3,), (1,), (0,)], [(2, 3), (1, 3)], [(2, 1, 3), (1, 2, 2)], [(2, 0)]])
def test_values_come_back_with_their_shapes(dtype: str, shapes: list[tuple[int, ...]]) -> None:
    random = np.random.default_rng(0)
    values = [(random.integers(0, 2, shape) if dtype == "bool" else random.integers(-9, 9, shape)) for shape in shapes]
    given = [np.asarray(value).astype(dtype) for value in values]
    found = cells(to_column(given), "x")
    for one, other in zip(found, given, strict=True):
        np.testing.assert_array_equal(one, other)
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


@pytest.mark.parametrize(
    "column",
    [
        pa.chunked_array([[[1, 2], [3]], [[4]]]), pa.array([[1, 2], [3], [4]], pa.large_list(pa.int64())),
        pa.array([[9], [1, 2], [3], [4]])[1:], pa.array([[1, 2], [3], [4]]),
    ],
)  # fmt: skip
def test_chunks_slices_and_kinds_of_lists(column: Any) -> None:
    assert [value.tolist() for value in cells(column, "x")] == [[1, 2], [3], [4]]


def test_lists_of_one_size_in_a_slice() -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array(range(8)), 2)[1:3]
    assert [value.tolist() for value in cells(column, "x")] == [[2, 3], [4, 5]]


def test_no_rows() -> None:
    assert cells(pa.chunked_array([], pa.list_(pa.int64())), "x") == []


def test_bfloat16_becomes_float32() -> None:
    column = to_column([np.array([1.5, 2], ml_dtypes.bfloat16)])
    assert (column.type.value_type, column.to_pylist()) == (pa.float32(), [[1.5, 2.0]])
