"""The specs that are tried: all members of every field, in order, and the numbers that eps may be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rmsnorm_deploy.models.eager import eager
from rmsnorm_deploy.models.recognition.candidates import SAME_IN_HALF, in_float32, in_half, stated_eps
from rmsnorm_deploy.models.spec import NormSpec

BASE = NormSpec(eps=1e-3, trailing_dims=1, group_size=8)


class Stating(nn.Module):
    """States numbers, and things that are none of eps."""

    def __init__(self) -> None:
        super().__init__()
        self.eps, self.name, self.count, self.large, self.negative = 3e-5, "norm", 2, 1.5, -1e-3
        self.register_buffer("stated", torch.tensor(7e-4))
        self.register_buffer("row", torch.ones(3))


@pytest.mark.parametrize(
    ("measured", "found"),
    [
        (3.0001e-5, 3e-5),
        (7.0001e-4, 7e-4),
        (1.001e-6, 1e-6),
        (1.2346e-7, 1.235e-7),  # three digits, 1.23, would be off by more than 0.2%
        (torch.finfo(torch.float32).eps, torch.finfo(torch.float32).eps),
    ],
)
def test_a_measured_eps_is_snapped_to_what_is_near(measured: float, found: float) -> None:
    values = stated_eps(Stating(), measured)
    assert values[0] == pytest.approx(found, rel=1e-6)
    assert all(abs(value - measured) <= 2e-3 * max(value, measured) for value in values)
    assert len(values) == len(set(values))


def test_what_the_module_states_comes_first() -> None:
    assert stated_eps(Stating(), 3e-5)[0] == 3e-5


def test_without_a_measurement_all_numbers_may_be_eps() -> None:
    values = stated_eps(Stating(), None)
    assert values[:2] == pytest.approx([3e-5, 7e-4], rel=1e-6)
    assert {0.0, 1e-3, 1e-5, 1e-6, 1e-12, 2.0**-10, 2.0**-7, 2.0**-23, 2.0**-52} <= set(values)
    assert not {1.5, -1e-3, 2.0} & set(values)


# ------------------------------------------------------------------------------------------------------ in_float32


@pytest.mark.parametrize(
    ("weight", "bias", "gated", "count"),
    [(False, False, False, 6), (True, False, False, 12), (True, True, False, 12), (True, False, True, 60)],
)
def test_every_combination_comes_once(weight: bool, bias: bool, gated: bool, count: int) -> None:
    """Two reductions and three roots; two scales with a weight; no gate or four kinds of one with a second input."""
    found = list(in_float32(BASE, weight, bias, gated))
    assert len(found) == len(set(found)) == count
    assert {spec.scale for spec in found} == ({"weight", "one_plus_weight"} if weight else {"none"})
    assert {spec.bias for spec in found} == {bias}
    assert {spec.reduction for spec in found} == {"mean", "sum"}
    assert {spec.root for spec in found} == {"rsqrt", "sqrt", "reciprocal"}
    assert {(spec.gate, spec.activation) for spec in found} == (
        {("none", "none"), *((g, a) for g in ("before", "after") for a in ("silu", "sigmoid"))}
        if gated
        else {("none", "none")}
    )
    assert {(spec.eps, spec.trailing_dims, spec.group_size) for spec in found} == {(1e-3, 1, 8)}


def test_the_plainest_comes_first() -> None:
    first = next(iter(in_float32(BASE, True, False, True)))
    assert first == BASE.replace(scale="weight", gate="none", reduction="mean", root="rsqrt")


# --------------------------------------------------------------------------------------------------------- in_half


@pytest.mark.parametrize(
    ("changes", "orders"),
    [
        ({}, ["scale_then_cast", "cast_then_scale", "cast_factor", "no_upcast"]),
        ({"root": "sqrt"}, ["scale_then_cast", "cast_then_scale", "no_upcast"]),
        ({"root": "reciprocal"}, ["scale_then_cast", "cast_then_scale", "cast_factor", "no_upcast"]),
        ({"gate": "before", "activation": "silu"}, ["scale_then_cast", "cast_then_scale", "no_upcast"]),
        ({"gate": "after", "activation": "silu"}, ["scale_then_cast", "cast_then_scale", "cast_factor", "no_upcast"]),
    ],
)
def test_orders_of_casts(changes: dict[str, str], orders: list[str]) -> None:
    found = list(in_half(BASE.replace(**changes)))
    assert [spec.order for spec in found] == orders
    assert [spec.statistics for spec in found] == ["float32"] * (len(orders) - 1) + ["input"]
    assert all(spec.offset_in_float32 for spec in found)


def test_one_plus_weight_may_add_in_either_dtype() -> None:
    found = list(in_half(BASE.replace(scale="one_plus_weight")))
    assert len(found) == len(set(found)) == 8
    assert [spec.offset_in_float32 for spec in found[:2]] == [True, False]


def test_candidates_for_halves_are_equal_in_float32_and_differ_in_half() -> None:
    """The reason for the two lists."""
    spec = BASE.replace(scale="one_plus_weight")
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(16, 64, generator=generator), torch.randn(64, generator=generator)
    single = [eager(candidate, x, weight) for candidate in in_half(spec)]
    assert all(torch.equal(single[0], other) for other in single)
    half = [eager(candidate, x.half(), weight.half()) for candidate in in_half(spec)]
    different = {tuple(result.float().reshape(-1).tolist()) for result in half}
    assert len(different) >= 6


def test_statistics_that_only_float64_tells_apart() -> None:
    assert set(SAME_IN_HALF) == {"float32", "promoted", "input"}
    assert all(own in others for own, others in SAME_IN_HALF.items())
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    specs = [BASE.replace(scale="none", statistics=name) for name in SAME_IN_HALF["promoted"]]
    assert torch.equal(*(eager(spec, x.half()) for spec in specs))
    assert not torch.equal(*(eager(spec, x.double()) for spec in specs))
