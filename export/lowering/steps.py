"""Write one norm as ONNX operators.

Every NormSpec is split into steps around a *core*: casts, gate and groups before it; scale, bias, gate and casts after
it, in the order of the module. Only the core differs between targets.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import onnx_ir as ir

from ...models.dtypes import NORM_DTYPES, onnx_name
from ...models.errors import UnsupportedError
from ...models.spec import NormSpec, Order
from ...plugins import contract
from ..graph.constants import HALF_TYPES, constant, is_floating
from .builder import Builder, promote

FLOAT = ir.DataType.FLOAT
DOUBLE = ir.DataType.DOUBLE
# Whether the normalized value is cast to x's dtype before the scale multiplies; then the last cast is not required.
_CASTS_FIRST: dict[Order, bool] = {
    "scale_then_cast": False,
    "cast_then_scale": True,
    "cast_factor": True,
    "no_upcast": False,
}
# Whether the factor is rounded to x's dtype, where that is a half type.
_CASTS_FACTOR: dict[Order, bool] = {
    "scale_then_cast": False,
    "cast_then_scale": False,
    "cast_factor": True,
    "no_upcast": False,
}
# A larger dim occurs only in a damaged file.
_WIDEST = 1 << 24


@dataclass(frozen=True, slots=True)
class NormInputs:
    """The values that a norm reads. `sum_of` are the operands of a residual add that is to be fused, or None."""

    x: ir.Value
    weight: ir.Value | None
    bias: ir.Value | None
    gate: ir.Value | None
    sum_of: tuple[ir.Value, ir.Value] | None = None


@dataclass(frozen=True, slots=True)
class Emitted:
    """The new values and the main node: the normalized output, and the sum where the residual add was fused."""

    output: ir.Value
    total: ir.Value | None
    core: ir.Node


@dataclass(frozen=True, slots=True)
class Core:
    """A norm without gate, groups or bias over the last `dims` dims, X and scale of one dtype.

    Attributes:
        x: the value to normalize.
        scale: weight of the normalized dims' shape, or None.
        offset: added to the scale in float32 before it multiplies; only the plugin sees a value other than 0.
        eps: added to the mean of squares.
        dims: number of normalized trailing dims.
        cast_first: cast to X's dtype before the scale multiplies (True) or after (False).
        cast_factor: round the factor to X's dtype before it multiplies X.
        use_sum: use the sum of squares instead of their mean.
        sum_of: operands of a residual add to fuse, or None.
    """

    x: ir.Value
    scale: ir.Value | None
    offset: float
    eps: float
    dims: int
    cast_first: bool
    cast_factor: bool = False
    use_sum: bool = False
    sum_of: tuple[ir.Value, ir.Value] | None = None


def emit(builder: Builder, spec: NormSpec, inputs: NormInputs, target: str, path: str) -> Emitted:
    """Write the norm for `target`.

    Args:
        builder: collects the nodes.
        spec: what to compute.
        inputs: the values it reads, with dtypes; the rank of x must be known where dims are regrouped.
        target: one of the lowering table's targets.
        path: the module's path, for messages.

    Raises:
        UnsupportedError: a shape or dtype that the lowering requires is unknown, or x is not of a dtype of norms.
    """
    dtype = inputs.x.dtype
    if dtype is None:
        raise UnsupportedError(f"norm {path!r}: the dtype of its input is unknown in the captured graph.")
    if not is_floating(dtype):
        raise UnsupportedError(
            f"norm {path!r}: expected an input of {', '.join(NORM_DTYPES)}, got {onnx_name(dtype)}. Cast it to one of "
            "these before the norm."
        )
    match spec.root:
        case "rsqrt" | "sqrt" | "reciprocal":
            pass  # every core divides by the root: these forms differ in the last bit only
        case _:
            assert_never(spec.root)
    direct = _direct_core(builder, spec, inputs, target)
    if direct is not None:
        return _emit_core(builder, direct, target)
    return _emit_steps(builder, spec, inputs, target, path)


def statistics_type(spec: NormSpec, dtype: ir.DataType) -> ir.DataType:
    """The dtype of the statistics in the graph: the spec's, but never a half type."""
    return DOUBLE if spec.sums_in_double and dtype == DOUBLE else FLOAT


