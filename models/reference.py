"""The norm in float64 with NumPy: the reference that every implementation is measured against.

It shares no code with `eager` or with any lowering, and ignores the casts of the spec.
"""

from __future__ import annotations

from typing import assert_never

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .spec import NormSpec


def reference(
    spec: NormSpec,
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    gate: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """RMSNorm(x) = x / sqrt(mean(x^2) + eps) * scale, in float64 (Zhang and Sennrich 2019, arXiv:1910.07467).

    Args:
        spec: what to compute; its casts, statistics dtype and form of the root are ignored.
        x: `[..., *normalized dims]`, any real dtype.
        weight: broadcastable to x's trailing dims, read when the spec has a weight.
        bias: like weight, read when the spec has a bias.
        gate: x's shape, read when the spec has a gate.

    Returns:
        float64, x's shape. Rows whose statistics are zero (x = 0 with eps = 0) are NaN, which the formula gives.
    """
    values = np.asarray(x, dtype=np.float64)
    before = after = np.ones(())
    match spec.gate:
        case "none":
            pass
        case "before":
            before = _activated(spec, gate)
        case "after":
            after = _activated(spec, gate)
        case _:
            assert_never(spec.gate)
    result = values * before
    if spec.group_size is not None:
        result = result.reshape(*values.shape[:-1], -1, spec.group_size)
    axes = tuple(range(-spec.trailing_dims, 0))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        total = np.sum(result * result, axis=axes, keepdims=True)
        count = np.prod([result.shape[axis] for axis in axes])
        result = (result / np.sqrt(_reduced(spec, total, count) + spec.eps)).reshape(values.shape)
    result = _scaled(spec, result, weight)
    if spec.bias:
        result = result + np.asarray(bias, dtype=np.float64)
    return result * after


def _activated(spec: NormSpec, gate: ArrayLike | None) -> NDArray[np.float64]:
    z = np.asarray(gate, dtype=np.float64)
    with np.errstate(over="ignore"):
        match spec.activation:
            case "none":
                return z
            case "silu":
                return z / (1.0 + np.exp(-z))
            case "sigmoid":
                return 1.0 / (1.0 + np.exp(-z))
            case _:
                assert_never(spec.activation)


def _reduced(spec: NormSpec, total: NDArray[np.float64], count: np.integer) -> NDArray[np.float64]:
    match spec.reduction:
        case "mean":
            return total / count
        case "sum":
            return total
        case _:
            assert_never(spec.reduction)


def _scaled(spec: NormSpec, values: NDArray[np.float64], weight: ArrayLike | None) -> NDArray[np.float64]:
    match spec.scale:
        case "none":
            return values
        case "weight":
            return values * np.asarray(weight, dtype=np.float64)
        case "one_plus_weight":
            return values * (1.0 + np.asarray(weight, dtype=np.float64))
        case _:
            assert_never(spec.scale)
