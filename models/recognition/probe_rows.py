"""Inputs on which different specs give different results, and the comparison of results bit for bit."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and bits are equal; any NaN equals any NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    different = a.contiguous().view(integer) != b.contiguous().view(integer)
    return not bool((different & ~(a.isnan() & b.isnan())).any())
