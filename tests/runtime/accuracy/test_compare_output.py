"""Error figures by hand, and verdicts that are known beforehand."""

from __future__ import annotations

import json
import math
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.accuracy import errors as measured
from rmsnorm_deploy.runtime.accuracy.compare_output import Figures, figures, judge
from rmsnorm_deploy.runtime.accuracy.error_stats import HISTOGRAM_EDGES, Worst, json_value
from rmsnorm_deploy.runtime.accuracy.float_formats import FORMATS, ulp_size
from rmsnorm_deploy.runtime.accuracy.tolerances import TOLERANCES, Limits, small_sample

BF16 = ml_dtypes.bfloat16
DTYPES = [np.float16, BF16, np.float32, np.float64]


@pytest.mark.parametrize(
    ("value", "dtype", "ulp"),
    [
        (1.0, "float16", 2.0**-10),
        (1.0, "bfloat16", 2.0**-7),
        (1.0, "float32", 2.0**-23),
        (1.0, "float64", 2.0**-52),
        (-3.0, "float16", 2.0**-9),
        (0.999, "float16", 2.0**-11),
        (2.0, "float32", 2.0**-22),
        (0.0, "float16", 2.0**-24),
        (1e-7, "float16", 2.0**-24),
        (6.2e-5, "float16", 2.0**-24),
        (0.0, "bfloat16", 2.0**-133),
        (1e-40, "float32", 2.0**-149),
        (0.0, "float64", 5e-324),
        (65504.0, "float16", 32.0),
        (1e9, "float16", 32.0),
        (-math.inf, "bfloat16", 2.0**120),
    ],
)
def test_ulp_size_is_the_spacing_of_the_dtype(value: float, dtype: str, ulp: float) -> None:
    assert float(ulp_size(np.array(value), dtype)) == ulp


@pytest.mark.parametrize("dtype", DTYPES)
def test_ulp_size_is_the_distance_to_the_next_value(dtype: Any) -> None:
    values = np.abs(np.random.default_rng(0).standard_normal(1000) * 10.0 ** np.arange(-4, 4).repeat(125)).astype(dtype)
    bits = f"u{values.dtype.itemsize}"
    following = (values.view(bits) + np.ones((), bits)).view(values.dtype)
    expected = following.astype(np.float64) - values.astype(np.float64)
    assert np.array_equal(ulp_size(values.astype(np.float64), dtype), expected)


def test_ulp_size_in_float64_is_numpys_spacing() -> None:
    values = np.array([1.0, 0.1, 1e300, 1e-310, 0.0])
    assert np.array_equal(ulp_size(values, np.float64), np.spacing(values))


def test_ulp_size_keeps_nan_and_refuses_other_dtypes() -> None:
    assert np.isnan(ulp_size(np.array([np.nan]), np.float32)).all()
    with pytest.raises(UsageError, match="float8_e4m3fn"):
        ulp_size(np.array([1.0]), ml_dtypes.float8_e4m3fn)


def test_figures_by_hand() -> None:
    reference = np.array([[3.0, 4.0], [0.0, 1.0]])
    candidate = np.array([[3.0, 4.0 + 2**-7], [0.0, 1.0 - 2**-10]], np.float16)
    baseline = np.array([[3.0, 4.0], [-0.0, 1.0]], np.float16)
    result = figures(candidate, reference, baseline)
    # 4 has an ULP of 2**-8 in float16, 1 one of 2**-10.
    assert result.max_ulp == 2.0
    assert result.mean_ulp == (2.0 + 1.0) / 4
    assert result.p999_ulp == 2.0
    assert result.max_abs == 2**-7
    assert result.max_rel_row == pytest.approx(2**-7 / math.sqrt(12.5))
    assert result.differing == 3
    assert result.nonfinite_agree
    assert result.count == 4
    expected = (9 + 4 * (4 + 2**-7) + 1 - 2**-10) / math.sqrt(26 * (9 + (4 + 2**-7) ** 2 + (1 - 2**-10) ** 2))
    assert result.cosine == pytest.approx(expected, abs=1e-15)


def test_figures_of_bfloat16_and_without_baseline() -> None:
    result = figures(np.array([1.0, 1.0078125], BF16), np.array([1.0, 1.0]))
    assert (result.max_ulp, result.mean_ulp, result.differing) == (1.0, 0.5, None)