def _direct_core(builder: Builder, spec: NormSpec, inputs: NormInputs, target: str) -> Core | None:
    """The core that is the whole norm, or None."""
    x, weight = inputs.x, inputs.weight
    dtype = promote(x.dtype, x.dtype)
    stats = statistics_type(spec, dtype)
    if spec.has_gate or spec.bias or spec.group_size is not None or not spec.has_mean:
        return None
    factor_is_cast = _CASTS_FACTOR[spec.order] and target == "primitives" and dtype in HALF_TYPES
    if dtype not in (stats, *HALF_TYPES) or factor_is_cast:
        return None
    if weight is not None and not (weight.dtype == dtype and _spans(weight, x, spec.trailing_dims)):
        return None
    if target == "plugin" and (dtype == DOUBLE or spec.trailing_dims != 1):
        return None
    cast_first = _CASTS_FIRST[spec.order] and not _CASTS_FACTOR[spec.order]
    if spec.scale_offset and weight is not None:
        if target == "plugin" and (spec.offset_in_float32 != cast_first or dtype == FLOAT):
            return Core(x, weight, spec.scale_offset, spec.eps, spec.trailing_dims, cast_first, sum_of=inputs.sum_of)
        if dtype in HALF_TYPES and (spec.offset_in_float32 or not cast_first):
            return None  # 1 + weight is not exact in a half type, so the steps compute it in float32
        weight = _scale(builder, spec, weight, stats)
    return Core(x, weight, 0.0, spec.eps, spec.trailing_dims, cast_first, sum_of=inputs.sum_of)


def _emit_steps(builder: Builder, spec: NormSpec, inputs: NormInputs, target: str, path: str) -> Emitted:
    """The general case, step by step as `NormSpec` defines it, with a core without a scale or with a scale in S."""
    x, shape = inputs.x, inputs.x.shape
    dtype = promote(x.dtype, x.dtype)
    stats = statistics_type(spec, dtype)
    h = builder.cast(x, stats)
    before, after = _gates(builder, spec, inputs.gate, stats)
    if before is not None:
        h = builder.binary("Mul", h, before, shape)
    scale = _scale(builder, spec, inputs.weight, stats) if inputs.weight is not None else None
    result = _result_type(spec, dtype, scale, inputs.bias)
    # A result that is wider than x is x's dtype, times the wider scale or plus the wider bias.
    casts_first = _CASTS_FIRST[spec.order] or result != dtype
    scales_in_core = (
        inputs.weight is not None and spec.group_size is None and not casts_first
        and spec.has_mean and promote(inputs.weight.dtype, stats) == stats
        and _spans(inputs.weight, x, spec.trailing_dims)
        and (spec.offset_in_float32 or spec.scale_offset == 0.0)
    )  # fmt: skip
    core_scale = builder.cast(scale, stats) if scale is not None and scales_in_core else None
    emitted = _grouped_core(builder, spec, h, core_scale, target, path, dtype)
    h = emitted.output
    if casts_first:
        h = builder.cast(h, dtype)
    if scale is not None and not scales_in_core:
        h = builder.binary("Mul", h, scale, shape)
    if inputs.bias is not None:
        h = builder.binary("Add", h, inputs.bias, shape)
    if after is not None:
        h = builder.binary("Mul", h, after, shape)
    return Emitted(builder.cast(h, result), None, emitted.core)


def _result_type(spec: NormSpec, dtype: ir.DataType, scale: ir.Value | None, bias: ir.Value | None) -> ir.DataType:
    """The dtype of the result: that of x, or of a wider scale or bias where no cast follows."""
    # Without an upcast, 1 + weight has x's dtype.
    own = spec.sums_in_half and spec.offset_in_float32 and spec.scale_offset != 0.0
    factors = (None if own else scale, bias) if spec.follows_weight else ()
    return functools.reduce(promote, (f.dtype for f in factors if f is not None and f.shape != ir.Shape([])), dtype)


