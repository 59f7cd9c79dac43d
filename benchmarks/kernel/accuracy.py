"""A result compared with float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from .cases import EPSILON, Case, Tensors

_MANTISSA: Final = {"float32": 23, "float16": 10, "bfloat16": 7}
_LARGEST: Final = {"int8": 127, "float8_e4m3": 448}
# Elements that are compared at a time: float64 and its intermediate results take about 50 bytes each.
_AT_ONCE: Final = 1 << 26


@dataclass(frozen=True)
class Limits:
    """Largest allowed errors: in units in the last place of the result by dtype, or in steps of a quantized result."""

    ulp: Mapping[str, float]
    steps: float


OURS: Final = Limits({"float32": 4.0, "float16": 2.01, "bfloat16": 2.01}, 0.51)
# Others may normalize the sum before it is rounded, and quantize y before it is; what they compute must be the same.
PEERS: Final = Limits({"float32": 16.0, "float16": 4.01, "bfloat16": 4.01}, 1.01)


@dataclass(frozen=True)
class Judgement:
    """The largest error of a result, and what is wrong with it; "" if nothing is."""

    error: float
    problem: str


def judged(case: Case, given: Tensors, limits: Limits = OURS) -> Judgement:
    """Compare the outputs of `given` with float64.

    The error is in ULP of the result, or in steps of a quantized result, which may be one step off where the
    unquantized result is within one ULP of a tie. It is infinite if the sum or the scales of the rows are wrong.
    """
    rows = max(1, _AT_ONCE // case.kernel.width)
    errors = []
    for start in range(0, case.rows, rows):
        part = given.part(slice(start, start + rows))
        problem = _wrong_sum(part) or _wrong_scale(case, part)
        if problem:
            return Judgement(math.inf, problem)
        errors.append(_error(case, part))
    error = torch.tensor(errors).max().item()  # NaN if one is NaN
    quantized = case.kernel.quantized != "none"
    limit, unit = (limits.steps, "steps") if quantized else (limits.ulp[case.kernel.dtype], "ULP")
    return Judgement(error, "" if error <= limit else f"expected at most {limit} {unit}, got {error:.2f}")


def _normalized(given: Tensors) -> torch.Tensor:
    """What is normalized."""
    return given.x if given.residual is None else given.x + given.residual


def _expected(given: Tensors) -> torch.Tensor:
    """y before it is rounded, in float64."""
    wide = _normalized(given).double()
    return wide * (wide.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * given.weight.double()


def _wrong_sum(given: Tensors) -> str:
    if given.sum is None or torch.equal(_normalized(given), given.sum):
        return ""
    return "the sum is not x + residual"


def _wrong_scale(case: Case, given: Tensors) -> str:
    if given.row_scale is None:
        return ""
    rounded = _expected(given).to(given.x.dtype).double()
    wanted = rounded.abs().amax(-1) / _LARGEST[case.kernel.quantized]
    if torch.allclose(given.row_scale.double(), wanted, rtol=2.0**-7, atol=0.0):
        return ""
    return "the scale of a row is not its largest absolute value divided by that of the format"


def _error(case: Case, given: Tensors) -> float:
    kernel, expected = case.kernel, _expected(given)
    found = given.y.float().double()
    if kernel.quantized == "none":
        spacing = 2.0 ** (expected.abs().clamp_min(1e-4).log2().floor() - _MANTISSA[kernel.dtype])
        return float(((found - expected).abs() / spacing).max().item())
    largest = _LARGEST[kernel.quantized]
    scale = given.scale.double() if given.row_scale is None else given.row_scale.double()[:, None]  # type: ignore[union-attr]
    scaled = (expected.to(given.x.dtype).double() / scale).clamp(-largest - (largest == 127), largest)
    steps = torch.ones_like(scaled)
    if kernel.quantized == "float8_e4m3":
        steps = 2.0 ** (scaled.abs().clamp_min(2.0**-6).log2().floor() - 3)
    # Half a step of the quantized format, and one ULP of the unquantized result.
    off = (found - scaled).abs() - scaled.abs() * 2.0 ** -_MANTISSA[kernel.dtype]
    return float((off / steps).max().item())
