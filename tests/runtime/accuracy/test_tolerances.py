"""The table of tolerances, the widening for few elements, and limits; how texts are read is in test_pass_rules."""

from __future__ import annotations

import math

import pytest

from rmsnorm_deploy.models.dtypes import NORM_DTYPES
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.accuracy.error_stats import Figures
from rmsnorm_deploy.runtime.accuracy.float_formats import FORMATS
from rmsnorm_deploy.runtime.accuracy.tolerances import (
    EVERY_OUTPUT,
    FIGURE_LIMITS,
    KINDS_OF_LIMITS,
    NORMS,
    PARTS,
    SEGMENTS,
    TOLERANCES,
    Limits,
    Tolerance,
    check_limits,
    limits_of,
    parse_limits,
    small_sample,
)


def test_every_dtype_has_a_row_under_its_own_name() -> None:
    assert set(TOLERANCES) == set(NORM_DTYPES)
    assert all(name == row.dtype for name, row in TOLERANCES.items())


@pytest.mark.parametrize("row", TOLERANCES.values(), ids=TOLERANCES.keys())
def test_a_row_asks_more_of_the_mean_than_of_the_maximum_and_says_why(row: Tolerance) -> None:
    assert 1.0 < row.factor_rms <= row.factor_max
    assert 0.0 < row.floor_rms <= row.floor_max
    assert row.reason.endswith(".")


@pytest.mark.parametrize(
    ("dtype", "share"), [("float16", 2e-3), ("bfloat16", 0.0157), ("float32", 4e-6), ("float64", 2.3e-13)]
)
def test_the_floor_as_a_share_of_the_row(dtype: str, share: float) -> None:
    """What a candidate may be off by where PyTorch is exact, as the reasons of float32 and float64 state it."""
    assert TOLERANCES[dtype].floor_max * FORMATS[dtype].eps == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize(("count", "factor"), [(4096, 1.06), (16, 2.52), (1, 40.4), (0, 40.4)])
def test_small_sample_as_documented(count: int, factor: float) -> None:
    assert small_sample(count) == pytest.approx(factor, rel=1e-2)


def test_small_sample_is_one_over_the_root_of_the_count_in_logarithms() -> None:
    assert math.log(small_sample(100)) == pytest.approx(0.37, rel=1e-12)
    assert math.log(small_sample(400)) == pytest.approx(0.185, rel=1e-12)


@pytest.mark.parametrize(
    ("limits", "absolute", "is_set", "text"),
    [
        (Limits(), False, False, ""),
        (Limits(ulp=3.0), False, True, "ULP error <= 3"),
        (Limits(atol=1e-3), True, True, "|error| <= 0.001 + 0 x |reference|"),
        (Limits(rtol=0.5), True, True, "|error| <= 0 + 0.5 x |reference|"),
        (Limits(atol=0.0), True, True, "|error| <= 0 + 0 x |reference|"),
        (Limits(1.0, 2.0, 0.0), True, True, "|error| <= 1 + 2 x |reference| and ULP error <= 0"),
    ],
)
def test_limits_say_what_they_are(limits: Limits, absolute: bool, is_set: bool, text: str) -> None:
    assert (limits.is_absolute, limits.is_set, limits.describe()) == (absolute, is_set, text)


@pytest.mark.parametrize("label", ["atol", "rtol", "ulp"])
def test_infinity_is_a_limit_and_minus_infinity_is_not(label: str) -> None:
    assert Limits(**{label: math.inf}).is_set
    with pytest.raises(UsageError, match=label):
        Limits(**{label: -math.inf})


def test_each_kind_of_limit_is_inherited_by_itself() -> None:
    limits = parse_limits(["1", "a:2"], ["b:3"], ["4"])
    assert limits[EVERY_OUTPUT] == Limits(atol=1.0, ulp=4.0)
    assert limits["a"] == Limits(atol=2.0, ulp=4.0)
    assert limits["b"] == Limits(atol=1.0, rtol=3.0, ulp=4.0)


def test_limits_of_an_output_without_any() -> None:
    assert limits_of({}, "y") is None
    assert limits_of({"x": Limits(ulp=1.0)}, "y") is None
    assert limits_of({EVERY_OUTPUT: Limits(ulp=2.0), "x": Limits(ulp=1.0)}, "y") == Limits(ulp=2.0)


def test_a_limit_may_be_written_as_infinity() -> None:
    assert parse_limits(["inf"], [], []) == {EVERY_OUTPUT: Limits(atol=math.inf)}


@pytest.mark.parametrize("text", ["-inf", "y:nan", "y:", ":1"])
def test_no_limit(text: str) -> None:
    with pytest.raises(UsageError, match="--atol"):
        parse_limits([text], [], [])


