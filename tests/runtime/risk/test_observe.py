"""Watching a norm: its figures by hand, and a sample whose size is bounded."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rmsnorm_deploy.models.recognition.intercept import NormCall
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.runtime.accuracy.float_formats import FORMATS
from rmsnorm_deploy.runtime.risk import observe
from rmsnorm_deploy.runtime.risk.observe import DTYPES, OUTLIER_RATIO, NormSeen, NormWatch, WeightRange

SPEC = NormSpec(eps=1e-6, scale="none")
INF, NAN = math.inf, math.nan


def call(x: Tensor, spec: NormSpec = SPEC, weight: Tensor | None = None, gate: Tensor | None = None) -> NormCall:
    return NormCall(spec, x, weight, None, gate)


def watched(*xs: Tensor, spec: NormSpec = SPEC, weight: Tensor | None = None, gate: Tensor | None = None) -> NormWatch:
    """A watch that saw these calls, each with x as its result."""
    watch = NormWatch("norm", call(xs[0], spec, weight, gate))
    for x in xs:
        watch.observe(call(x, spec, weight, gate), x)
    return watch


def seen(*xs: Tensor, **more: object) -> NormSeen:
    return watched(*xs, **more).seen()  # type: ignore[arg-type]


def test_figures_by_hand() -> None:
    """Rows (3, 4) of RMS sqrt(12.5), (0, 2) of sqrt(2) and (0, 0), in two calls."""
    found = seen(torch.tensor([[3.0, -4.0]]), torch.tensor([[[0.0, 2.0]], [[0.0, 0.0]]]))
    assert (found.path, found.spec, found.width) == ("norm", SPEC, (2,))
    assert (found.calls, found.rows, found.nonfinite_rows) == (2, 3, 0)
    assert found.largest == 4.0
    assert found.smallest_rms == pytest.approx(math.sqrt(2.0), rel=1e-15)
    assert found.weight is None
    for dtype in DTYPES:
        top, margins = FORMATS[dtype].largest, found.margins[dtype]
        assert (margins.x, margins.square, margins.sum, margins.result) == (top / 4, top / 16, top / 25, top / 4)


def test_the_result_has_its_own_margin() -> None:
    x = torch.ones(2, 4)
    watch = NormWatch("norm", call(x))
    watch.observe(call(x), torch.full((2, 4), -1000.0))
    assert watch.seen().margins["float16"].result == pytest.approx(65.504)
    assert watch.seen().margins["float16"].x == 65504.0


def test_nothing_but_zeros() -> None:
    found = seen(torch.zeros(3, 4))
    assert (found.largest, found.smallest_rms) == (0.0, 0.0)
    assert found.margins["float16"] == observe.Margins(INF, INF, INF, INF)
    assert (found.eps_decides, found.eps_matters) == (1.0, 1.0)
    assert (found.outliers, found.outlier_channels) == (0, [])


def test_before_any_call() -> None:
    watch = NormWatch("norm", call(torch.ones(2, 4)))
    found = watch.seen()
    assert (found.calls, found.rows, found.largest, found.eps_decides) == (0, 0, 0.0, 0.0)
    assert watch.sample().x.shape == (0, 4)


def test_rows_that_are_not_finite_are_counted_and_left_out() -> None:
    found = seen(torch.tensor([[1.0, NAN], [INF, 1e9], [1.0, 2.0]]))
    assert (found.rows, found.nonfinite_rows, found.largest) == (3, 2, 2.0)
    nothing = watched(torch.full((2, 2), NAN))
    assert nothing.seen().nonfinite_rows == 2
    assert nothing.sample().x.shape == (0, 2)


# --------------------------------------------------------------------------------------------------------- epsilon


@pytest.mark.parametrize(
    ("mean_square", "decides", "matters"),
    [(0.25, 1, 1), (1.0, 1, 1), (4.0, 0, 1), (49.0, 0, 1), (49.5, 0, 0)],
)
def test_when_eps_decides_and_when_it_matters(mean_square: float, decides: int, matters: int) -> None:
    """eps 1 decides at a mean of squares of up to 1, and costs 1% where the mean is below 0.9801 / 0.0199 = 49.25."""
    x = torch.full((2, 4), math.sqrt(mean_square), dtype=torch.float64)
    found = seen(x, spec=NormSpec(eps=1.0, scale="none"))
    assert (found.eps_decides, found.eps_matters) == (decides, matters)


def test_shares_are_of_all_rows() -> None:
    x = torch.tensor([[0.5, 0.5], [3.0, 3.0], [100.0, 100.0], [100.0, 100.0]])
    found = seen(x, spec=NormSpec(eps=1.0, scale="none"))
    assert (found.eps_decides, found.eps_matters) == (0.25, 0.5)


def test_a_sum_is_held_to_eps_as_it_is() -> None:
    """Four elements of 1/2: their squares have a sum of 1 and a mean of 1/4."""
    x = torch.full((1, 4), 0.5)
    assert seen(x, spec=NormSpec(eps=0.5, scale="none")).eps_decides == 1.0
    assert seen(x, spec=NormSpec(eps=0.5, scale="none", reduction="sum")).eps_decides == 0.0


def test_groups_are_looked_at_one_by_one() -> None:
    found = seen(torch.tensor([[0.1, 0.1, 5.0, 5.0]]), spec=NormSpec(eps=1.0, scale="none", group_size=2))
    assert found.eps_decides == 0.5
    assert found.smallest_rms == pytest.approx(0.1, rel=1e-6)
    assert found.margins["float32"].sum == pytest.approx(FORMATS["float32"].largest / 50.0)


# ------------------------------------------------------------------------------------------ gates, outliers, weights


@pytest.mark.parametrize(
    ("activation", "factor"),
    [("sigmoid", 1 / (1 + math.exp(-2.0))), ("silu", 2 / (1 + math.exp(-2.0)))],
)
def test_a_gate_before_the_norm_is_part_of_what_is_normalized(activation: str, factor: float) -> None:
    spec = SPEC.replace(gate="before", activation=activation)
    found = seen(torch.full((1, 4), 3.0), spec=spec, gate=torch.full((1, 4), 2.0))
    assert found.largest == 3.0
    assert found.smallest_rms == pytest.approx(3.0 * factor, rel=1e-12)
    assert found.margins["float16"].square == pytest.approx(65504.0 / (3.0 * factor) ** 2, rel=1e-12)


def test_a_gate_after_the_norm_is_not() -> None:
    spec = SPEC.replace(gate="after", activation="sigmoid")
    found = seen(torch.full((1, 4), 3.0), spec=spec, gate=torch.full((1, 4), 2.0))
    assert found.smallest_rms == 3.0


def test_a_gate_that_is_not_finite_makes_the_row_so() -> None:
    spec = SPEC.replace(gate="after", activation="sigmoid")
    assert seen(torch.ones(1, 4), spec=spec, gate=torch.tensor([[1.0, 1.0, INF, 1.0]])).nonfinite_rows == 1


def test_outliers_are_the_channels_beyond_six_medians() -> None:
    x = torch.ones(5, 16)
    x[:, 3], x[:, 7], x[:, 9] = 6.0, 6.5, -50.0
    found = seen(x)
    assert OUTLIER_RATIO == 6.0
    assert found.outliers == 2
    assert [index for index, _ in found.outlier_channels] == [9, 7]
    assert [ratio for _, ratio in found.outlier_channels] == pytest.approx([50.0, 6.5])


def test_at_most_eight_outliers_are_listed() -> None:
    x = torch.ones(2, 32)
    x[:, :12] = torch.arange(10.0, 22.0)
    found = seen(x)
    assert found.outliers == 12
    assert [index for index, _ in found.outlier_channels] == [11, 10, 9, 8, 7, 6, 5, 4]


def test_a_channel_beside_zeros_is_an_outlier_without_end() -> None:
    x = torch.zeros(2, 8)
    x[:, 5] = 1.0
    assert seen(x).outlier_channels == [(5, INF)]


@pytest.mark.parametrize(
    ("scale", "expected"),
    [("weight", WeightRange(2.0, 0.25, 1)), ("one_plus_weight", WeightRange(1.25, 0.5, 1))],
)
def test_the_range_of_the_effective_weight(scale: str, expected: WeightRange) -> None:
    values = [-2.0, 0.25, 0.0, 1.0] if scale == "weight" else [-1.0, 0.25, -0.5, 0.0]
    found = seen(torch.ones(1, 4), spec=NormSpec(eps=1e-6, scale=scale), weight=torch.tensor(values))  # type: ignore[arg-type]
    assert found.weight == expected


def test_the_ratio_of_a_weight() -> None:
    assert WeightRange(2.0, 0.25, 1).ratio == 8.0
    assert WeightRange(0.0, 0.0, 4).ratio == 1.0


# ---------------------------------------------------------------------------------------------------- parts, sample


def test_large_inputs_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    whole = watched(x)
    monkeypatch.setattr(observe, "_CHUNK", 100)
    parts = watched(x)
    assert parts.seen() == whole.seen()
    assert np.array_equal(parts.sample().x, whole.sample().x)


def test_a_few_rows_are_all_in_the_sample_once_and_in_order() -> None:
    x = torch.arange(40.0).reshape(10, 2, 2)
    weight = torch.ones(2, 2)
    spec = NormSpec(eps=1e-6, trailing_dims=2)
    rows = watched(x[:3], x[3:], spec=spec, weight=weight).sample()
    assert np.array_equal(rows.x, x.numpy())
    assert rows.spec == spec
    assert rows.weight is not None
    assert np.array_equal(rows.weight, weight.numpy())
    assert (rows.bias, rows.gate) == (None, None)


def test_the_gate_is_sampled_with_its_row() -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    rows = watched(x, spec=SPEC.replace(gate="after", activation="silu"), gate=-x).sample()
    assert rows.gate is not None
    assert np.array_equal(rows.gate, -rows.x)


@pytest.mark.parametrize(("width", "kept"), [(8, 256), (1 << 12, 64), (1 << 16, 16)])
def test_the_sample_is_bounded(width: int, kept: int) -> None:
    x = torch.randn(300 if width < 1 << 16 else 40, width, generator=torch.Generator().manual_seed(0))
    rows = watched(x).sample()
    assert kept * 3 // 4 <= len(rows.x) <= kept
    known = {row.tobytes() for row in x.numpy()}
    assert all(row.tobytes() in known for row in rows.x)
    assert len({row.tobytes() for row in rows.x}) == len(rows.x)


def test_the_extreme_rows_are_in_the_sample() -> None:
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    x[1234, 3], x[777] = 50.0, 1e-3
    rows = watched(x[:1000], x[1000:]).sample()
    assert np.abs(rows.x).max() == 50.0
    assert np.abs(rows.x).max(axis=1).min() == np.float32(1e-3)


def test_the_rest_of_the_sample_is_of_all_rows() -> None:
    """Of 2048 rows of equal size the sample holds about as many of the first half as of the second."""
    x = torch.ones(2048, 8)
    x[:, 0] = torch.where(torch.arange(2048) < 1024, 1.0, -1.0)
    rows = watched(x).sample()
    middle = rows.x[:, 0].mean()
    assert abs(middle) < 0.4
    assert np.array_equal(rows.x, watched(x).sample().x)


def test_half_types_stay_what_they_are() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert watched(x).sample().x.dtype.name == "bfloat16"
