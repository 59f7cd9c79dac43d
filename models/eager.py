"""The norm in PyTorch, operation by operation: bit for bit what the recognized module computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import UsageError
from .spec import NormSpec

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": torch.nn.functional.silu, "sigmoid": torch.sigmoid}


def statistics_dtype(spec: NormSpec, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `spec` sums the squares of an x of `dtype`."""
    if spec.statistics == "input":
        return dtype
    if spec.statistics == "promoted":
        return torch.promote_types(dtype, torch.float32)
    return torch.float32


def eager(
    spec: NormSpec, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """The norm in the dtype of its inputs.

    Args:
        spec: what to compute.
        x: `[..., *normalized dims]`, any floating dtype.
        weight: broadcastable to x's trailing dims; needed exactly when `spec.has_weight`.
        bias: like weight; needed exactly when `spec.bias`.
        gate: x's shape; needed exactly when `spec.gate` is not `none`.

    Returns:
        A tensor of x's shape. Its dtype is x's, unless the weight is wider and is multiplied after the cast.

    Raises:
        UsageError: an input that the spec needs is missing, or one that it does not know is given.
    """
    _check_inputs(spec, weight, bias, gate)
    stats = statistics_dtype(spec, x.dtype)
    h = x.to(stats)
    gated = _ACTIVATIONS[spec.activation](gate.to(stats)) if gate is not None else None
    if spec.gate == "before" and gated is not None:
        h = h * gated
    shape = h.shape
    if spec.group_size is not None:
        h = h.reshape(*shape[:-1], shape[-1] // spec.group_size, spec.group_size)  # -1 would not do for no rows
    h = _normalize(spec, h, x.dtype).reshape(shape)
    if spec.order == "cast_then_scale":
        h = h.to(x.dtype)
    if weight is not None:
        h = h * _scale(spec, weight, stats)
    if bias is not None:
        h = h + bias
    if spec.gate == "after" and gated is not None:
        return (h * gated).to(x.dtype)
    return h.to(x.dtype) if spec.order == "scale_then_cast" else h


def _normalize(spec: NormSpec, h: Tensor, dtype: torch.dtype) -> Tensor:
    dims = tuple(range(-spec.trailing_dims, 0))
    squares = h.pow(2)
    reduced = squares.mean(dims, keepdim=True) if spec.reduction == "mean" else squares.sum(dims, keepdim=True)
    under_root = reduced + spec.eps
    if spec.root == "sqrt":
        return h / torch.sqrt(under_root)
    factor = torch.rsqrt(under_root) if spec.root == "rsqrt" else 1 / torch.sqrt(under_root)
    if spec.order == "cast_factor":
        return h.to(dtype) * factor.to(dtype)
    return h * factor


def _scale(spec: NormSpec, weight: Tensor, stats: torch.dtype) -> Tensor:
    if spec.scale == "weight":
        return weight
    return 1.0 + (weight.to(stats) if spec.offset_in_float32 else weight)


def _check_inputs(spec: NormSpec, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None) -> None:
    for name, given, wanted in (
        ("weight", weight, spec.has_weight),
        ("bias", bias, spec.bias),
        ("gate", gate, spec.gate != "none"),
    ):
        if (given is not None) != wanted:
            state = "is missing, but the spec needs it" if wanted else "was given, but the spec has none"
            raise UsageError(f"norm input {name!r} {state} ({spec.describe()}).")
