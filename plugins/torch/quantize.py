"""Quantization of a norm's result in PyTorch, with the bits of the kernel."""

from __future__ import annotations

import math
from typing import Final, get_args

import torch
from torch import Tensor

from ...models.dtypes import torch_dtype
from ...models.errors import UsageError
from ..kernel.norm_kernel import Quantized

# The dtypes of a quantized output, and the kernel's names for them.
QUANTIZED: Final[dict[torch.dtype, Quantized]] = {
    torch_dtype(name): name for name in get_args(Quantized) if name != "none"
}
# The smallest and the largest value of each; the scale of a row maps its largest absolute value to the latter.
_RANGES: Final[dict[Quantized, tuple[float, float]]] = {"int8": (-128.0, 127.0), "float8_e4m3": (-448.0, 448.0)}


def quantized_name(dtype: torch.dtype) -> Quantized:
    """The kernel's name of a dtype of quantized outputs.

    Raises:
        UsageError: outputs are not quantized to this dtype.
    """
    name = QUANTIZED.get(dtype)
    if name is None:
        raise UsageError(f"dtype: expected {' or '.join(map(str, QUANTIZED))}, got {dtype!r}.")
    return name


def quantize(y: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """round(y / scale) in float32, saturated; see NormKernel for NaN and infinity.

    Args:
        y: `[..., width]`, floating, of at least one element a row.
        dtype: int8 or float8_e4m3fn.
        scale: one float32 element; None for the largest absolute value of each row / 127 or 448, and 1 where that is 0.

    Returns:
        The quantized tensor of y's shape; and the scale, float32 `[..., 1]` if it is that of each row.

    Raises:
        UsageError: outputs are not quantized to this dtype.
    """
    lowest, highest = _RANGES[quantized_name(dtype)]
    y = y.to(torch.float32)
    by = _row_scale(y, highest) if scale is None else scale.reshape(())
    values = y / by
    if not dtype.is_floating_point:
        values = values.round().nan_to_num(0.0, math.inf, -math.inf)  # NaN as a GPU converts it
    return values.clamp(lowest, highest).to(dtype), by if scale is None else scale


def _row_scale(y: Tensor, highest: float) -> Tensor:
    largest = y.abs().nan_to_num(nan=0.0, posinf=math.inf).amax(-1, keepdim=True)
    # By a tensor on y's device: PyTorch multiplies by the reciprocal of a number on a GPU, which rounds twice.
    scale = largest / largest.new_full((), highest)
    return torch.where(scale == 0.0, 1.0, scale)
