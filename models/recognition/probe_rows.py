"""Inputs on which different specs give different results, and the comparison of results bit for bit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# In standard deviations of the other values of a row.
_OUTLIERS = (3.0, 10.0, 30.0, 100.0, 1e3, 1e4)


def adversarial_rows(dtype: torch.dtype, width: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Inputs on which different specs give different results, `[rows, *width]` of `dtype` on the CPU.

    Normally distributed values (at least 2,048 elements), outlier channels, large values (squares overflow float16),
    tiny values (eps dominates), zeros, constants, subnormals, the largest finite value, NaN and infinities.
    """
    count = math.prod(width)
    finfo = torch.finfo(dtype)
    normal_rows = max(4, 2048 // count)
    normal = torch.randn(normal_rows, count, generator=generator, dtype=torch.float64, device="cpu")
    u = torch.randn(12, count, generator=generator, dtype=torch.float64, device="cpu")
    outlier = u[0].clone()
    outlier[0] *= 1e3
    special = torch.stack([
        outlier, u[1] * min(2e4, finfo.max / 8), u[2] * 300, u[3] * 1e-2, u[4] * 1e-3, u[5] * 1e-4, u[6] * 1e-6,
        u[7] * finfo.tiny, u[8] * 0, u[8] * 0 + 0.1, torch.sign(u[8]) * finfo.max, u[9] * finfo.tiny / 64,
    ])  # fmt: skip
    rows = torch.cat([normal, special]).clamp(-finfo.max, finfo.max).to(dtype)
    broken = torch.randn(3, count, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    broken[0, 0], broken[1, -1], broken[2, count // 2] = float("nan"), float("inf"), -float("inf")
    return torch.cat([rows, broken]).reshape(-1, *width)


def outlier_rows(dtype: torch.dtype, width: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Rows with outliers in every channel, of both signs and many sizes, `[rows, *width]` of `dtype` on the CPU.

    The first rows have one outlier of 3 to 1e4 standard deviations each: in the first channels, the last ones, those in
    the middle and random ones, odd and even. Of the other rows, each has several, at equal distances, and together they
    reach every channel with both signs. No value is so large that its square overflows float32.
    """
    count = math.prod(width)
    drawn = torch.randint(count, (12,), generator=generator, device="cpu").tolist()
    places = [0, 1, 2, 3, count - 1, count - 2, count // 2, count // 2 + 1, count // 3, 7, 11, 13, *drawn]
    distance = min(count, 32)
    normal = torch.randn(8, count, generator=generator, dtype=torch.float32, device="cpu")
    rows = rolled(normal, len(places) + 2 * distance)
    for index, place in enumerate(places):
        rows[index, place % count] = _OUTLIERS[index % len(_OUTLIERS)] * (-1) ** (index + index // len(_OUTLIERS))
    for index in range(2 * distance):
        size = _OUTLIERS[3 + index % 3]
        rows[len(places) + index, index % distance :: distance] = size if index < distance else -size
    return rows.to(dtype).reshape(-1, *width)


def rolled(pool: Tensor, count: int) -> Tensor:
    """`count` different rows from a few, `[rows, channels]`: each repetition is shifted by one more channel."""
    repetitions = -(-count // len(pool))
    return torch.cat([pool.roll(shift, -1) for shift in range(repetitions)])[:count]


def same_bits(a: Tensor, b: Tensor, any_nan: bool = True) -> bool:
    """Whether dtype, shape and bits are equal; any NaN equals any NaN, unless `any_nan` is False."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    left, right = a.contiguous().view(integer), b.contiguous().view(integer)
    if torch.equal(left, right):
        return True
    return any_nan and not bool(((left != right) & ~(a.isnan() & b.isnan())).any())
