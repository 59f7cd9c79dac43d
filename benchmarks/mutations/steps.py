"""Wrong steps: changes of a weight, of one step of a spelled norm, and of the body of a plugin operator's function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from .surgery import FLOAT, FLOAT16, Array, Spelling, bias_of, scale_of

# ------------------------------------------------------------------------------------------------------------- weights


def bfloat16(array: Array) -> Array:
    return array.astype(ir.DataType.BFLOAT16.numpy()).astype(np.float64)


def half(array: Array) -> Array:
    return array.astype(np.float16).astype(np.float64)


def swapped_channels(array: Array) -> Array:
    order = np.arange(len(array))
    order[[1, 2]] = order[[2, 1]]
    return array[order]


def times_at(index: int, factor: float) -> Callable[[Array], Array]:
    return lambda array: np.where(np.arange(len(array)) == index, array * factor, array)


# ---------------------------------------------------------------------------------------------- steps of a spelled norm


def eps_outside(s: Spelling, h: ir.Value, mean: ir.Value) -> ir.Value:
    return s.op("Div", h, s.op("Add", s.op("Sqrt", mean), s.number(s.spec.eps)))


def without_eps(s: Spelling, h: ir.Value, mean: ir.Value) -> ir.Value:
    return s.op("Div", h, s.op("Sqrt", mean))


def mean_in(dtype: int) -> Callable[[Spelling, ir.Value], ir.Value]:
    """Squares and their mean in a half type, written as float32 operators with roundings, which runtimes keep."""

    def step(s: Spelling, h: ir.Value) -> ir.Value:
        x = s.rounded(h, dtype)
        return s.rounded(s.mean(s.rounded(s.op("Mul", x, x), dtype)), dtype)

    return step


def variance(s: Spelling, h: ir.Value) -> ir.Value:
    centered = s.op("Sub", h, s.mean(h))
    return s.mean(s.op("Mul", centered, centered))


def centered(s: Spelling, x: ir.Value) -> ir.Value:
    h = s.op("Cast", x, to=FLOAT)
    return s.op("Sub", h, s.mean(h))


def bessel(s: Spelling, h: ir.Value) -> ir.Value:
    return s.op("Mul", s.mean(s.op("Mul", h, h)), s.number(s.width / (s.width - 1)))


def mean_size(s: Spelling, h: ir.Value) -> ir.Value:
    mean = s.mean(s.op("Abs", h))
    return s.op("Mul", mean, mean)


def other_axis(s: Spelling, h: ir.Value) -> ir.Value:
    return s.mean(s.op("Mul", h, h), axis=-2)


def all_axes(s: Spelling, h: ir.Value) -> ir.Value:
    return s.mean(s.op("Mul", h, h), axis=0)


def clamped(s: Spelling, h: ir.Value, mean: ir.Value) -> ir.Value:
    return s.op("Clip", s.normalize(h, mean), s.number(-4.0), s.number(4.0))


def slightly_larger(s: Spelling, h: ir.Value) -> ir.Value:
    return s.op("Mul", s.leave(h), s.number(1.001, int(s.dtype)))


def scaled_in_half(s: Spelling, h: ir.Value) -> ir.Value:
    """The cast before the scale, where the module scales before it casts.

    The product of two float16 numbers is exact in float32, so this rounds as a float16 product does; ONNX Runtime
    would omit the first cast before a float16 Mul, for which it has no kernel on a CPU.
    """
    h = s.op("Mul", s.rounded(h, int(s.dtype)), s.parameter(scale_of(s.norm), FLOAT))
    return s.op("Cast", h, to=int(s.dtype))


def bias_before_scale(s: Spelling, h: ir.Value) -> ir.Value:
    h = s.op("Add", h, s.parameter(bias_of(s.norm), FLOAT))
    return s.op("Cast", s.op("Mul", h, s.parameter(scale_of(s.norm), FLOAT)), to=int(s.dtype))


def gate_itself(s: Spelling) -> ir.Value:
    return s.op("Cast", s.norm.gate, to=FLOAT)


def rounded_x(s: Spelling, x: ir.Value) -> ir.Value:
    return s.rounded(x, FLOAT16)


def weighed_first(s: Spelling, x: ir.Value) -> ir.Value:
    """The weight is applied to x before the statistics, not to the normalized value."""
    return s.op("Mul", s.op("Cast", x, to=FLOAT), s.parameter(scale_of(s.norm), FLOAT))


def unweighed(s: Spelling, h: ir.Value) -> ir.Value:
    return s.op("Cast", h, to=int(s.dtype))


# --------------------------------------------------------------------------------------------- residual adds, functions


def x_alone(s: Spelling, a: ir.Value, b: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The residual is omitted."""
    total = s.op("Add", a, s.op("Sub", b, b))
    return total, total


def residual_twice(s: Spelling, a: ir.Value, b: ir.Value) -> tuple[ir.Value, ir.Value]:
    total = s.op("Add", s.op("Add", a, b), b)
    return total, total


def stale_sum(body: ir.Function, add: ir.Node) -> None:
    """The function returns X in place of the sum."""
    node = ir.node("Identity", [body.inputs[0]])
    node.outputs[0].name = "stale"
    body.append(node)
    body.outputs[1] = node.outputs[0]


def dropped_residual(body: ir.Function, add: ir.Node) -> None:
    add.op_type = "Identity"
    add.resize_inputs(1)


def doubled_residual(body: ir.Function, add: ir.Node) -> None:
    node = ir.node("Add", [body.inputs[1], body.inputs[1]])
    node.outputs[0].name = "doubled"
    body.insert_before(add, node)
    add.replace_input_with(1, node.outputs[0])


def renamed(change: dict[str, str]) -> Callable[[ir.Function, ir.Node], None]:
    """Another operator in a function's body."""

    def apply(body: ir.Function, node: ir.Node) -> None:
        node.op_type = change[node.op_type]

    return apply