def test_figures_of_an_element_that_is_nan_where_the_reference_is_finite() -> None:
    result = figures(np.array([1.0, np.nan, 3.0], np.float32), np.array([1.0, 2.0, 3.0]))
    assert not result.nonfinite_agree
    assert result.max_ulp == math.inf
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["max_ulp"] == "inf"


def test_figures_leave_nonfinite_reference_out_of_the_numbers() -> None:
    reference = np.array([np.nan, np.inf, -np.inf, 1.0])
    result = figures(reference.astype(np.float16), reference)
    assert result.nonfinite_agree
    assert (result.max_ulp, result.cosine) == (0.0, 1.0)


@pytest.mark.parametrize("wrong", [[np.inf, 1.0], [1.0, -np.inf], [1.0, np.nan], [1.0, 5.0]])
def test_figures_see_nonfinite_values_out_of_place(wrong: list[float]) -> None:
    assert not figures(np.array(wrong, np.float32), np.array([1.0, np.inf])).nonfinite_agree


def test_figures_take_the_infinity_that_the_reference_rounds_to() -> None:
    reference = np.array([65519.0, 65520.0, -1e6])
    assert figures(np.array([65504.0, np.inf, -np.inf], np.float16), reference).nonfinite_agree
    assert not figures(np.array([np.inf, np.inf, -np.inf], np.float16), reference).nonfinite_agree
    assert not figures(np.array([65504.0, np.inf, np.inf], np.float16), reference).nonfinite_agree
    # The largest value is as near as float16 comes to these.
    assert figures(np.array([65504.0, 65504.0, -65504.0], np.float16), reference).max_ulp == 0.0


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)])
def test_figures_of_empty_arrays(shape: tuple[int, ...]) -> None:
    result = figures(np.zeros(shape, np.float16), np.zeros(shape), np.zeros(shape, np.float16))
    assert (result.count, result.max_ulp, result.cosine, result.differing) == (0, 0.0, 1.0, 0)


def test_figures_of_scalars_zeros_and_integers() -> None:
    assert figures(np.array(1.5, np.float32), np.array(1.5)).max_ulp == 0.0
    zeros = figures(np.zeros((2, 3), np.float32), np.zeros((2, 3)))
    assert (zeros.max_rel_row, zeros.cosine) == (0.0, 1.0)
    off = figures(np.array([[0.0, 1e-3]], np.float32), np.zeros((1, 2)))
    assert (off.max_rel_row, off.cosine) == (math.inf, 0.0)
    assert figures(np.array([1, 5]), np.array([1, 2])).max_ulp == 3.0


def test_figures_do_not_overflow_on_huge_values() -> None:
    reference = np.array([[1e300, -1e300]])
    result = figures(reference * (1 + 2**-52), reference)
    assert result.cosine == 1.0
    assert result.max_rel_row == pytest.approx(2**-52)


def test_figures_take_any_nan_for_the_same_bits() -> None:
    plain, signed = np.array([np.nan], np.float32), np.array([0xFFC00001], np.uint32).view(np.float32)
    assert figures(signed, np.array([np.nan]), plain).differing == 0


def test_figures_refuse_shapes_and_dtypes() -> None:
    with pytest.raises(UsageError, match=r"\(2,\).*reference.*\(3,\)"):
        figures(np.zeros(2, np.float32), np.zeros(3))
    with pytest.raises(UsageError, match="baseline"):
        figures(np.zeros(2, np.float32), np.zeros(2), np.zeros((2, 1), np.float32))
    with pytest.raises(UsageError, match="complex64"):
        figures(np.zeros(2, np.complex64), np.zeros(2))


def test_histogram_and_worst_by_hand() -> None:
    # Errors of 0, 1, 3, 1 and 0.25 ULPs of float16 at 1, in a truth that float16 need not hold.
    ulp = 2.0**-10
    reference = np.array([[1.0, 1.0, 1.0], [1.0, 1.0 + ulp / 4, np.nan]])
    candidate = np.array([[1.0, 1 + ulp, 1 + 3 * ulp], [1 + ulp, 1.0, np.nan]], np.float16)
    baseline = np.array([[1.0, 1.0, 1.0], [1.0, 1.0, np.nan]], np.float16)
    result = figures(candidate, reference, baseline)
    assert result.histogram is not None
    counts = dict(zip(HISTOGRAM_EDGES, result.histogram, strict=True))
    assert {edge: count for edge, count in counts.items() if count} == {0.0: 1, 0.25: 1, 1.0: 2, 4.0: 1}
    assert result.worst == (
        Worst((0, 2), 1 + 3 * ulp, 1.0, 1.0, 3.0),
        Worst((0, 1), 1 + ulp, 1.0, 1.0, 1.0),
        Worst((1, 0), 1 + ulp, 1.0, 1.0, 1.0),
        Worst((1, 1), 1.0, 1.0 + ulp / 4, 1.0, 0.25),
    )


