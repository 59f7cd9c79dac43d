"""The check of one norm by itself: which rows it judges, what it holds them to, and what it says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rmsnorm_deploy.models.dtypes import HALF_DTYPES, NORM_DTYPES, numpy_dtype
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.runtime.accuracy.compare_output import OutputVerdict
from rmsnorm_deploy.runtime.accuracy.tolerances import Limits
from rmsnorm_deploy.runtime.norms.access import CalledNorm, NormFeed
from rmsnorm_deploy.runtime.norms.adversarial_rows import AS_IT_RUNS, KINDS, RowKind
from rmsnorm_deploy.runtime.norms.check_norm import (
    check_norm,
    check_sum,
    judge_norm,
    no_reference,
    sound_limit,
    summary_of,
)

WIDTH = 64
SPEC = NormSpec(eps=1e-6, scale="none")
IN_HALF = NormSpec(eps=1e-6, scale="none", order="no_upcast", statistics="input")
TAME, WILD = RowKind("tame rows", "", tame=True), RowKind("wild rows", "")
ONE_WAY = RowKind("one way", "", tame=True, sums_one_way=True)
NUMBER = {kind.name: number for number, kind in enumerate(KINDS)}


def called(dtype: str = "float32", spec: NormSpec = SPEC, shape: tuple[int, ...] = (12, WIDTH)) -> CalledNorm:
    gate = dtype if spec.has_gate else None
    return CalledNorm(("norm", 0), spec, shape, dtype, dtype, gate, forced=True)


def rows(count: int = 12, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def exact(feed: NormFeed) -> np.ndarray:
    """The norm in float64, its rows as they are."""
    x = feed.x.astype(np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def names(verdicts: list[OutputVerdict]) -> list[str]:
    return [verdict.name for verdict in verdicts]


# --------------------------------------------------------------------------------------------------- sound_limit


@pytest.mark.parametrize("dtype", NORM_DTYPES)
def test_sound_limits(dtype: str) -> None:
    """8 eps are 0.8% in float16; statistics in a half type may add up 16 times that."""
    wide = {"float16": 8.0, "bfloat16": 8.0, "float32": 512.0, "float64": 4096.0}[dtype]
    assert sound_limit(SPEC, dtype) == wide
    assert sound_limit(IN_HALF, dtype) == (128.0 if dtype in HALF_DTYPES else wide)


def test_no_reference_names_the_formula_and_the_distance() -> None:
    reason = no_reference(SPEC, 1234.5, "somebody's norm", "furlongs")
    assert all(part in reason for part in ("somebody's norm", "1.23e+03", "furlongs", SPEC.describe()))


# ---------------------------------------------------------------------------------------------------- judge_norm


def test_a_right_norm_passes_and_is_called_after_its_kind() -> None:
    expected = exact(NormFeed(rows()))
    verdict = judge_norm(TAME, called(), expected.astype(np.float32), expected, expected.astype(np.float32))
    assert verdict.passed
    assert verdict.name == "tame rows"


@pytest.mark.parametrize(("eps", "passed"), [(511.0, True), (513.0, None)])
def test_a_baseline_that_is_far_off_is_no_truth_on_tame_rows(eps: float, passed: bool | None) -> None:
    """All rows are of ones: the result is 1, and one element of the baseline is off by so many eps of float32."""
    expected = np.ones((12, WIDTH))
    off = expected.astype(np.float32)
    off[0, 0] += np.float32(eps * 2.0**-23)
    verdict = judge_norm(TAME, called(), off, expected, off, "the other")
    assert verdict.passed is passed
    assert ("the other's own norm" in verdict.reason) is not bool(passed)
    assert judge_norm(WILD, called(), off, expected, off).passed


@pytest.mark.parametrize(("spec", "passed"), [(SPEC, None), (IN_HALF, True)])
def test_statistics_in_a_half_type_may_be_further_off(spec: NormSpec, passed: bool | None) -> None:
    expected = np.ones((12, WIDTH))
    off = (expected * (1 + 20 * 2.0**-10)).astype(np.float16)
    assert judge_norm(TAME, called("float16", spec), off, expected, off).passed is passed


def test_a_wide_weight_makes_a_wide_result_of_half_roundings() -> None:
    """The result is float32, 4 eps of float16 off, which are 32768 of float32."""
    expected = np.ones((12, WIDTH))
    off = (expected * (1 + 4 * 2.0**-10)).astype(np.float32)
    follows = NormSpec(eps=1e-6, order="cast_then_scale")
    norm = CalledNorm(("norm", 0), follows, (12, WIDTH), "float16", "float32", None, forced=True)
    assert judge_norm(TAME, norm, off, expected, off).passed
    kept = CalledNorm(("norm", 0), SPEC, (12, WIDTH), "float16", "float32", None, forced=True)
    assert not judge_norm(TAME, kept, off, expected, off).passed


@pytest.mark.parametrize(("units", "passed"), [(1.0, True), (40.0, False)])
def test_roundings_that_all_go_one_way_have_more_room_in_float32(units: float, passed: bool) -> None:
    """The room is 32 eps and width/64 eps of the RMS and as much of the element: at 1, 33 + 33 eps of width 64."""
    expected = np.ones((12, WIDTH))
    baseline = expected.astype(np.float32)
    candidate = baseline + np.float32(units * 2.0**-23)
    assert judge_norm(TAME, called(), candidate, expected, baseline).passed is passed
    assert judge_norm(ONE_WAY, called(), candidate, expected, baseline).passed
    far = baseline + np.float32(67 * 2.0**-23)
    assert not judge_norm(ONE_WAY, called(), far, expected, baseline).passed


def test_the_room_for_plain_sums_grows_with_the_width() -> None:
    expected = np.ones((2, 8192))
    baseline = expected.astype(np.float32)
    norm = called(shape=(2, 8192))
    for units, passed in ((2 * (32 + 128) - 2, True), (2 * (32 + 128) + 2, False)):
        candidate = baseline + np.float32(units * 2.0**-23)
        assert judge_norm(ONE_WAY, norm, candidate, expected, baseline).passed is passed


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_types_are_held_to_ulps(dtype: str) -> None:
    """The truth is 1, so an ULP above it is eps: a whole one is more than 0.6, and less than 1.25 times PyTorch's."""
    kind = numpy_dtype(dtype)
    expected = np.ones((12, WIDTH))
    right, off = expected.astype(kind), expected.astype(kind)
    off[3, 3] = np.nextafter(kind.type(1), kind.type(2))
    verdict = judge_norm(TAME, called(dtype), off, expected, right)
    assert not verdict.passed
    assert "1 ULP" in verdict.reason
    assert "0.6 allowed" in verdict.reason
    assert judge_norm(TAME, called(dtype), off, expected, off).passed


