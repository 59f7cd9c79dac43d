"""The norm in PyTorch, operation by operation: bit for bit what the recognized module computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

import torch
from torch import Tensor

from .errors import UsageError
from .spec import Activation, NormSpec

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
}


def statistics_dtype(spec: NormSpec, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `spec` sums the squares of an x of `dtype`."""
    match spec.statistics:
        case "float32":
            return torch.float32
        case "promoted":
            return torch.promote_types(dtype, torch.float32)
        case "input":
            return dtype
        case _:
            assert_never(spec.statistics)


def result_dtype(
    spec: NormSpec, x: torch.dtype, weight: Tensor | None = None, bias: Tensor | None = None
) -> torch.dtype:
    """The dtype of what `eager` returns for an x of this dtype with this weight and bias; a gate does not change it."""
    if not spec.follows_weight:
        return x
    widens = spec.has_weight and spec.scale_offset != 0.0 and spec.offset_in_float32
    result = x
    for tensor, dtype in ((weight, statistics_dtype(spec, x) if widens else None), (bias, None)):
        # A tensor without dims does not make the result wider.
        if tensor is not None and tensor.ndim:
            result = torch.promote_types(result, dtype or tensor.dtype)
    return result


def eager(
    spec: NormSpec, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """The norm in the dtype of its inputs.

    Args:
        spec: what to compute.
        x: `[..., *normalized dims]`, any floating dtype.
        weight: broadcastable to x's trailing dims; required exactly when `spec.has_weight`.
        bias: like weight; required exactly when `spec.bias`.
        gate: x's shape; required exactly when `spec.gate` is not `none`.

    Returns:
        A tensor of x's shape. Its dtype is x's, unless the weight is wider and is multiplied after the cast.

    Raises:
        UsageError: an input that the spec requires is missing, or one that it does not read is given.
    """
    _check_inputs(spec, weight, bias, gate)
    stats = statistics_dtype(spec, x.dtype)
    h, after = _gated(spec, x.to(stats), gate)
    shape = h.shape
    if spec.group_size is not None:
        h = h.reshape(*shape[:-1], shape[-1] // spec.group_size, spec.group_size)  # -1 fails for zero rows
    h = _normalize(spec, h, x.dtype).reshape(shape)
    if weight is not None:
        h = h * _scale(spec, weight, stats)
    if bias is not None:
        h = h + bias
    if after is not None:
        return (h * after).to(x.dtype)
    match spec.order:
        case "scale_then_cast":
            return h.to(x.dtype)
        case "cast_then_scale" | "cast_factor" | "no_upcast":
            return h
        case _:
            assert_never(spec.order)


def _gated(spec: NormSpec, h: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The value to normalize, and the factor of the result or None, both in the statistics dtype (h's)."""
    if gate is None:
        return h, None
    activated = _ACTIVATIONS[spec.activation](gate.to(h.dtype))
    match spec.gate:
        case "none":
            return h, None
        case "before":
            return h * activated, None
        case "after":
            return h, activated
        case _:
            assert_never(spec.gate)


def _normalize(spec: NormSpec, h: Tensor, dtype: torch.dtype) -> Tensor:
    """The normalized value, cast to x's `dtype` where the order casts before the scale."""
    dims = tuple(range(-spec.trailing_dims, 0))
    under_root = _reduced(spec, h.pow(2), dims) + spec.eps
    match spec.root:
        case "sqrt":
            normed, factor = h / torch.sqrt(under_root), None
        case "rsqrt":
            normed, factor = h, torch.rsqrt(under_root)
        case "reciprocal":
            normed, factor = h, 1 / torch.sqrt(under_root)
        case _:
            assert_never(spec.root)
    match spec.order:
        case "scale_then_cast" | "no_upcast":
            return normed if factor is None else normed * factor
        case "cast_then_scale":
            return (normed if factor is None else normed * factor).to(dtype)
        case "cast_factor":
            return normed.to(dtype) if factor is None else normed.to(dtype) * factor.to(dtype)
        case _:
            assert_never(spec.order)


def _reduced(spec: NormSpec, squares: Tensor, dims: tuple[int, ...]) -> Tensor:
    match spec.reduction:
        case "mean":
            return squares.mean(dims, keepdim=True)
        case "sum":
            return squares.sum(dims, keepdim=True)
        case _:
            assert_never(spec.reduction)


def _scale(spec: NormSpec, weight: Tensor, stats: torch.dtype) -> Tensor:
    match spec.scale:
        case "none" | "weight":
            return weight
        case "one_plus_weight":
            return 1.0 + (weight.to(stats) if spec.offset_in_float32 else weight)
        case _:
            assert_never(spec.scale)


def _check_inputs(spec: NormSpec, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None) -> None:
    for name, given, wanted in (
        ("weight", weight, spec.has_weight),
        ("bias", bias, spec.bias),
        ("gate", gate, spec.has_gate),
    ):
        if (given is not None) != wanted:
            state = "is missing, but the spec requires it" if wanted else "was given, but the spec does not read it"
            raise UsageError(f"norm input {name!r} {state} ({spec.describe()}).")
