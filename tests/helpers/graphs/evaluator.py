"""What a lowered graph says, node by node in NumPy, with every rounding where the file puts it.

ONNX Runtime on the CPU computes half types in float32 and cancels casts between, at every optimization level, and has
no bfloat16 at all. Here each operator rounds to its output's dtype, as ONNX defines it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]
Attributes = Mapping[str, Any]


def evaluate(model: ir.Model, feeds: Mapping[str, Array]) -> list[Array]:
    """The graph's outputs. Covers the operators that lowering writes, and local functions."""
    values: dict[ir.Value, Array] = {}
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        values[value] = value.const_value.numpy()
    for value in model.graph.inputs:
        values[value] = feeds[str(value.name)]
    _run(list(model.graph), values, model, {})
    return [values[value] for value in model.graph.outputs]


def _run(nodes: Sequence[ir.Node], values: dict[ir.Value, Array], model: ir.Model, outer: Attributes) -> None:
    for node in nodes:
        inputs = [values[value] for value in node.inputs if value is not None]
        attributes = {
            name: outer[attribute.ref_attr_name] if attribute.is_ref() else attribute.value
            for name, attribute in node.attributes.items()
        }
        function = model.functions.get(node.op_identifier())
        if function is not None:
            inner = dict(zip(function.inputs, inputs, strict=True))
            _run(list(function), inner, model, attributes)
            outputs = [inner[value] for value in function.outputs]
        else:
            outputs = [OPERATORS[node.op_type](attributes, *inputs)]
        values.update(zip(node.outputs, outputs, strict=True))


def _cast(attributes: Attributes, x: Array) -> Array:
    return x.astype(ir.DataType(attributes["to"]).numpy())


def _binary(function: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    def apply(attributes: Attributes, a: Array, b: Array) -> Array:
        assert a.dtype == b.dtype
        return function(a, b).astype(a.dtype)

    return apply


def _reduce(function: Callable[..., Array]) -> Callable[..., Array]:
    def apply(attributes: Attributes, x: Array, axes: Array) -> Array:
        return function(x, axis=tuple(axes.tolist()), keepdims=True).astype(x.dtype)

    return apply


def _reshape(attributes: Attributes, x: Array, shape: Array) -> Array:
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape.tolist())])


def _constant(attributes: Attributes) -> Array:
    if "value" in attributes:
        return attributes["value"].numpy()
    return np.array(attributes["value_float"], np.float32)


def _normalized(attributes: Attributes, x: Array) -> Array:
    """x / RMS(x) in the stash type, not cast back yet."""
    stash = ir.DataType(attributes["stash_type"]).numpy()
    wide = x.astype(stash)
    axes = tuple(range(attributes["axis"], 0))
    mean = (wide * wide).mean(axis=axes, keepdims=True, dtype=stash)
    return wide / np.sqrt(mean + stash.type(attributes["epsilon"]))


def _rms_normalization(attributes: Attributes, x: Array, scale: Array) -> Array:
    """As ONNX defines it: the cast to x's dtype comes before the scale."""
    return (_normalized(attributes, x).astype(x.dtype) * scale).astype(x.dtype)


def _simplified_layer_normalization(attributes: Attributes, x: Array, scale: Array) -> Array:
    """As ONNX Runtime's kernel does it: the scale comes before the cast."""
    wide = _normalized(attributes, x)
    return (wide * scale.astype(wide.dtype)).astype(x.dtype)


OPERATORS: dict[str, Callable[..., Array]] = {
    "Add": _binary(np.add),
    "Mul": _binary(np.multiply),
    "Div": _binary(np.divide),
    "Pow": _binary(np.power),
    "Sqrt": lambda attributes, x: np.sqrt(x),
    "Sigmoid": lambda attributes, x: (1 / (1 + np.exp(-x.astype(np.float64)))).astype(x.dtype),
    "Cast": _cast,
    "CastLike": lambda attributes, x, like: x.astype(like.dtype),
    "ReduceMean": _reduce(np.mean),
    "ReduceSum": _reduce(np.sum),
    "Reshape": _reshape,
    "Constant": _constant,
    "RMSNormalization": _rms_normalization,
    "SimplifiedLayerNormalization": _simplified_layer_normalization,
}


def as_numpy(value: Any) -> Array:
    """A torch tensor as an array of the same dtype, bfloat16 too."""
    names = {"torch.bfloat16": ir.DataType.BFLOAT16, "torch.float16": ir.DataType.FLOAT16}
    kind = names.get(str(value.dtype))
    if kind is None:
        return value.detach().numpy()
    import torch

    return value.detach().contiguous().view(torch.int16).numpy().view(kind.numpy())


def count_differing(a: Array, b: Array) -> int:
    """How many elements differ; NaN equals NaN."""
    wide, other = a.astype(np.float64), b.astype(np.float64)
    assert a.dtype == b.dtype
    assert a.size == math.prod(b.shape)
    return int(np.count_nonzero((wide != other) & ~(np.isnan(wide) & np.isnan(other))))
