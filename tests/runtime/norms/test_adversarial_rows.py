"""The inputs that norms are tried on: every kind is there, in range, seeded, and where the next turn says."""

from __future__ import annotations

import numpy as np
import pytest

from rmsnorm_deploy.models.dtypes import numpy_dtype
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.runtime.accuracy.float_formats import format_of
from rmsnorm_deploy.runtime.norms.access import CalledNorm
from rmsnorm_deploy.runtime.norms.adversarial_rows import KINDS, adversarial, turns
from rmsnorm_deploy.runtime.rewriting import verify_norms

NAMES = [kind.name for kind in KINDS]
DTYPES = ("float32", "float16", "bfloat16")
SPEC = NormSpec(eps=1e-6)


def called(
    shape: tuple[int, ...] = (4, 10, 64), dtype: str = "float32", spec: NormSpec = SPEC, gate: str | None = None
) -> CalledNorm:
    return CalledNorm(("norm", 0), spec, shape, dtype, dtype, gate, True)


def rows_of(norm: CalledNorm, kind: str, seed: int = 0) -> np.ndarray:
    """The rows of one kind over all turns, widened."""
    found = []
    for turn in range(turns(norm)):
        feed, kinds = adversarial(norm, turn, seed)
        found.append(feed.x.astype(np.float64).reshape(len(kinds), -1)[kinds == NAMES.index(kind)])
    return np.concatenate(found)


@pytest.mark.parametrize(
    ("shape", "spec", "rows", "wanted"),
    [
        ((4, 10, 64), SPEC, 40, 1),
        ((10, 64), SPEC, 10, 1),
        ((3, 3, 64), SPEC, 9, 2),
        ((1, 3, 64), SPEC, 3, 4),
        ((64,), SPEC, 1, 10),
        ((2, 3, 4, 8), SPEC.replace(trailing_dims=2), 6, 2),
        ((0, 64), SPEC, 0, 0),
    ],
)
def test_the_turns_show_every_kind(shape: tuple[int, ...], spec: NormSpec, rows: int, wanted: int) -> None:
    norm = called(shape, spec=spec)
    assert turns(norm) == wanted
    seen: set[int] = set()
    for turn in range(wanted):
        feed, kinds = adversarial(norm, turn, seed=0)
        assert (feed.x.shape, feed.gate, kinds.shape) == (shape, None, (rows,))
        np.testing.assert_array_equal(kinds, (np.arange(rows) + turn * rows) % len(KINDS))
        seen |= set(kinds.tolist())
    assert seen == (set(range(len(KINDS))) if rows else set())


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_seeds_give_equal_bits(dtype: str) -> None:
    norm = called(dtype=dtype, gate="float32", spec=SPEC.replace(gate="after", activation="silu"))

    def made(turn: int, seed: int) -> tuple[bytes, bytes]:
        feed, _ = adversarial(norm, turn, seed)
        assert feed.gate is not None
        assert (feed.x.dtype, feed.gate.dtype) == (numpy_dtype(dtype), np.float32)
        assert feed.gate.shape == feed.x.shape
        assert 1.5 < feed.gate.std() < 2.5
        return feed.x.tobytes(), feed.gate.tobytes()

    assert made(0, 0) == made(0, 0)
    assert len({made(turn, seed) for turn, seed in ((0, 0), (1, 0), (0, 1))}) == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [name for name in NAMES if name != "NaN and Inf"])
def test_every_other_kind_is_finite_in_its_dtype(dtype: str, kind: str) -> None:
    rows = rows_of(called(dtype=dtype), kind)
    assert rows.shape == (4, 64)
    assert np.isfinite(rows).all()


def test_large_rows_overflow_when_they_are_squared_in_half() -> None:
    rows = rows_of(called(dtype="float16"), "large")
    assert 5e4 < np.abs(rows).max() < 6.5e4
    with np.errstate(over="ignore"):
        assert np.isinf(np.square(rows.astype(np.float16)).max(axis=1)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_rows_leave_room_for_their_squares_in_float32(dtype: str) -> None:
    rows = rows_of(called((40, 8192), dtype), "large").astype(np.float32)
    assert np.abs(rows).max() > 9e14
    assert np.isfinite(np.square(rows).sum(axis=1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_rows_are_the_ends_of_the_dtype(dtype: str) -> None:
    rows = rows_of(called(dtype=dtype), "largest")
    assert set(np.abs(rows).ravel()) == {format_of(dtype).largest}
    assert {np.sign(value) for value in rows.ravel()} == {-1.0, 1.0}


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-12])
def test_eps_decides_on_tiny_rows(eps: float) -> None:
    norm = called(spec=SPEC.replace(eps=eps))
    squares = np.concatenate([np.mean(rows_of(norm, "tiny", seed) ** 2, axis=1) for seed in range(8)])
    assert 1e-3 * eps < squares.min() < 0.1 * eps
    assert 0.5 * eps < squares.max() < 10 * eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_rows_are_below_the_smallest_normal(dtype: str) -> None:
    form = format_of(dtype)
    rows = np.abs(rows_of(called(dtype=dtype), "subnormal"))
    assert rows.max() <= 2.0**form.exponent_min
    assert np.count_nonzero(rows) > 0.9 * rows.size


def test_the_other_kinds_are_what_they_are_called() -> None:
    norm = called((40, 64))
    outliers = np.abs(rows_of(norm, "outlier channels"))
    assert 1 <= np.count_nonzero(outliers.max(axis=0) > 30.0) <= 2
    assert not rows_of(norm, "zeros").any()
    constant = rows_of(norm, "constant")
    assert np.array_equal(constant, np.broadcast_to(constant[:, :1], constant.shape))
    assert len(set(constant[:, 0])) == 4
    assert (np.count_nonzero(rows_of(norm, "single channel"), axis=1) == 1).all()
    lost = rows_of(norm, "NaN and Inf")
    assert (np.count_nonzero(~np.isfinite(lost), axis=1) == 1).all()
    assert (np.isnan(lost).sum(), np.isinf(lost).sum()) == (2, 2)


def test_one_input_of_a_proof_has_every_kind() -> None:
    """A kind more than there are rows would double the time of every proof."""
    assert len(KINDS) <= verify_norms._FIRST * verify_norms._OTHERS


def test_a_row_of_one_element_has_every_kind() -> None:
    norm = called((10, 1))
    assert turns(norm) == 1
    feed, _ = adversarial(norm, 0, seed=0)
    assert np.isfinite(feed.x[:-1]).all()
    assert feed.x[NAMES.index("largest"), 0] in (-format_of("float32").largest, format_of("float32").largest)


def test_every_kind_says_what_it_is_for() -> None:
    assert len(set(NAMES)) == len(NAMES) == 10
    assert len({kind.shows for kind in KINDS}) == 10