def test_ulps_count_only_where_the_result_is_not_small() -> None:
    """One element is a hundredth of the others, so an error of several of its own ULPs is none of the row's."""
    expected = np.ones((12, WIDTH))
    expected[:, 0] = 2.0**-7
    baseline = expected.astype(np.float16)
    candidate = baseline.copy()
    candidate[:, 0] += np.float16(4 * 2.0**-17)
    assert judge_norm(TAME, called("float16"), candidate, expected, baseline).passed


def test_dtypes_that_do_not_match_fail_without_figures() -> None:
    expected = np.ones((12, WIDTH))
    verdict = judge_norm(TAME, called(), expected.astype(np.int64), expected, expected.astype(np.float32))
    assert (verdict.passed, verdict.figures) == (False, None)


# ---------------------------------------------------------------------------------------------------- check_norm


def checked(candidate: np.ndarray, x: np.ndarray, kinds: Any = None, **more: Any) -> list[OutputVerdict]:
    own = exact(NormFeed(x)).astype(np.float32)
    return check_norm(called(shape=x.shape), NormFeed(x), kinds, candidate, own, exact, **more)


def test_another_shape_is_one_failed_verdict() -> None:
    x = rows()
    (verdict,) = checked(np.zeros((12, WIDTH + 1), np.float32), x, baseline_name="the file")
    assert (verdict.name, verdict.passed, verdict.figures) == ("shape", False, None)
    assert "[12, 65]" in verdict.reason
    assert "the file" in verdict.reason