def test_histogram_edges_go_from_none_to_everything() -> None:
    assert HISTOGRAM_EDGES[:6] == (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
    assert HISTOGRAM_EDGES[-2:] == (2.0**24, math.inf)
    result = figures(np.array([3e38, 1.0, np.nan], np.float32), np.array([0.0, 1.0, 1.0]))
    assert result.histogram is not None
    assert (result.histogram[0], result.histogram[-1]) == (1, 2)
    assert [worst.index for worst in result.worst] == [(2,), (0,)]


def test_the_worst_five_of_equal_errors_are_the_first() -> None:
    reference = np.ones((4, 8))
    result = figures(np.full((4, 8), 1 + 2**-10, np.float16), reference)
    assert [worst.index for worst in result.worst] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4)]


def test_figures_become_json() -> None:
    found = figures(np.array([1.0, np.nan], np.float32), np.array([1.0, 1.0])).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["histogram"]["ulp_at_most"][-1] == "inf"
    assert found["worst"] == [{"index": [1], "value": "nan", "reference": 1.0, "baseline": None, "ulp": "inf"}]
    assert json_value({"a": (-math.inf, 1, None)}) == {"a": ["-inf", 1, None]}
    assert (
        figures(np.array([2**60 + 1]), np.array([2**60])).to_dict()["worst"] == []
    )  # float64 cannot distinguish these
    assert figures(np.array([7]), np.array([4])).to_dict()["worst"][0] == {
        "index": [0], "value": 7, "reference": 4, "baseline": None, "ulp": 3.0
    }  # fmt: skip


def test_logits_by_hand() -> None:
    # softmax of [0, log 3] is [1/4, 3/4]; of [0, 0] it is [1/2, 1/2].
    reference = np.array([[0.0, math.log(3.0)], [5.0, 5.0]])
    candidate = np.array([[0.0, 0.0], [6.0, 5.0]])
    kl_first = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    q = math.e / (1 + math.e)
    kl_second = 0.5 * math.log(0.5 / q) + 0.5 * math.log(0.5 / (1 - q))
    result = figures(candidate, reference, logits=True)
    assert result.kl == pytest.approx((kl_first + kl_second) / 2, rel=1e-14)
    assert result.top1_agreement == 0.5
    same = figures(reference, reference, logits=True)
    assert (same.kl, same.top1_agreement) == (0.0, 1.0)


def test_logits_are_stable_and_take_masks() -> None:
    reference = np.array([[1e4, 0.0, -np.inf], [-np.inf, 800.0, 799.0]])
    result = figures(reference + 0.0, reference, logits=True)
    assert (result.kl, result.top1_agreement) == (0.0, 1.0)
    masked = figures(np.array([[0.0, -np.inf]]), np.array([[0.0, 0.0]]), logits=True)
    assert (masked.kl, masked.top1_agreement) == (math.inf, 1.0)
    broken = figures(np.array([[np.nan, 1.0], [0.0, 1.0]]), np.array([[0.0, 1.0], [0.0, 1.0]]), logits=True)
    assert (broken.kl, broken.top1_agreement) == (math.inf, 0.5)
    unknown = figures(np.array([[0.0, 1.0]]), np.array([[np.nan, 1.0]]), logits=True)
    assert (unknown.kl, unknown.top1_agreement) == (None, None)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "measured_as_logits"),
    [
        ("logits", (2, 4), np.float32, True),
        ("lm.logits@decode", (2, 4), np.float16, True),
        ("logits", (2, 1), np.float32, False),
        ("logits", (), np.float32, False),
        ("logits", (2, 4), np.int64, False),
        ("hidden", (2, 4), np.float32, False),
    ],
)
def test_what_logits_are(name: str, shape: tuple[int, ...], dtype: Any, measured_as_logits: bool) -> None:
    ones = np.ones(shape, dtype)
    verdict = judge(name, ones, ones if dtype == np.int64 else ones.astype(np.float64), ones)
    for found in (verdict.figures, verdict.baseline_figures):
        assert found is not None
        assert (found.top1_agreement == 1.0) is measured_as_logits
        assert (found.kl == 0.0) is measured_as_logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 64), (3, 5, 7), (50, 3), (4000,)])
