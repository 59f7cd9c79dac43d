"""Which kernel computes a call of the operators exactly as its spec says, and how it finds the rows."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Final, get_args

import torch
from torch import Tensor

from ...models.dtypes import torch_name
from ...models.spec import NormSpec, Order
from ..kernel.launch_config import WIDEST_ACCESS
from ..kernel.norm_kernel import WIDEST, Dtype, NormKernel, Quantization, Quantized

# Whether the result of the norm is rounded before the scale multiplies it; None: the kernel does not have this order.
CASTS_FIRST: Final[dict[Order, bool | None]] = {
    "scale_then_cast": False, "cast_then_scale": True, "cast_factor": None, "no_upcast": None,
}  # fmt: skip
# Rows with a common outer stride are a constant of the kernel: heads of a token, but not tokens of a sequence.
MOST_HEADS: Final = 256
_MOST_ROWS: Final = 2**31 - 1


def spec_problem(spec: NormSpec) -> str | None:
    """Why the operators do not have this norm; None if they do."""
    if CASTS_FIRST[spec.order] is None:
        return f"order {spec.order}: the kernel has scale_then_cast and cast_then_scale"
    found = {
        f"it normalizes the last {spec.trailing_dims} dims together": spec.trailing_dims != 1,
        "it divides by the root of the sum of squares, not of their mean": not spec.has_mean,
        "it has a bias": spec.bias,
    }
    return next((reason for reason, holds in found.items() if holds), None)


@functools.lru_cache(maxsize=1024)
def kernel_for(
    spec: NormSpec,
    width: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    gate_dtype: torch.dtype | None = None,
    heads: int | None = None,
    quantized: Quantized = "none",
    quantization: Quantization = "none",
) -> NormKernel | None:
    """The kernel that rounds where the spec does, for these dtypes; None if there is none.

    Args:
        spec: one without a `spec_problem`.
        width: of x's last dim.
        dtype: dtype of x.
        weight_dtype: dtype of the weight; None without one.
        residual_dtype: dtype of the residual; None without one.
        gate_dtype: dtype of the gate; None without one.
        heads: rows with a common outer stride, groups where the spec has them; None if all rows are contiguous.
        quantized: dtype of a quantized output.
        quantization: whether the scale of a quantized output is given, or one of each row.
    """
    size = spec.group_size or width
    names = [None if d is None else _kernel_dtype(d) for d in (dtype, weight_dtype, residual_dtype)]
    given = (dtype, weight_dtype, residual_dtype)
    if any(name is None and d is not None for name, d in zip(names, given, strict=True)) or not 1 <= size <= WIDEST:
        return None
    x, weight, residual = names
    y = residual or x
    if gate_dtype not in (None, dtype):
        return None
    if residual is not None and residual_dtype != torch.promote_types(dtype, residual_dtype or dtype):
        return None
    casts_first = bool(CASTS_FIRST[spec.order]) and y != "float32"
    if casts_first and weight not in (None, y):
        return None  # PyTorch's result then has the weight's dtype
    if spec.scale_offset != 0.0 and weight != "float32" and spec.offset_in_float32 == casts_first:
        return None  # the kernel adds 1 in float32, and rounds the scale only where it casts first
    groups = width // size
    return NormKernel(
        size,
        spec.eps,
        "rms_norm" if residual is None else "add_rms_norm",
        x or "float32",
        residual_dtype=residual,
        weight_dtype=weight,
        scale=spec.scale,
        cast_first=casts_first,
        gate=spec.gate,
        activation=spec.activation,
        quantized=quantized,
        quantization=quantization,
        inner=heads or groups,
        weight_rows=groups,
        strided=heads is not None,
    )


@dataclass(frozen=True, slots=True)
class RowStrides:
    """Where the rows of a tensor begin, in elements: row r at `r // heads * outer + r % heads * inner`."""

    heads: int
    outer: int
    inner: int

    @classmethod
    def of(cls, x: Tensor) -> RowStrides | None:
        """The rows of `[..., width]`; None if two strides do not describe them, or a row is not contiguous."""
        width = x.shape[-1]
        if width > 1 and x.stride(-1) != 1:
            return None
        dims: list[tuple[int, int]] = []  # size and stride, neighbors that one stride describes joined
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
            if size == 1:
                continue
            if dims and dims[-1][1] == size * stride:
                dims[-1] = (dims[-1][0] * size, stride)
            else:
                dims.append((size, stride))
        match dims:
            case []:
                return cls(1, width, 0)
            case [(_, stride)]:
                return cls(1, stride, 0)
            case [_, (heads, stride)] if x.ndim > 3 and stride == width and heads == x.shape[-2] <= MOST_HEADS:
                return cls(heads, dims[0][1], stride)
            case _:
                return None

    def is_contiguous(self, width: int) -> bool:
        """Whether each row begins where the one before it ends."""
        return self.outer == self.heads * width and (self.heads == 1 or self.inner == width)

    def with_heads(self, heads: int) -> RowStrides:
        """The same rows, counted in as many heads."""
        return self if self.heads == heads else RowStrides(heads, self.outer * heads, self.outer)

    def in_groups(self, groups: int, size: int) -> RowStrides | None:
        """The groups of these rows, side by side, as rows; None if two strides do not describe them."""
        if groups == 1:
            return self
        return RowStrides(groups, self.outer, size) if self.heads == 1 else None


def alignment(rows: list[tuple[Tensor, RowStrides]], weight: Tensor | None) -> int:
    """The alignment in bytes of every row, as `layouts` takes it: at most 16."""
    offsets = [WIDEST_ACCESS]
    for tensor, strides in rows:
        offsets += [tensor.data_ptr(), *(tensor.element_size() * n for n in (strides.outer, strides.inner))]
    if weight is not None and weight.data_ptr() % WIDEST_ACCESS:
        # A vector has as many elements of the weight as of x, each of another size.
        least = min(tensor.element_size() for tensor, _ in rows)
        offsets.append((weight.data_ptr() & -weight.data_ptr()) * least // weight.element_size())
    return math.gcd(*offsets)


def has_too_many_rows(x: Tensor, width: int) -> bool:
    """Whether the kernel's row number, a signed integer of 32 bits, cannot count the rows of this width in x."""
    return x.numel() // max(width, 1) > _MOST_ROWS


def _kernel_dtype(dtype: torch.dtype) -> Dtype | None:
    return next((name for name in get_args(Dtype) if name == torch_name(dtype)), None)