def test_a_verdict_for_each_kind_that_has_rows() -> None:
    x = rows()
    right = exact(NormFeed(x)).astype(np.float32)
    assert names(checked(right, x)) == [AS_IT_RUNS.name]
    kinds = np.array([NUMBER[name] for name in ("tiny", "normal", "zeros")] * 4)
    verdicts = checked(right, x, kinds)
    assert names(verdicts) == ["normal", "tiny", "zeros"]
    assert all(verdict.passed for verdict in verdicts)


def test_a_wrong_row_fails_its_own_kind_only() -> None:
    x = rows()
    wrong = exact(NormFeed(x)).astype(np.float32)
    wrong[4] *= np.float32(1.01)
    kinds = np.array([NUMBER["normal"], NUMBER["tiny"]] * 6)
    assert [(v.name, v.passed) for v in checked(wrong, x, kinds)] == [("normal", False), ("tiny", True)]


def test_rows_of_several_dims_and_gates_go_to_the_reference_together() -> None:
    spec = NormSpec(eps=1e-6, scale="none", trailing_dims=2, gate="before", activation="silu")
    x, gate = rows().reshape(4, 3, 8, 8), rows(seed=1).reshape(4, 3, 8, 8)
    seen: list[tuple[Any, ...]] = []

    def reference(feed: NormFeed) -> np.ndarray:
        assert feed.gate is not None
        seen.append((feed.x.shape, feed.gate.shape))
        assert np.array_equal(feed.gate.reshape(-1, WIDTH), gate.reshape(-1, WIDTH)[1::2])
        return np.ones(feed.x.shape)

    ones = np.ones(x.shape, np.float32)
    norm = called(spec=spec, shape=x.shape)
    kinds = np.array([KINDS.index(KINDS[-1]), NUMBER["normal"]] * 6)
    kinds[::2] = len(KINDS)  # of no kind at all
    verdicts = check_norm(norm, NormFeed(x, gate), kinds, ones, ones, reference)
    assert names(verdicts) == ["normal"]
    assert seen == [((6, 8, 8), (6, 8, 8))]


@pytest.mark.parametrize(("width", "judged"), [(4096, 4), (2048, 4), (1024, 8)])
def test_of_each_kind_as_many_rows_are_judged_as_say_enough(width: int, judged: int) -> None:
    counts: list[int] = []

    def reference(feed: NormFeed) -> np.ndarray:
        counts.append(len(feed.x))
        return np.ones(feed.x.shape)

    ones = np.ones((20, width), np.float32)
    kinds = np.full(20, NUMBER["normal"])
    check_norm(called(shape=ones.shape), NormFeed(ones), kinds, ones, ones, reference)
    assert counts == [judged]


def test_of_what_the_model_has_the_largest_and_smallest_rows_are_among_those_judged() -> None:
    """Of 200 rows of 4096, 16 are judged: 14 evenly spaced and the two at the ends."""
    x = np.ones((200, 4096), np.float32)
    x[77, 5], x[123] = -50.0, 0.01
    seen: list[np.ndarray] = []

    def reference(feed: NormFeed) -> np.ndarray:
        seen.append(feed.x)
        return np.ones(feed.x.shape)

    ones = np.ones_like(x)
    check_norm(called(shape=x.shape), NormFeed(x), None, ones, ones, reference)
    assert len(seen[0]) == 16
    assert np.abs(seen[0]).max() == 50.0
    assert np.abs(seen[0]).max(axis=1).min() == np.float32(0.01)


def test_no_rows_give_no_verdict_or_an_empty_one() -> None:
    x = np.zeros((0, WIDTH), np.float32)
    assert all(verdict.passed for verdict in checked(x, x))
    assert checked(x, x, np.zeros(0, np.int64)) == []