@pytest.mark.parametrize("broken", [False, True])
def test_the_size_of_the_parts_changes_nothing(
    dtype: Any, shape: tuple[int, ...], broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = np.random.default_rng(0).standard_normal(shape)
    candidate, baseline = noisy(reference, dtype, 3.0, 2), noisy(reference, dtype, 3.0, 3)
    if broken:
        candidate.reshape(-1)[[17, 80]] = np.inf
    whole = judge("logits", candidate, reference, baseline)
    monkeypatch.setattr(measured, "_IN_FLIGHT", 100)
    parts = judge("logits", candidate, reference, baseline)
    assert (parts.passed, parts.reason) == (whole.passed, whole.reason)
    for found, wanted in ((parts.figures, whole.figures), (parts.baseline_figures, whole.baseline_figures)):
        assert found is not None
        assert wanted is not None
        for name in Figures.__slots__:
            value = getattr(wanted, name)
            exact = not isinstance(value, float) or not math.isfinite(value)
            assert getattr(found, name) == (value if exact else pytest.approx(value, rel=1e-12)), name


def test_the_percentile_is_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_IN_FLIGHT", 1000)
    errors = np.random.default_rng(0).integers(0, 2**10, 12_345)
    for count in (1, 2, 999, 1000, 1001, 1002, 12_345):
        reference = np.zeros(count, np.int64)
        expected = np.quantile(errors[:count].astype(float), 0.999, method="higher")
        assert figures(errors[:count], reference).p999_ulp == expected


def test_a_large_output_needs_little_memory_besides_its_own() -> None:
    reference = np.random.default_rng(0).standard_normal((30, 100_000))
    candidate, baseline = reference.astype(np.float32), reference.astype(np.float32)
    tracemalloc.start()
    try:
        verdict = judge("logits", candidate, reference, baseline)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert verdict.passed
    # Less than two arrays of float64; judging it in one go took ten.
    assert peak < 2 * reference.nbytes


def noisy(reference: np.ndarray, dtype: Any, units: float, seed: int) -> np.ndarray:
    """The truth with Gaussian errors of `units` x eps x row RMS, rounded to dtype."""
    eps = FORMATS[np.dtype(dtype).name].eps
    scale = np.sqrt(np.mean(np.square(reference), axis=-1, keepdims=True))
    return (
        reference + np.random.default_rng(1000 + seed).standard_normal(reference.shape) * units * eps * scale
    ).astype(dtype)


def model_output(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4, 16, 256))


def test_the_table_has_a_reason_on_every_row() -> None:
    assert set(TOLERANCES) == set(FORMATS)
    for dtype, row in TOLERANCES.items():
        assert row.dtype == dtype
        assert len(row.reason) > 40
        assert row.factor_max >= row.factor_rms > 1.0
        assert row.floor_max >= row.floor_rms > 0.0


