"""Probe inputs and the comparison of bits."""

from __future__ import annotations

import pytest
import torch

from rmsnorm_deploy.models.recognition.probe_rows import adversarial_rows, outlier_rows, rolled, same_bits

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NAN, INF = float("nan"), float("inf")


def rows(dtype: torch.dtype = torch.float32, width: tuple[int, ...] = (64,), seed: int = 0) -> torch.Tensor:
    return adversarial_rows(dtype, width, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "count"), [((64,), 32), ((4, 8), 64), ((4096,), 4), ((1,), 2048)])
def test_shape_dtype_and_number_of_rows(dtype: torch.dtype, width: tuple[int, ...], count: int) -> None:
    found = rows(dtype, width)
    assert found.dtype == dtype
    assert found.shape == (count + 12 + 3, *width)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_row_is_there(dtype: torch.dtype) -> None:
    found, finfo = rows(dtype), torch.finfo(dtype)
    special, broken = found[-15:-3].double(), found[-3:]
    assert torch.isfinite(found[:-3]).all()
    outlier = special[0].abs()
    assert outlier[0] > 100 * outlier[1:].median()
    assert special[1].square().max() > 65504  # squares overflow float16
    assert special[6].abs().max() < 1e-4
    assert (special[8] == 0).all()
    assert (special[9] == special[9, 0]).all()
    assert special[9, 0] != 0
    assert (special[10].abs() == finfo.max).all()
    assert 0 < special[11].abs().max() < finfo.tiny
    assert broken[0].isnan().nonzero().tolist() == [[0]]
    assert broken[1, -1] == INF
    assert broken[2, 32] == -INF
    assert torch.isfinite(broken).sum() == 3 * 63


def test_equal_generators_give_equal_rows() -> None:
    assert same_bits(rows(seed=1), rows(seed=1))
    assert not same_bits(rows(seed=1), rows(seed=2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_what_counts(dtype: torch.dtype) -> None:
    a = torch.tensor([1.0, 0.0, NAN, INF], dtype=dtype)
    assert same_bits(a, a.clone())
    for index, value in ((1, -0.0), (2, 1.0), (3, -INF), (0, NAN)):
        other = a.clone()
        other[index] = value
        assert not same_bits(a, other)
    up = a.clone()
    up[0] = torch.nextafter(a[0], torch.tensor(2.0, dtype=dtype)) if dtype != torch.float16 else 1 + 2.0**-10
    assert not same_bits(a, up)


def test_any_nan_is_any_nan() -> None:
    a = torch.tensor([NAN])
    b = (a.view(torch.int32) ^ 1).view(torch.float32)
    assert same_bits(a, b)


def test_another_dtype_or_shape_is_another_result() -> None:
    assert not same_bits(torch.ones(2), torch.ones(2, dtype=torch.float64))
    assert not same_bits(torch.ones(2), torch.ones(2, 1))
    assert same_bits(torch.ones(0), torch.ones(0))


def test_strides_do_not_matter() -> None:
    a = torch.arange(6.0).reshape(2, 3)
    assert same_bits(a.T, a.T.contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7, 64, 4096])
def test_outliers_reach_every_channel_with_both_signs(dtype: torch.dtype, count: int) -> None:
    found = outlier_rows(dtype, (count,), torch.Generator().manual_seed(0)).double()
    assert torch.isfinite(found).all()
    combs = found[-2 * min(count, 32) :]
    assert (combs.amax(0) >= 100).all()
    assert (combs.amin(0) <= -100).all()
    if count >= 64:
        single = found[:24]
        places = set(single.abs().argmax(1).tolist())
        assert {1, count - 2, 7, 13} <= places
        tops = single.gather(1, single.abs().argmax(1, keepdim=True)).flatten()
        assert {abs(round(top)) for top in tops.tolist()} >= {10, 30, 100, 1000}
        assert (tops > 0).any()
        assert (tops < 0).any()


def test_rolled_rows_are_all_different() -> None:
    pool = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    found = rolled(pool, 10)
    assert found.shape == (10, 8)
    assert len(torch.unique(found, dim=0)) == 10
    assert torch.equal(found[:3], pool)
