"""Convert a normalized value and its steps to the NormSpec that describes them, if there is one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...models.spec import NormSpec, Order, Statistics
from ..graph.constants import DEFAULT_DOMAINS, constant, dims, is_half, regrouping, same_dims, scalar, static
from ..graph.site import node_name
from .dataflow import GraphReader
from .terms import Activated, Normed, Step

_RESHAPES = ("Reshape", "Unsqueeze", "Squeeze", "Identity")
_FLOAT, _DOUBLE = ir.DataType.FLOAT, ir.DataType.DOUBLE
_STATISTICS: dict[Order, Statistics] = {
    "scale_then_cast": "float32",
    "cast_then_scale": "float32",
    "no_upcast": "input",
    "cast_factor": "float32",
}
# Whether no cast follows the scale, so that a float32 weight gives a float32 result.
_SCALES_LAST: dict[Order, bool] = {
    "scale_then_cast": False,
    "cast_then_scale": True,
    "no_upcast": True,
    "cast_factor": True,
}
# Whether x may be divided by the root; a factor that is rounded separately multiplies.
_MAY_DIVIDE: dict[Order, bool] = {
    "scale_then_cast": True,
    "cast_then_scale": True,
    "no_upcast": True,
    "cast_factor": False,
}
# The remaining coefficient must be 1, up to the rounding of constants such as sqrt(n) in float16.
_COEFFICIENT = 2e-3
_COEFFICIENT_WIDE = 1e-5


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A norm as a spec and the values that it reads."""

    spec: NormSpec
    x: ir.Value
    weight: ir.Value | None
    bias: ir.Value | None
    gate: ir.Value | None
    y: ir.Value
    normed: Normed
    inside: tuple[ir.Node, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Input:
    """A candidate for x: the value, its gate and groups, and the nodes between it and the statistic."""

    x: ir.Value
    gate: ir.Value | None
    activation: Any
    group_size: int | None
    trailing_dims: int
    nodes: tuple[ir.Node, ...]


def reading(normed: Normed, reader: GraphReader) -> Reading | str:
    """The longest part of a norm, from its statistic on, that a spec can describe; or why there is none."""
    current: Normed | None = normed
    reason = ""
    while current is not None:
        if _is_whole(current):
            for given in _inputs(current, reader):
                found = _read(current, given, reader)
                if found is not None:
                    return found
        elif not reason:
            reason = _l2(current)
        current = current.previous
    return reason or _narrow(normed) or "its casts, scales and gates are in an order that no NormSpec describes"


def _narrow(normed: Normed) -> str:
    """That the statistics pass through a half type; empty where they do not."""
    if not normed.half:
        return ""
    narrow = next((node for node in normed.nodes if is_half(node.outputs[0].dtype)), None)
    if narrow is None or narrow.outputs[0].dtype is None:
        return ""
    squared = normed.nodes.index(narrow) <= normed.nodes.index(normed.reduce)
    what = "squares pass" if squared else "mean of squares passes"
    dtype = narrow.outputs[0].dtype.name.lower()
    effect = ", where large values overflow" if dtype == "float16" else ""
    return f"its {what} through {dtype}{effect} ({narrow.op_type} {node_name(narrow)!r})"


def _is_whole(normed: Normed) -> bool:
    tolerance = _COEFFICIENT if is_half(normed.inner) else _COEFFICIENT_WIDE
    return math.isclose(normed.coefficient, 1.0, rel_tol=tolerance)


def _l2(normed: Normed) -> str:
    tail = static(dims(normed.operand), normed.axes)
    if tail is not None and math.isclose(normed.coefficient * math.sqrt(math.prod(tail)), 1.0, rel_tol=1e-3):
        return "it divides by the root of the sum of squares, not of their mean: an L2 norm"
    return f"its result is {normed.coefficient:.6g} times that of an RMSNorm"


def _inputs(normed: Normed, reader: GraphReader) -> list[_Input]:
    """Candidates for x, the one that includes most nodes first."""
    reshaped = any(step.kind == "reshape" for step in normed.steps)
    root = normed.root
    nodes: tuple[ir.Node, ...] = ()
    group: int | None = None
    axes = normed.axes
    if reshaped:
        node = root.producer()
        before = None if node is None else node.inputs[0]
        split = regrouping(before, root, axes)
        if before is None or node is None or split is None:
            return []
        group, axes = split
        root, nodes = before, (node,)
    ways = []
    gated = _gated(reader.root(root), reader, {*normed.nodes, *nodes})
    if gated is not None:
        x, gate, activated, product = gated
        inside = (*activated.nodes, product, *nodes)
        ways.append(_Input(x, gate, activated.kind, group, axes, inside))
    narrow = reader.root(root)
    ways.append(_Input(narrow, None, "none", group, axes, nodes))
    if not reshaped and normed.operand is not narrow:
        ways.append(_Input(normed.operand, None, "none", None, axes, ()))
    return ways


def _gated(
    root: ir.Value, reader: GraphReader, norm_nodes: set[ir.Node]
) -> tuple[ir.Value, ir.Value, Activated, ir.Node] | None:
    """x, gate, activation and product if x * act(gate) is normalized and nothing else reads the product; or None."""
    node = root.producer()
    if node is None or node.op_type != "Mul" or node.domain not in DEFAULT_DOMAINS or root.is_graph_output():
        return None
    others = (use.node for use in root.uses() if use.node not in norm_nodes and use.node.op_type != "Shape")
    if isinstance(reader.terms.get(root), Activated) or next(others, None) is not None:
        return None
    for x, other in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        term = None if other is None else reader.terms.get(other)
        if x is None or not isinstance(term, Activated) or is_half(term.taken.dtype) != is_half(root.dtype):
            continue
        if same_dims(dims(x), dims(term.root)) and same_dims(dims(x), dims(root)):
            narrow = reader.root(x)
            return narrow, term.root, term, node
    return None


def _read(normed: Normed, given: _Input, reader: GraphReader) -> Reading | None:
    dtype = given.x.dtype
    order = None if dtype is None else _order(normed, dtype)
    if dtype is None or order is None:
        return None
    scale = next((step for step in normed.steps if step.kind == "scale"), None)
    bias = next((step.operand for step in normed.steps if step.kind == "bias"), None)
    after = next((step for step in normed.steps if step.kind == "gate"), None)
    if given.gate is not None and after is not None:
        return None
    weight, plus_one, in_float32 = None, False, True
    if scale is not None and scale.operand is not None:
        narrow = ir.DataType.UNDEFINED if _SCALES_LAST[order] and scale.dtype == _FLOAT else dtype
        weight, plus_one, in_float32 = _weight(scale.operand, narrow, scale.dtype, reader, normed.offset)
        shaped = _shaped(weight, given.x, given.trailing_dims)
        if shaped is None:
            return None
        weight = shaped
    if bias is not None:
        bias = _shaped(bias, given.x, given.trailing_dims)
        if bias is None:
            return None
    spec = NormSpec(
        eps=normed.eps if normed.half or dtype == _DOUBLE else shortest(normed.eps),
        trailing_dims=given.trailing_dims,
        scale="none" if scale is None else "one_plus_weight" if plus_one else "weight",
        order=order,
        statistics=_STATISTICS[order],
        root="sqrt" if normed.divided and _MAY_DIVIDE[order] else "rsqrt",
        group_size=given.group_size,
        gate="before" if given.gate is not None else "after" if after is not None else "none",
        activation=given.activation if given.gate is not None else after.activation if after is not None else "none",
        bias=bias is not None,
        offset_in_float32=in_float32,
    )
    gate = given.gate if given.gate is not None else after.operand if after is not None else None
    return Reading(spec, given.x, weight, bias, gate, normed.value, normed, (*given.nodes, *normed.nodes))


def _order(normed: Normed, dtype: ir.DataType) -> Order | None:
    """The order of casts, or None if no spec has it."""
    kinds = [step.kind for step in normed.steps if step.kind not in ("cast", "reshape")]
    if kinds != [kind for kind in ("scale", "bias", "gate") if kind in kinds]:
        return None
    if not is_half(dtype):
        same = normed.inner == dtype == normed.operand.dtype and all(step.dtype == dtype for step in normed.steps)
        if not same or normed.half or normed.factor_half:
            return None
        return "no_upcast" if dtype == _DOUBLE else "scale_then_cast"
    if normed.inner == dtype:
        if normed.factor_half and not normed.half:
            return "cast_factor" if _walk(normed.steps, dtype, dtype) else None
        return "no_upcast" if all(step.dtype == dtype for step in normed.steps) else None
    if normed.inner != _FLOAT or normed.half or normed.factor_half:
        return None
    return _walk(normed.steps, dtype, _FLOAT)


def _walk(steps: Sequence[Step], dtype: ir.DataType, start: ir.DataType) -> Order | None:
    """The order of casts of a norm of a half dtype whose product has dtype `start`, or None."""
    current, rounded, done = start, start == dtype, False
    multiplied = False
    for step in steps:
        if done:
            return None
        if step.kind == "cast":
            if step.dtype not in (dtype, _FLOAT):
                return None
            gated = multiplied and any(s.kind == "gate" for s in steps)
            if multiplied and rounded and not gated:
                return None  # after the scale of a rounded value, only a gate adds another cast
            if step.dtype == dtype and multiplied and (not rounded or step is steps[-1]):
                done = True
            rounded = rounded or (step.dtype == dtype and not multiplied)
            current = step.dtype
        elif step.kind != "reshape":
            if step.dtype != current or (step.kind == "gate" and current != _FLOAT):
                return None
            multiplied = True
    if any(step.kind == "gate" for step in steps) or not rounded or not multiplied:
        if current != dtype:
            return None
        return "cast_then_scale" if rounded and multiplied else "scale_then_cast"
    return "cast_then_scale"


# Weights ----------------------------------------------------------------------------------------------------------


def _weight(
    value: ir.Value, dtype: ir.DataType, used_in: ir.DataType, reader: GraphReader, offset: float
) -> tuple[ir.Value, bool, bool]:
    """The weight behind a scale: the value, whether 1 is added to it, and whether that happens in float32."""
    if offset == 1.0:
        return value, True, not (is_half(dtype) and used_in == dtype)
    inner = _narrowed(value, dtype, reader)
    node = _plain(inner).producer()
    if node is not None and node.op_type == "Add" and node.domain in DEFAULT_DOMAINS and len(node.inputs) == 2:
        for one, other in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            if other is not None and scalar(one) == 1.0 and constant(one) is not None:
                in_half = is_half(node.outputs[0].dtype)
                return _narrowed(other, dtype, reader), True, not in_half
    array = constant(inner)
    if array is not None and is_half(dtype) and inner.dtype == _FLOAT and used_in == _FLOAT:
        return _unfolded(inner, array, dtype)
    return inner, False, True


def _narrowed(value: ir.Value, dtype: ir.DataType, reader: GraphReader) -> ir.Value:
    """The value before it was widened if that has dtype `dtype`, else the value itself."""
    root = reader.root(value)
    return root if root.dtype == dtype else value


def _plain(value: ir.Value) -> ir.Value:
    """The value before reshapes that only add or drop dims of 1."""
    for _ in range(4):
        node = value.producer()
        if node is None or node.op_type not in _RESHAPES or not node.inputs:
            return value
        before = node.inputs[0]
        if before is None or [d for d in dims(before) or () if d != 1] != [d for d in dims(value) or () if d != 1]:
            return value
        value = before
    return value


def _unfolded(value: ir.Value, array: NDArray[Any], dtype: ir.DataType) -> tuple[ir.Value, bool, bool]:
    """A float32 constant as the half weight that is exactly equal to it, directly or after 1 is added."""
    half = dtype.numpy()
    for offset in (np.float32(0), np.float32(1)):
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = (array.astype(np.float32) - offset).astype(half)
            exact = np.array_equal(narrow.astype(np.float32) + offset, array)
        if exact:
            return _made(narrow, dtype, f"{value.name}.{dtype.name.lower()}"), bool(offset), True
    return value, False, True


def unfolded(value: ir.Value, dtype: ir.DataType) -> ir.Value | None:
    """The constant that gives exactly this constant when 1 is added in `dtype`; None if there is none."""
    array = constant(value)
    if array is None or value.dtype is None:
        return None
    kind = dtype.numpy()
    wide = array.astype(kind)
    narrow = wide - kind.type(1)
    if not np.array_equal((narrow + kind.type(1)).astype(array.dtype), array):
        return None
    return _made(narrow.astype(array.dtype), value.dtype, str(value.name))


def _shaped(value: ir.Value | None, x: ir.Value, count: int) -> ir.Value | None:
    """A weight in the shape of x's trailing dims; None if it has another shape."""
    if value is None:
        return None
    tail, array = static(dims(x), count), constant(value)
    if array is None:
        return _computed(value, tail)
    if tail is None or list(array.shape) == tail:
        return value
    if array.size not in (1, math.prod(tail)):
        return None
    full = np.broadcast_to(array.reshape(()), tail) if array.size == 1 else array.reshape(tail)
    dtype = ir.DataType.from_numpy(array.dtype) if value.dtype is None else value.dtype
    return _made(np.ascontiguousarray(full), dtype, str(value.name))


def _computed(value: ir.Value, tail: list[int] | None) -> ir.Value | None:
    """A weight that is computed or a graph input: the value, or the input of its reshape if that has the shape."""
    shape = static(dims(value), len(dims(value) or ()))
    node = value.producer()
    before = node.inputs[0] if node is not None and node.op_type in _RESHAPES and node.inputs else None
    if tail is None:
        return value if shape is not None and len(shape) == 1 else None
    if before is not None and dims(before) == tail and before.dtype == value.dtype:
        return before
    if shape is None:
        return None
    return value if [dim for dim in shape if dim != 1] == [dim for dim in tail if dim != 1] or not shape else None


def _made(array: NDArray[Any], dtype: ir.DataType, name: str) -> ir.Value:
    """A constant that is not in a graph yet."""
    tensor = ir.Tensor(array, dtype=dtype, name=name)
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(dtype), const_value=tensor)


def shortest(eps: float) -> float:
    """The shortest decimal number with an epsilon's float32 value, such as 1e-05."""
    return float(str(np.float32(eps)))