def overflowing() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x; a result that overflowed on row 0, one of kind `large`; and the kinds."""
    x = rows()
    y = exact(NormFeed(x)).astype(np.float32)
    y[0] = np.nan
    return x, y, np.array([NUMBER["large"], *[NUMBER["normal"]] * 11])


def test_a_second_baseline_excuses_what_overflows_on_rows_that_are_not_tame() -> None:
    x, candidate, kinds = overflowing()

    def second(feed: NormFeed) -> np.ndarray:
        return np.full(feed.x.shape, np.nan, np.float32)

    first = checked(candidate, x, kinds)
    assert [(v.name, v.passed) for v in first] == [("normal", True), ("large", False)]
    assert all(verdict.passed for verdict in checked(candidate, x, kinds, second_baseline=second))


def test_a_second_baseline_excuses_nothing_on_tame_rows() -> None:
    x, candidate, _ = overflowing()
    kinds = np.full(12, NUMBER["normal"])

    def second(feed: NormFeed) -> np.ndarray:
        raise AssertionError("not asked")

    (verdict,) = checked(candidate, x, kinds, second_baseline=second)
    assert not verdict.passed


# ----------------------------------------------------------------------------------------- check_sum, summary_of


def test_a_sum_is_right_to_the_bit_or_wrong() -> None:
    total = np.array([1.0, np.nan, np.inf], np.float32)
    assert check_sum(total, total.copy()) == []
    off = total.copy()
    off[0] = np.nextafter(np.float32(1), np.float32(2))
    for other in (off, total[:2], np.array([1.0, np.nan, -np.inf], np.float32)):
        (verdict,) = check_sum(other, total)
        assert (verdict.name, verdict.passed) == ("sum", False)


def test_a_sum_may_be_wider() -> None:
    assert check_sum(np.array([0.1], np.float16).astype(np.float32), np.array([0.1], np.float16)) == []


def verdict(name: str, passed: bool, reason: str = "") -> OutputVerdict:
    return OutputVerdict(name, passed, reason, None, None)


def test_the_summary_of_what_passed() -> None:
    passed, reason = summary_of([verdict("normal", True), verdict("tiny", True)])
    assert passed
    assert "2 kinds" in reason
    assert summary_of([])[0]


def test_the_summary_names_what_failed_once_and_the_first_reason() -> None:
    failed = [verdict("tiny", False, "because"), verdict("normal", True), verdict("zeros", False, "other")]
    passed, reason = summary_of([*failed, verdict("tiny", False, "again")])
    assert not passed
    assert "tiny, zeros" in reason
    assert "tiny: because" in reason
    assert "other" not in reason
    assert "normal" not in reason


def test_the_limits_are_numbers() -> None:
    assert all(math.isfinite(sound_limit(SPEC, dtype)) for dtype in NORM_DTYPES)


# -------------------------------------------------------------------------------------------------- explicit limits


def test_limits_replace_the_comparison_with_the_baseline() -> None:
    x = rows()
    off = (exact(NormFeed(x)) * 1.01).astype(np.float32)
    assert not checked(off, x)[0].passed
    (verdict,) = checked(off, x, limits=Limits(max_rms=0.011))
    assert verdict.passed
    (verdict,) = checked(off, x, limits=Limits(max_rms=0.009))
    assert (verdict.passed, verdict.reason) == (False, "RMS error / row RMS 0.01 of at most 0.009 allowed")


@pytest.mark.parametrize(("kind", "passed"), [("normal", False), ("largest", True)])
def test_where_pytorch_is_wrong_too_a_result_as_good_as_its_own_passes(kind: str, passed: bool) -> None:
    """Squares may overflow in PyTorch itself, so a limit alone would fail every file there."""
    x = rows()
    kinds = np.full(len(x), NUMBER[kind])
    expected = exact(NormFeed(x))
    off = (expected * 1.01).astype(np.float32)
    (verdict,) = check_norm(
        called(shape=x.shape), NormFeed(x), kinds, off, off, exact, limits=Limits(max_rms=1e-3)
    )  # fmt: skip
    assert verdict.passed is passed