def _gates(
    builder: Builder, spec: NormSpec, gate: ir.Value | None, stats: ir.DataType
) -> tuple[ir.Value | None, ir.Value | None]:
    """The activated gate that multiplies before the norm, or None, and the one that multiplies after it, or None."""
    if gate is None:
        return None, None
    match spec.gate:
        case "none":
            return None, None
        case "before":
            return _activated(builder, spec, gate, stats), None
        case "after":
            return None, _activated(builder, spec, gate, stats)
        case _:
            assert_never(spec.gate)


def _activated(builder: Builder, spec: NormSpec, gate: ir.Value, stats: ir.DataType) -> ir.Value:
    z = builder.cast(gate, stats)
    match spec.activation:
        case "none":
            return z
        case "silu":
            sigmoid = builder.op("Sigmoid", [z], dtype=stats, shape=gate.shape)
            return builder.binary("Mul", z, sigmoid, gate.shape)
        case "sigmoid":
            return builder.op("Sigmoid", [z], dtype=stats, shape=gate.shape)
        case _:
            assert_never(spec.activation)


def _scale(builder: Builder, spec: NormSpec, weight: ir.Value, stats: ir.DataType) -> ir.Value:
    """The weight, or 1 + weight in the dtype in which the module adds 1; folded if the weight is constant."""
    if spec.scale_offset == 0.0:
        return weight
    dtype = stats if spec.offset_in_float32 else promote(weight.dtype, weight.dtype)
    array = constant(weight)
    if array is not None:
        wide = array.astype(np.float64 if dtype == DOUBLE else np.float32)
        return builder.constant(np.add(wide, spec.scale_offset, dtype=wide.dtype), dtype, f"one_plus.{weight.name}")
    return builder.binary(
        "Add", builder.cast(weight, dtype), builder.constant(np.array(spec.scale_offset), dtype, "one"), weight.shape
    )


def _grouped_core(
    builder: Builder, spec: NormSpec, h: ir.Value, scale: ir.Value | None, target: str, path: str, dtype: ir.DataType
) -> Emitted:
    """The core, with x's last dims regrouped where the spec has groups or the plugin requires a single dim."""
    dims = spec.trailing_dims
    eps, after = spec.eps, None
    if not spec.has_mean and target != "primitives":
        count = _count(h, dims, path) if spec.group_size is None else spec.group_size
        eps, after = spec.eps / count, builder.constant(np.array(1 / math.sqrt(count)), _type(h), "inverse_root")
    shape = h.shape
    regrouped = spec.group_size is not None or (target == "plugin" and dims > 1)
    if regrouped:
        h = _reshape_tail(builder, h, dims, _regrouped(h, dims, spec.group_size), path)
        scale = _reshape_tail(builder, scale, dims, [-1], path) if scale is not None else None
        dims = 1
    core = Core(
        h, scale, 0.0, eps, dims, False,
        cast_factor=_CASTS_FACTOR[spec.order] and dtype in HALF_TYPES,
        use_sum=after is None and not spec.has_mean,
    )  # fmt: skip
    emitted = _emit_core(builder, core, target, dtype)
    output = emitted.output
    if regrouped and shape is not None:
        tail = [dim if isinstance(dim, int) else -1 for dim in shape[len(shape) - spec.trailing_dims :]]
        output = _reshape_tail(builder, output, 1 if spec.group_size is None else 2, tail, path)
        output.shape = shape.copy()
    if after is not None:
        output = builder.binary("Mul", output, after, shape)
    return Emitted(output, None, emitted.core)


