"""What is kept at norms comes back as it was, and its folder goes."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from rmsnorm_deploy.runtime.norms.activation_store import ActivationStore

KEY = ("model.layers.0.norm", 0)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int64])
def test_an_array_comes_back_with_its_dtype_shape_and_bits(dtype: type) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    with ActivationStore() as store:
        store.put(KEY, "x", array)
        found = store.get(KEY, "x")
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()


def test_norms_calls_and_roles_are_apart() -> None:
    with ActivationStore() as store:
        places = [(("a", 0), "x"), (("a", 1), "x"), (("b", 0), "x"), (("a", 0), "y")]
        for number, (key, role) in enumerate(places):
            assert not store.has(key, role)
            store.put(key, role, np.array([number]))
        assert [int(store.get(key, role)[0]) for key, role in places] == [0, 1, 2, 3]
        assert all(store.has(key, role) for key, role in places)
        assert not store.has(("b", 0), "y")


def test_the_later_array_replaces_the_earlier() -> None:
    with ActivationStore() as store:
        store.put(KEY, "x", np.zeros(3))
        store.put(KEY, "x", np.ones((2, 2)))
        assert np.array_equal(store.get(KEY, "x"), np.ones((2, 2)))


def test_arrays_are_mapped_and_cannot_be_written() -> None:
    with ActivationStore() as store:
        store.put(KEY, "x", np.zeros(3))
        found = store.get(KEY, "x")
        assert isinstance(found, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            found[0] = 1.0


def test_what_is_not_there_is_a_key_error() -> None:
    with ActivationStore() as store, pytest.raises(KeyError, match="fed_x"):
        store.get(KEY, "fed_x")


def test_the_folder_goes_at_the_end_and_after_an_error() -> None:
    def fill(store: ActivationStore) -> Path:
        store.put(KEY, "x", np.zeros(3))
        return Path(str(store.get(KEY, "x").filename)).parent  # type: ignore[attr-defined]

    with ActivationStore() as store:
        folder = fill(store)
        assert folder.is_dir()
    assert not folder.exists()
    assert not store.has(KEY, "x")

    def failing() -> None:
        nonlocal folder
        with ActivationStore() as store:
            folder = fill(store)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        failing()
    assert not folder.exists()
