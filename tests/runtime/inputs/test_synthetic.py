"""Made-up inputs: shapes from the names of dims, values from the names of inputs; and given ones cast."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from rmsnorm_deploy.export.graph.cache_names import present_to_past
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.inputs.synthetic import (
    cast_feeds,
    is_past,
    make_feeds,
    with_empty_cache,
)
from rmsnorm_deploy.runtime.runners.base import TensorInfo

TOKENS = ("batch", "sequence")
IDS = TensorInfo("input_ids", "int64", TOKENS)
KEY = TensorInfo("past_key_values.0.key", "float16", ("batch", 2, "past_sequence_length", 4))


def made(info: TensorInfo, batch: int = 3, length: int = 10, seed: int = 0, vocabulary: int | None = 7) -> Any:
    return make_feeds([info], batch, length, seed, vocabulary)[info.name]


# ---------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        (("batch_size", "sequence_length", 4), (3, 10, 4)),
        (("N", "T", 4), (3, 10, 4)),
        ((None, None), (3, 10)),
        (("seq", "batch"), (10, 3)),
        (("length",), (10,)),
        ((5, "batch"), (5, 3)),
        ((1, "past_sequence_length"), (1, 0)),
        (("batch", "past_sequence_length + sequence_length"), (3, 10)),
        (("batch", "past_length + 1"), (3, 1)),
        (("T", "2*T", "T // 2 + 1", "max(4, T)"), (3, 6, 2, 4)),
        (("seq-len", "batch size", "N/A"), (10, 3, 10)),
        ((), ()),
    ],
)
def test_open_dims(dims: tuple[Any, ...], shape: tuple[int, ...]) -> None:
    assert made(TensorInfo("x", "float32", dims)).shape == shape


def test_a_name_has_one_size_wherever_it_stands() -> None:
    image = TensorInfo("hidden_states", "float32", ("hidden_states_dim_0", "patches", 4))
    ids = TensorInfo("img_ids", "float32", ("patches", 3))
    pairs = TensorInfo("pairs", "float32", ("2*patches", "patches + past_length"))
    feeds = make_feeds([image, ids, pairs], 3, 10, 0, None)
    assert {name: array.shape for name, array in feeds.items()} == {
        "hidden_states": (3, 10, 4), "img_ids": (10, 3), "pairs": (20, 10),
    }  # fmt: skip
    given = make_feeds([image, ids], 3, 10, 0, None, sizes={"patches": 6})
    assert given["img_ids"].shape == (6, 3)


def test_an_input_of_open_rank_is_refused() -> None:
    with pytest.raises(UsageError, match="rows"):
        made(TensorInfo("rows", "float32", None))


# ---------------------------------------------------------------------------------------------------------- values


def test_tokens_are_uniform_over_the_vocabulary() -> None:
    ids = made(IDS, 40, 100)
    counts = np.bincount(ids.reshape(-1), minlength=7)
    assert ids.dtype == np.int64
    assert len(counts) == 7
    assert counts.min() > 4000 / 7 * 0.8


@pytest.mark.parametrize("name", ["input_ids", "decoder_input_ids"])
def test_tokens_without_a_vocabulary_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        made(TensorInfo(name, "int64", TOKENS), vocabulary=None)


def test_other_whole_numbers_are_tokens_where_there_is_a_vocabulary() -> None:
    ids = made(TensorInfo("anything", "int32", TOKENS))
    assert ids.dtype == np.int32
    assert 0 <= ids.min() <= ids.max() < 7
    with pytest.raises(UsageError, match="anything"):
        made(TensorInfo("anything", "int32", TOKENS), vocabulary=None)


def test_positions_count_from_zero_in_every_row() -> None:
    assert made(TensorInfo("position_ids", "int64", TOKENS), 2, 4).tolist() == [[0, 1, 2, 3]] * 2
    assert made(TensorInfo("position_ids", "int64", (3, "batch", "sequence")), 2, 4).shape == (3, 2, 4)
    positions = made(TensorInfo("position_ids", "int64", TOKENS), 2, 4)
    positions[0, 0] = 9  # not a view that all rows share
    assert positions[1, 0] == 0


@pytest.mark.parametrize("dtype", ["int64", "float32", "bool"])
@pytest.mark.parametrize(("batch", "length", "zeros"), [(1, 20, 0), (2, 7, 0), (2, 8, 2), (3, 33, 2)])
def test_masks_are_ones_with_padding_at_the_end_of_the_last_of_a_batch(
    dtype: str, batch: int, length: int, zeros: int
) -> None:
    mask = made(TensorInfo("attention_mask", dtype, TOKENS), batch, length)
    assert mask.dtype == np.dtype(dtype)
    expected = np.ones((batch, length))
    if zeros:
        expected[-1, -zeros:] = 0
    assert np.array_equal(mask, expected)


def test_masks_by_the_end_of_their_name_or_as_booleans() -> None:
    assert made(TensorInfo("encoder_attention_mask", "int64", TOKENS))[-1, -1] == 0
    assert made(TensorInfo("valid", "bool", TOKENS))[-1, -1] == 0
    assert made(TensorInfo("valid", "bool", ("batch", "length", 9))).all()


def test_the_cache_starts_empty() -> None:
    cache = made(KEY)
    assert (cache.shape, cache.dtype) == ((3, 2, 0, 4), np.float16)
    state = made(TensorInfo("past_key_values.0.value", "float32", (2, 3)))
    assert np.array_equal(state, np.zeros((2, 3)))


# ---------------------------------------------------------------------------------------------------------- floats


@pytest.mark.parametrize(
    ("batch", "length", "seed", "size"),
    [(1, 7, 0, 1000.0), (1, 3, 0, 1000.0), (1, 2, 0, 1e-4), (1, 1, 0, 1e-4), (1, 7, 1, 1e-4), (3, 7, 1, 1000.0),
     (3, 7, 2, 1e-4), (1, 1, 2, 1000.0)],
)  # fmt: skip
def test_the_character_of_floats(batch: int, length: int, seed: int, size: float) -> None:
    values = made(TensorInfo("x", "float64", ("batch", "sequence", 512)), batch, length, seed)
    assert np.sqrt(np.mean(values**2)) == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize(("batch", "length", "seed"), [(2, 40, 0), (1, 40, 2)])
def test_two_outlier_channels(batch: int, length: int, seed: int) -> None:
    values = made(TensorInfo("x", "float64", ("batch", "sequence", 64)), batch, length, seed)
    sizes = np.sqrt(np.mean(values.reshape(-1, 64) ** 2, axis=0))
    outliers = sizes > 10.0
    assert np.count_nonzero(outliers) == 2
    assert sizes[outliers] == pytest.approx([30.0, 30.0], rel=0.3)
    assert sizes[~outliers].max() < 2.0


def test_few_channels_have_no_outliers() -> None:
    assert np.abs(made(TensorInfo("x", "float64", ("batch", "sequence", 7)))).max() < 10.0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_floats_have_the_dtype_of_the_input(dtype: str) -> None:
    values = made(TensorInfo("x", dtype, ("batch", "sequence", 8)), 1, 7)
    assert values.dtype.name == dtype
    assert np.isfinite(values.astype(np.float64)).all()


def test_equal_seeds_give_equal_inputs_and_shapes_have_their_own() -> None:
    info = TensorInfo("x", "float32", ("batch", "sequence", 8))
    assert np.array_equal(made(info), made(info))
    assert not np.array_equal(made(info, length=9)[:, :5], made(info)[:, :5])


def test_inputs_of_one_call_are_independent() -> None:
    infos = [TensorInfo(name, "float32", TOKENS) for name in "ab"]
    feeds = make_feeds(infos, 3, 10, 0, None)
    assert list(feeds) == ["a", "b"]
    assert not np.array_equal(feeds["a"], feeds["b"])


# ----------------------------------------------------------------------------------------------------------- cache


def test_names_of_the_cache() -> None:
    assert is_past("past_key_values.3.value")
    assert not is_past("past")
    assert not is_past("present.3.value")


def test_what_comes_out_goes_in_again() -> None:
    a, b = np.zeros(1), np.ones(1)
    found = present_to_past({"present.0.key": a, "logits": b, "present.11.value": b})
    assert list(found) == ["past_key_values.0.key", "past_key_values.11.value"]
    assert found["past_key_values.0.key"] is a


def test_an_empty_cache_is_added_where_it_is_missing() -> None:
    ids = np.ones((5, 2), np.int64)
    found = with_empty_cache({"input_ids": ids}, [IDS, KEY])
    assert found["past_key_values.0.key"].shape == (5, 2, 0, 4)
    assert found["input_ids"] is ids


def test_a_cache_that_is_given_or_not_read_stays_as_it_is() -> None:
    ids, own = np.ones((5, 2), np.int64), np.ones((5, 2, 3, 4), np.float16)
    found = with_empty_cache({"input_ids": ids, KEY.name: own}, [IDS, KEY])
    assert found[KEY.name] is own
    assert with_empty_cache({"input_ids": ids}, [IDS]) == {"input_ids": ids}


@pytest.mark.parametrize("feeds", [{}, {"input_ids": np.ones(3, np.int64)}, {"x": np.ones((5, 2))}])
def test_without_tokens_there_is_no_batch_to_make_a_cache_for(feeds: dict[str, Any]) -> None:
    assert list(with_empty_cache(feeds, [IDS, KEY])) == list(feeds)


# ------------------------------------------------------------------------------------------------------ cast_feeds


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    return cast_feeds({"x": array}, [TensorInfo("x", dtype, None)])["x"]


@pytest.mark.parametrize(
    ("array", "dtype", "expected"),
    [
        (np.array([1.0001], np.float32), "float16", np.array([1.0], np.float16)),
        (np.array([1.0001], np.float32), "bfloat16", np.array([1.0], ml_dtypes.bfloat16)),
        (np.array([1e6], np.float32), "float16", np.array([np.inf], np.float16)),
        (np.array([7], np.int64), "int32", np.array([7], np.int32)),
        (np.array([-7], np.int32), "int64", np.array([-7], np.int64)),
    ],
)
def test_casts_that_are_safe(array: np.ndarray, dtype: str, expected: np.ndarray) -> None:
    found = cast(array, dtype)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.array([2**40], np.int64), "int32"),
        (np.array([1.0], np.float64), "float16"),
        (np.array([1.0], np.float16), "float32"),
        (np.array([1], np.int64), "float32"),
        (np.array([1.0], np.float32), "int64"),
        (np.array([1.0], np.float32), "any"),
        (np.array([True]), "int64"),
    ],
)
def test_what_is_not_safe_stays_as_it_is(array: np.ndarray, dtype: str) -> None:
    assert cast(array, dtype) is array


def test_feeds_that_no_input_has_stay_as_they_are() -> None:
    array = np.ones(2, np.float32)
    assert cast_feeds({"other": array}, [TensorInfo("x", "float16", None)])["other"] is array