def _regrouped(value: ir.Value, dims: int, group_size: int | None) -> list[int]:
    """The dims that replace the last `dims`: number of groups and their size, or a single dim. -1 where unknown."""
    tail = _static_tail(value.shape, dims)
    count = math.prod(tail) if tail is not None else -1
    if group_size is None:
        return [count]
    return [count // group_size if count >= 0 else -1, group_size]


def _reshape_tail(builder: Builder, value: ir.Value, dims: int, tail: list[int], path: str) -> ir.Value:
    """The value with its last `dims` dims replaced by `tail`; the dims before them are kept, also where they are 0."""
    if value.shape is None:
        raise UnsupportedError(f"norm {path!r}: the rank of its input is unknown, so its groups cannot be lowered.")
    kept = len(value.shape) - dims
    target = builder.constant(np.array([0] * kept + tail), ir.DataType.INT64, "shape")
    shape = ir.Shape([*value.shape[:kept], *(size if size >= 0 else None for size in tail)])
    return builder.op("Reshape", [value, target], dtype=_type(value), shape=shape)


# The cores --------------------------------------------------------------------------------------------------------


def _emit_core(builder: Builder, core: Core, target: str, dtype: ir.DataType | None = None) -> Emitted:
    if core.use_sum or (core.cast_factor and target == "primitives"):
        return _primitives(builder, core, dtype)
    return _CORES[target](builder, core)


def _primitives(builder: Builder, core: Core, factor_dtype: ir.DataType | None = None) -> Emitted:
    """x / sqrt(mean(x^2) + eps) in the form that ONNX Runtime fuses: Pow by 2, Sqrt, Div."""
    dtype = _type(core.x)
    stats = FLOAT if dtype in HALF_TYPES else dtype
    h = builder.cast(core.x, stats)
    squares = builder.op("Pow", [h, builder.constant(np.array(2.0), stats, "two")], dtype=stats, shape=h.shape)
    reduced = _reduced_shape(h.shape, core.dims)
    mean = _reduced(builder, "ReduceSum" if core.use_sum else "ReduceMean", squares, core.dims, reduced)
    under = builder.binary("Add", mean, builder.constant(np.array(core.eps), stats, "epsilon"), reduced)
    root = builder.op("Sqrt", [under], dtype=stats, shape=reduced)
    if core.cast_factor and factor_dtype is not None:
        factor = builder.binary("Div", builder.constant(np.array(1.0), stats, "one"), root, reduced)
        y = builder.op(
            "Mul", [builder.cast(core.x, factor_dtype), builder.cast(factor, factor_dtype)],
            dtype=factor_dtype, shape=h.shape,
        )  # fmt: skip
        return Emitted(y, None, _producer(y))
    y = builder.binary("Div", h, root, h.shape)
    node = _producer(y)
    scale = core.scale if core.scale is not None else _ones(builder, core, dtype)
    if core.cast_first:
        y = builder.cast(y, dtype)
    if scale is not None:
        y = builder.binary("Mul", y, builder.cast(scale, _type(y)), h.shape)
    return Emitted(builder.cast(y, dtype), None, node)


def _reduced(builder: Builder, op_type: str, value: ir.Value, dims: int, shape: ir.Shape | None) -> ir.Value:
    """The sum or mean over the last dims. The axes are an input since opset 13 (ReduceSum) and 18 (ReduceMean)."""
    axes = list(range(-dims, 0))
    if builder.opset < (13 if op_type == "ReduceSum" else 18):
        return builder.op(op_type, [value], {"axes": axes, "keepdims": 1}, dtype=_type(value), shape=shape)
    axes_input = builder.constant(np.array(axes), ir.DataType.INT64, "axes")
    return builder.op(op_type, [value, axes_input], {"keepdims": 1}, dtype=_type(value), shape=shape)


def _standard(builder: Builder, core: Core) -> Emitted:
    """RMSNormalization. It casts before it scales, so for the other order it runs in float32."""
    dtype = _type(core.x)
    inner = FLOAT if dtype in HALF_TYPES and not core.cast_first and core.scale is not None else dtype
    x = builder.cast(core.x, inner)
    scale = builder.cast(core.scale, inner) if core.scale is not None else _ones(builder, core, inner)
    attributes = {"axis": -core.dims, "epsilon": core.eps, "stash_type": _stash(inner)}
    y = builder.op("RMSNormalization", [x, _needed(scale)], attributes, dtype=inner, shape=x.shape)
    return Emitted(builder.cast(y, dtype), None, _producer(y))


def _ort(builder: Builder, core: Core) -> Emitted:
    """ONNX Runtime's fused operator, which is in the default domain since opset 1."""
    dtype = _type(core.x)
    scale = core.scale if core.scale is not None else _ones(builder, core, dtype)
    attributes = {"axis": -core.dims, "epsilon": core.eps, "stash_type": _stash(dtype)}
    y = builder.op(
        "SimplifiedLayerNormalization", [core.x, _needed(scale)], attributes, dtype=dtype, shape=core.x.shape
    )
    return Emitted(y, None, _producer(y))


def _plugin(builder: Builder, core: Core) -> Emitted:
    dtype = _type(core.x)
    scale = core.scale if core.scale is not None else _ones(builder, core, dtype)
    attributes = {
        "epsilon": core.eps,
        "scale_offset": core.offset,
        "scale_type": int(dtype if core.cast_first else FLOAT),
        **contract.PARSER_ATTRIBUTES,
    }
    op_type, operands, outputs = contract.RMS_NORM, [core.x], 1
    if core.sum_of is not None:
        op_type, operands, outputs = contract.ADD_RMS_NORM, list(core.sum_of), 2
    y = builder.op(
        op_type, [*operands, _needed(scale)], attributes,
        domain=contract.DOMAIN, dtype=dtype, shape=core.x.shape, outputs=outputs,
    )  # fmt: skip
    node = _producer(y)
    return Emitted(y, node.outputs[1] if outputs == 2 else None, node)


_CORES: dict[str, Callable[[Builder, Core], Emitted]] = {
    "primitives": _primitives,
    "standard": _standard,
    "ort": _ort,
    "plugin": _plugin,
}


def _ones(builder: Builder, core: Core, dtype: ir.DataType) -> ir.Value | None:
    """A scale of ones for operators that require one; None where the width is not static."""
    shape = core.x.shape
    tail = _static_tail(shape, core.dims)
    return builder.constant(np.ones(tail), dtype, "ones") if tail is not None else None


def _needed(scale: ir.Value | None) -> ir.Value:
    if scale is None:
        raise UnsupportedError(
            "the dims that a norm normalizes are dynamic, and this target's operator requires a scale of their shape. "
            "Make them static in the example inputs or in the file, or use --target primitives."
        )
    return scale


def _spans(weight: ir.Value, x: ir.Value, dims: int) -> bool:
    """Whether the weight has the shape of x's normalized dims."""
    if weight.shape is None or x.shape is None or len(weight.shape) != dims or len(x.shape) < dims:
        return False
    return list(weight.shape) == list(x.shape[len(x.shape) - dims :])


def _count(value: ir.Value, dims: int, path: str) -> int:
    tail = _static_tail(value.shape, dims)
    if tail is None:
        raise UnsupportedError(f"norm {path!r} sums squares over a dynamic width; use --target primitives.")
    return math.prod(tail)


def _static_tail(shape: ir.Shape | None, dims: int) -> list[int] | None:
    """The last `dims` dims if all are static, or None."""
    if shape is None or len(shape) < dims:
        return None
    tail = [dim for dim in shape[len(shape) - dims :] if isinstance(dim, int) and 0 < dim <= _WIDEST]
    return tail if len(tail) == dims else None


def _reduced_shape(shape: ir.Shape | None, dims: int) -> ir.Shape | None:
    return None if shape is None else ir.Shape([*shape[: len(shape) - dims], *([1] * dims)])


def _stash(dtype: ir.DataType) -> int:
    return int(DOUBLE if dtype == DOUBLE else FLOAT)


def _type(value: ir.Value) -> ir.DataType:
    return promote(value.dtype, value.dtype)


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    if node is None:
        raise ValueError("the value is not computed by a node")
    return node