def test_small_sample_vanishes_for_many_elements() -> None:
    assert small_sample(16) == pytest.approx(math.exp(3.7 / 4))
    assert 1.0 < small_sample(1_000_000) < 1.01
    assert small_sample(0) == small_sample(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("units", [0.0, 0.3, 3.0])
def test_honest_noise_passes(dtype: Any, units: float) -> None:
    for seed in range(5):
        reference = model_output(seed)
        verdict = judge("logits", noisy(reference, dtype, units, 2), reference, noisy(reference, dtype, units, 3))
        assert verdict.passed, verdict.reason


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2), (1000, 1), (8, 3)])
def test_honest_noise_passes_in_small_outputs(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    failures = 0
    for trial in range(200):
        reference = rng.standard_normal(shape)
        error = 5 * 2.0**-10 * rng.standard_normal((2, *shape))
        candidate, baseline = (reference + error).astype(np.float16)
        failures += not judge(f"trial {trial}", candidate, reference, baseline).passed
    assert failures <= 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_three_times_as_strong_fails(dtype: Any) -> None:
    reference = model_output()
    units = 2.0 * TOLERANCES[np.dtype(dtype).name].floor_rms + 2.0
    assert not judge(
        "logits", noisy(reference, dtype, 3 * units, 2), reference, noisy(reference, dtype, units, 3)
    ).passed


def test_one_percent_in_one_channel_fails() -> None:
    reference = model_output()
    for dtype in (np.float16, np.float32, np.float64):
        candidate, baseline = noisy(reference, dtype, 0.2, 2), noisy(reference, dtype, 0.2, 3)
        candidate[..., 7] *= dtype(1.01)
        verdict = judge("logits", candidate, reference, baseline)
        assert not verdict.passed
        assert "allowed" in verdict.reason


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_row_fails(dtype: Any) -> None:
    reference = model_output()
    baseline = noisy(reference, dtype, 3.0, 3)
    swapped = baseline[[1, 0, 2, 3]]
    assert not judge("swapped batch", swapped, reference, baseline).passed
    zeroed = baseline.copy()
    zeroed[3, 15] = 0
    verdict = judge("zeroed row", zeroed, reference, baseline)
    assert not verdict.passed
    assert "row 63 of 64" in verdict.reason


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_one_row_fails_with_its_place(dtype: Any) -> None:
    reference = model_output()
    candidate = noisy(reference, dtype, 0.3, 2)
    candidate[2, 5, 9:] = np.nan
    verdict = judge("logits", candidate, reference, noisy(reference, dtype, 0.3, 3))
    assert not verdict.passed
    assert "the first at (2, 5, 9): expected" in verdict.reason
    assert "got nan" in verdict.reason
    assert verdict.figures is not None
    assert verdict.figures.max_ulp == math.inf


def test_canceled_elements_do_not_fail_an_honest_output() -> None:
    reference = model_output()
    reference[..., 0] *= 1e-9
    candidate, baseline = noisy(reference, np.float16, 0.3, 2), noisy(reference, np.float16, 0.3, 3)
    verdict = judge("logits", candidate, reference, baseline)
    assert verdict.passed, verdict.reason
    assert verdict.figures is not None
    assert verdict.figures.max_ulp > 1000


def test_a_lucky_baseline_leaves_the_floor() -> None:
    reference = model_output().astype(np.float32).astype(np.float64)
    exact = reference.astype(np.float32)
    assert judge("logits", noisy(reference, np.float32, 1.5, 2), reference, exact).passed
    assert not judge("logits", noisy(reference, np.float32, 4.0, 2), reference, exact).passed


def test_a_row_that_pytorch_gets_wrong_does_not_excuse_the_others() -> None:
    reference = model_output()
    baseline, candidate = noisy(reference, np.float16, 0.3, 3), noisy(reference, np.float16, 0.3, 2)
    baseline[0, 0] = 0
    candidate[0, 0] = 0
    verdict = judge("logits", candidate, reference, baseline)
    assert verdict.passed, verdict.reason
    assert "1 rows in which PyTorch has a large error" in verdict.reason
    candidate[1, 1] *= np.float16(1.02)
    assert not judge("logits", candidate, reference, baseline).passed


def test_a_row_of_zeros_must_be_zeros() -> None:
    reference = model_output()
    reference[0, 0] = 0.0
    baseline = reference.astype(np.float32)
    assert judge("logits", baseline.copy(), reference, baseline).passed
    for dtype in (np.float32, np.float64):
        candidate = reference.astype(dtype)
        candidate[0, 0, 0] = 1.0
        assert not judge("logits", candidate, reference, reference.astype(dtype)).passed


def test_pytorchs_own_overflow_excuses_infinity_and_finite_values() -> None:
    reference = model_output()
    baseline, candidate = noisy(reference, np.float16, 0.3, 3), noisy(reference, np.float16, 0.3, 2)
    baseline[0, 0, :4] = np.inf
    finite = judge("logits", candidate, reference, baseline)
    assert finite.passed, finite.reason
    assert "PyTorch in float16 is not finite in 4 of 16384 elements where the reference is finite" in finite.reason
    candidate[0, 0, :4] = np.inf
    same = judge("logits", candidate, reference, baseline)
    assert same.passed
    assert same.figures is not None
    assert same.figures.nonfinite_agree
    candidate[0, 0, 0] = -np.inf
    assert not judge("logits", candidate, reference, baseline).passed


def test_without_a_baseline_nothing_passes() -> None:
    reference, overflowed = np.ones(64), np.full(64, np.inf, np.float16)
    verdict = judge("logits", np.ones(64, np.float16), reference, overflowed)
    assert not verdict.passed
    assert "give atol or rtol" in verdict.reason
    assert judge("logits", np.ones(64, np.float16), reference, overflowed, limits=Limits(atol=1e-3)).passed
    assert judge("logits", overflowed, reference, overflowed).passed


def test_masked_elements_only_need_to_agree() -> None:
    reference = model_output()
    reference[..., 128:] = -np.inf
    baseline = reference.astype(np.float16)
    assert judge("scores", baseline.copy(), reference, baseline).passed
    finite = baseline.copy()
    finite[0, 0, 200] = -65504
    assert not judge("scores", finite, reference, baseline).passed
    assert judge("all", np.full(3, np.nan, np.float32), np.full(3, np.nan), np.full(3, np.nan, np.float32)).passed


def test_shape_and_kind_mismatch_are_failing_verdicts() -> None:
    reference = model_output()
    baseline = reference.astype(np.float32)
    for candidate, reference_given, text in (
        (baseline[..., :255], reference, r"shape mismatch: the candidate has (4, 16, 255)"),
        (baseline.astype(np.int64), reference, "dtype mismatch: the candidate is int64, the baseline float32"),
        (baseline, reference[0], "shape mismatch: the reference"),
        (baseline, reference > 0, "dtype mismatch: the reference is bool"),
    ):
        verdict = judge("logits", candidate, reference_given, baseline)
        assert not verdict.passed
        assert text in verdict.reason
        assert verdict.figures is None
        assert json.dumps(verdict.to_dict(), allow_nan=False)
    complex_output = baseline.astype(np.complex64)
    assert "complex64" in judge("c", complex_output, complex_output, complex_output).reason


def test_a_wider_candidate_passes_with_a_note() -> None:
    reference = model_output()
    verdict = judge("logits", reference.astype(np.float32), reference, reference.astype(np.float16))
    assert verdict.passed
    assert "the candidate is float32, the baseline float16" in verdict.reason
    assert verdict.figures is not None
    assert verdict.figures.differing is None


def test_integers_and_booleans_compare_exactly_with_the_baseline() -> None:
    ids = np.array([[1, 2], [3, 2**60]])
    assert judge("ids", ids.copy(), ids, ids).passed
    verdict = judge("ids", ids + np.array([[0, 0], [0, 1]]), ids, ids, limits=Limits(atol=5.0))
    assert not verdict.passed
    assert "the first at (1, 1): expected 1152921504606846976, got 1152921504606846977" in verdict.reason
    flags = np.array([True, False])
    assert judge("mask", flags, flags, flags).passed
    assert not judge("mask", ~flags, flags, flags).passed
    assert not judge("mask", flags.astype(np.int64), flags, flags).passed


@pytest.mark.parametrize(("atol", "rtol", "passed"), [(0.02, None, True), (0.005, None, False), (None, 0.011, True)])
def test_explicit_tolerances_replace_the_rule(atol: float | None, rtol: float | None, passed: bool) -> None:
    reference = np.array([1.0, -1.0, 0.5])
    candidate = np.array([1.01, -1.0, 0.5], np.float32)
    assert judge("y", candidate, reference, reference.astype(np.float32), limits=Limits(atol, rtol)).passed is passed


def test_explicit_tolerances_still_want_nan_in_place_and_must_be_numbers() -> None:
    reference = np.array([1.0, 2.0])
    baseline = reference.astype(np.float32)
    assert not judge("y", np.array([1.0, np.nan], np.float32), reference, baseline, limits=Limits(atol=1e9)).passed
    for wrong in (-1.0, math.nan):
        with pytest.raises(UsageError, match="rtol"):
            judge("y", baseline, reference, baseline, limits=Limits(rtol=wrong))


def test_empty_and_scalar_outputs() -> None:
    empty = np.zeros((0, 8), np.float16)
    assert judge("empty", empty, empty.astype(np.float64), empty).passed
    scalar = np.array(1.0, np.float16)
    assert judge("loss", scalar, np.array(1.0), scalar).passed
    assert not judge("loss", np.array(2.0, np.float16), np.array(1.0), scalar).passed
    assert not judge("flag", np.array(2), np.array(1), np.array(1)).passed
