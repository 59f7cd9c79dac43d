"""The norm in float64 with NumPy: the truth that every implementation is measured against.

It shares no code with `eager` or with any lowering, and takes the spec's meaning only: casts do not exist here.
"""

from __future__ import annotations

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
        spec: what to compute; its casts, statistics dtype and spelling of the root do not matter here.
        x: `[..., *normalized dims]`, any real dtype.
        weight: broadcastable to x's trailing dims, read when the spec has a weight.
        bias: like weight, read when the spec has a bias.
        gate: x's shape, read when the spec has a gate.

    Returns:
        float64, x's shape. Rows whose statistics are zero (x = 0 with eps = 0) are NaN, as the formula says.
    """
    values = np.asarray(x, dtype=np.float64)
    result = values
    activated: NDArray[np.float64] = np.ones(())
    if spec.gate != "none":
        z = np.asarray(gate, dtype=np.float64)
        with np.errstate(over="ignore"):
            activated = (z if spec.activation == "silu" else 1.0) / (1.0 + np.exp(-z))
    if spec.gate == "before":
        result = result * activated
    if spec.group_size is not None:
        result = result.reshape(*values.shape[:-1], -1, spec.group_size)
    axes = tuple(range(-spec.trailing_dims, 0))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        total = np.sum(result * result, axis=axes, keepdims=True)
        if spec.reduction == "mean":
            total = total / np.prod([result.shape[axis] for axis in axes])
        result = (result / np.sqrt(total + spec.eps)).reshape(values.shape)
    if spec.scale == "weight":
        result = result * np.asarray(weight, dtype=np.float64)
    elif spec.scale == "one_plus_weight":
        result = result * (1.0 + np.asarray(weight, dtype=np.float64))
    if spec.bias:
        result = result + np.asarray(bias, dtype=np.float64)
    return result * activated if spec.gate == "after" else result