def test_check_limits_names_what_is_not_there_and_what_is() -> None:
    with pytest.raises(UsageError) as error:
        check_limits({"a": Limits(ulp=1.0), "b": Limits(ulp=1.0), EVERY_OUTPUT: Limits()}, iter(["b", "logits"]))
    assert "for a," in str(error.value)
    assert "b, logits" in str(error.value)
    with pytest.raises(UsageError, match="none"):
        check_limits({"a": Limits(ulp=1.0)}, [])


# ------------------------------------------------------------------------------------------- limits on statistics


@pytest.mark.parametrize(
    ("label", "value", "expected"),
    [
        ("min_cosine", 1.5, "expected a number from 0 to 1"), ("min_top1", -0.1, "expected a number from 0 to 1"),
        ("min_top1", math.nan, "expected a number from 0 to 1"), ("max_kl", -1.0, "expected a number of at least 0"),
        ("max_rel", math.nan, "expected a number of at least 0"), ("max_rms", -1.0, "expected a number of at least 0"),
    ],
)  # fmt: skip
def test_a_limit_on_a_statistic_is_in_its_range(label: str, value: float, expected: str) -> None:
    with pytest.raises(UsageError, match=f"{label}: {expected}, got {value}"):
        Limits(**{label: value})
    with pytest.raises(UsageError, match=f"--{label.replace('_', '-')} y:{value}: {expected}, such as"):
        parse_limits(**{label: [f"y:{value}"]})


def test_limits_on_elements_and_on_statistics() -> None:
    limits = Limits(atol=1.0, min_top1=0.9, max_rms=0.1)
    assert (limits.is_set, limits.on_elements, limits.on_logits) == (True, True, ["min_top1"])
    assert limits.on_figures == {"min_top1": 0.9, "max_rms": 0.1}
    assert limits.without_logits() == Limits(atol=1.0, max_rms=0.1)
    assert Limits(max_rms=0.2, max_kl=1.0).over(limits) == Limits(atol=1.0, min_top1=0.9, max_rms=0.2, max_kl=1.0)
    assert (Limits(max_kl=0.1).is_set, Limits(max_kl=0.1).on_elements) == (True, False)


def test_every_limit_on_a_statistic_names_a_field_of_the_figures() -> None:
    assert set(KINDS_OF_LIMITS) == {"atol", "rtol", "ulp", *FIGURE_LIMITS}
    assert {row.figure for row in FIGURE_LIMITS.values()} <= set(Figures.__dataclass_fields__)
    assert all(row.at_least is label.startswith("min_") for label, row in FIGURE_LIMITS.items())


def test_norms_and_segments_take_no_limits_of_outputs() -> None:
    limits = parse_limits(["1"], min_cosine=["@segments:0.9", "0.99"], max_rms=["@norms:1e-3"])
    assert limits[NORMS] == Limits(max_rms=1e-3)
    assert limits[SEGMENTS] == Limits(min_cosine=0.9)
    assert limits[EVERY_OUTPUT] == Limits(atol=1.0, min_cosine=0.99)
    assert limits_of({EVERY_OUTPUT: Limits(atol=1.0)}, NORMS) is None


def test_limits_on_logits_for_every_output_are_for_logits() -> None:
    limits = parse_limits(min_top1=["0.9"], max_rel=["y:1"])
    assert limits["y"] == Limits(max_rel=1.0)
    assert limits_of(limits, "lm_logits") == Limits(min_top1=0.9)
    assert limits_of(limits, "present.0.key") is None
    check_limits(limits, ["y", "logits"])


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"y": Limits(min_top1=0.9)}, "--min-top1: expected an output that holds logits.*got y"),
        ({EVERY_OUTPUT: Limits(max_kl=0.9)}, "--max-kl: expected an output that holds logits.*got y, z"),
        ({SEGMENTS: Limits(max_kl=0.9)}, "--max-kl: expected an output that holds logits.*got @segments"),
    ],
)
def test_limits_on_logits_need_logits(limits: dict[str, Limits], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        check_limits(limits, ["y", "z"], PARTS)


def test_norms_and_segments_are_names_only_where_there_are_any() -> None:
    check_limits({NORMS: Limits(atol=1.0)}, ["y"], PARTS)
    with pytest.raises(UsageError, match="given for @norms, but there is no such output"):
        check_limits({NORMS: Limits(atol=1.0)}, ["y"])
    with pytest.raises(UsageError, match="Limits may also be on @norms and @segments"):
        check_limits({"@norm": Limits(atol=1.0)}, ["y"], PARTS)
