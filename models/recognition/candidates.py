"""The candidates for a module's NormSpec, in the order in which they are tried.

Of specs that give the same bits, the first is chosen. The tables here contain every value of every field of NormSpec.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import assert_never

import torch
from torch import nn

from ..dtypes import NORM_DTYPES, torch_dtype
from ..spec import Activation, Gate, NormSpec, Order, Reduction, Root, Scale, Statistics

# By whether the module has a weight.
SCALES: dict[bool, tuple[Scale, ...]] = {False: ("none",), True: ("weight", "one_plus_weight")}
# By whether the module takes a second input, which it may not use as a gate.
GATES: dict[bool, tuple[Gate, ...]] = {False: ("none",), True: ("none", "after", "before")}
ACTIVATIONS: dict[Gate, tuple[Activation, ...]] = {
    "none": ("none",),
    "after": ("silu", "sigmoid"),
    "before": ("silu", "sigmoid"),
}
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum")
ROOTS: tuple[Root, ...] = ("rsqrt", "sqrt", "reciprocal")
ORDERS: dict[Order, Statistics] = {
    "scale_then_cast": "float32",
    "cast_then_scale": "float32",
    "cast_factor": "float32",
    "no_upcast": "input",
}
# The statistics that give the same bits in float32 and in half types, and differ for float64.
SAME_IN_HALF: dict[Statistics, tuple[Statistics, ...]] = {
    "float32": ("float32", "promoted"),
    "promoted": ("float32", "promoted"),
    "input": ("input",),
}
# A factor that is rounded separately multiplies x itself: nothing divides by the root, and no gate precedes it.
_MULTIPLIES: dict[Root, bool] = {"rsqrt": True, "sqrt": False, "reciprocal": True}
_GATES_BEFORE: dict[Gate, bool] = {"none": False, "before": True, "after": False}


def stated_eps(module: nn.Module, measured: float | None) -> list[float]:
    """Candidates for eps: the module's float attributes, the machine epsilons, the measured value rounded."""
    stated = [float(v) for v in vars(module).values() if isinstance(v, float) and 0 <= v < 1]
    stated += [float(b) for b in module._buffers.values() if b is not None and b.numel() == 1]
    stated += [torch.finfo(torch_dtype(name)).eps for name in NORM_DTYPES]
    if measured is None:
        return list(dict.fromkeys([*stated, *(10.0**-n for n in range(3, 13)), 0.0]))
    stated += [float(f"{measured:.{digits}g}") for digits in (1, 2, 3, 4)]
    return list(dict.fromkeys(v for v in stated if math.isclose(v, measured, rel_tol=2e-3)))


def in_float32(base: NormSpec, has_weight: bool, has_bias: bool, gated: bool) -> Iterator[NormSpec]:
    """The specs whose results in float32 may differ, with the eps, dims and groups of `base`."""
    gates = [(gate, activation) for gate in GATES[gated] for activation in ACTIVATIONS[gate]]
    for (gate, activation), scale, reduction, root in itertools.product(gates, SCALES[has_weight], REDUCTIONS, ROOTS):
        yield base.replace(
            scale=scale, reduction=reduction, root=root, gate=gate, activation=activation, bias=has_bias
        )  # fmt: skip


def in_half(spec: NormSpec) -> Iterator[NormSpec]:
    """The specs that give the same results as `spec` in float32, and may differ in half types."""
    for order, statistics in ORDERS.items():
        if _is_possible(spec, order):
            for offset in (True, False) if spec.scale_offset else (True,):
                yield spec.replace(order=order, statistics=statistics, offset_in_float32=offset)


def _is_possible(spec: NormSpec, order: Order) -> bool:
    match order:
        case "scale_then_cast" | "cast_then_scale" | "no_upcast":
            return True
        case "cast_factor":
            return _MULTIPLIES[spec.root] and not _GATES_BEFORE[spec.gate]
        case _:
            assert_never(order)
