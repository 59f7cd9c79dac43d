"""Properties of single values and dtypes of a graph: small constants, dims, regrouped dims, widening casts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...models.dtypes import BYTES, HALF_DTYPES, NORM_DTYPES, onnx_dtype

# A constant with more elements is a weight matrix, which is not read.
_MOST_ELEMENTS = 1 << 20
HALF_TYPES = tuple(map(onnx_dtype, HALF_DTYPES))
_WIDTH = {onnx_dtype(name): BYTES[name] for name in NORM_DTYPES}

_HANDED_ON = ("Identity", "Cast", "CastLike", "Reshape", "Unsqueeze", "Squeeze")
_CASTS = (*_WIDTH, ir.DataType.INT32, ir.DataType.INT64)
DEFAULT_DOMAINS = ("", "ai.onnx")

Dim = int | ir.SymbolicDim


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array of a small constant, or None. An initializer that is also a graph input is not constant."""
    if value is None:
        return None
    node = value.producer()
    if node is not None:
        return _of_node(node) if node.op_type == "Constant" and node.domain in DEFAULT_DOMAINS else None
    # The initializer of a graph input is only its default.
    if value.const_value is None or value.is_graph_input() or value.const_value.size > _MOST_ELEMENTS:
        return None
    return _read(value.const_value)


def scalar(value: ir.Value | None) -> float | None:
    """The number in a constant of one element, or None."""
    array = _folded(value) if value is not None and _may_be_scalar(value) else None
    if array is None or array.size != 1 or array.dtype.kind in "OSU":
        return None
    return float(array.reshape(()).astype(np.float64))


def _folded(value: ir.Value | None, deepest: int = 4) -> NDArray[Any] | None:
    """`constant`, also through nodes that only cast or reshape it, which exporters write; the shape may differ."""
    array = constant(value)
    node = None if value is None else value.producer()
    if array is not None or node is None or node.domain not in DEFAULT_DOMAINS:
        return array
    if node.op_type == "Gather":
        return _of_shape(node)
    if node.op_type not in _HANDED_ON:
        return None
    inner = _folded(node.inputs[0], deepest - 1) if deepest and node.inputs else None
    if inner is None or inner.size > 64 or not node.op_type.startswith("Cast"):
        return inner
    to = value.dtype if value is not None else None
    return inner.astype(to.numpy()) if to in _CASTS else None


def _of_shape(gather: ir.Node) -> NDArray[Any] | None:
    """A static dim that a Gather node reads from a Shape node, or None."""
    taken = gather.inputs[0].producer() if gather.inputs and gather.inputs[0] is not None else None
    if taken is None or taken.op_type != "Shape" or taken.domain not in DEFAULT_DOMAINS or taken.attributes:
        return None
    shape, picked = dims(taken.inputs[0]), _folded(gather.inputs[1], 1)
    if shape is None or picked is None or picked.size != 1 or not -len(shape) <= int(picked.reshape(())) < len(shape):
        return None
    dim = shape[int(picked.reshape(()))]
    return np.full(picked.shape, dim, np.int64) if isinstance(dim, int) else None


def integers(value: ir.Value | None) -> list[int] | None:
    """The integers in a constant, or None."""
    array = _folded(value)
    if array is None or array.dtype.kind not in "iu" or array.size > 64:
        return None
    return [int(number) for number in array.reshape(-1)]


def dims(value: ir.Value | None) -> list[Dim] | None:
    """The dims of a value, or None where its rank is unknown."""
    if value is None:
        return None
    if value.shape is not None:
        return list(value.shape)
    if value.const_value is not None:
        return [dim for dim in value.const_value.shape if isinstance(dim, int)]
    array = constant(value)
    return None if array is None else list(array.shape)


def same_dims(a: Sequence[Dim] | None, b: Sequence[Dim] | None) -> bool:
    """Whether two shapes are known to be equal; a dim without a name equals nothing."""
    if a is None or b is None or len(a) != len(b):
        return False
    return all(x == y and not (isinstance(x, ir.SymbolicDim) and x.value is None) for x, y in zip(a, b, strict=True))


def static(shape: Sequence[Dim] | None, count: int) -> list[int] | None:
    """The last `count` dims if all are static, positive and small enough for a norm, or None."""
    if shape is None or len(shape) < count:
        return None
    tail = [dim for dim in shape[len(shape) - count :] if isinstance(dim, int) and dim > 0]
    return tail if len(tail) == count and math.prod(tail) <= _MOST_ELEMENTS else None


def regrouping(before: ir.Value | None, after: ir.Value, axes: int) -> tuple[int | None, int] | None:
    """Group size and trailing dims, where a Reshape splits the last dim into groups or joins several; or None."""
    whole, cut = dims(before), dims(after)
    if before is None or whole is None or cut is None or axes != 1 or not whole:
        return None
    size, last = cut[-1], whole[-1]
    if not isinstance(size, int) or not isinstance(last, int) or size < 1 or last < 1:
        return None
    if last % size == 0 and last != size:
        return size, 1
    count, width = 0, 1
    while width < size and count < len(whole):
        count += 1
        dim = whole[len(whole) - count]
        if not isinstance(dim, int):
            return None
        width *= dim
    return (None, count) if width == size else None


def is_half(dtype: ir.DataType | None) -> bool:
    """Whether a dtype is float16 or bfloat16."""
    return dtype in HALF_TYPES


def widens(narrow: ir.DataType | None, wide: ir.DataType | None) -> bool:
    """Whether a cast between two floating dtypes is lossless."""
    if narrow is None or wide is None or narrow not in _WIDTH or wide not in _WIDTH:
        return False
    return narrow == wide or _WIDTH[narrow] < _WIDTH[wide]


def is_floating(dtype: ir.DataType | None) -> bool:
    """Whether a dtype is a floating dtype in which norms are computed."""
    return dtype in _WIDTH


def axes_of(node: ir.Node) -> list[int] | None:
    """The axes of a Reduce, Squeeze or Unsqueeze node, as attribute or input; None where they are not constant."""
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    return integers(node.inputs[1]) if len(node.inputs) > 1 else None


def _read(tensor: ir.TensorProtocol) -> NDArray[Any] | None:
    """The values of a small tensor; of external data, those bytes alone."""
    if not isinstance(tensor, ir.ExternalTensor):
        try:
            return tensor.numpy()
        except (AssertionError, TypeError, ValueError):  # the values are in a field that does not belong to the dtype
            return None
    if tensor.dtype == ir.DataType.STRING or tensor.dtype.bitwidth % 8:  # strings, or several values per byte
        return None
    kind = tensor.dtype.numpy()
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset or 0)
        data = file.read(tensor.size * kind.itemsize)
    return np.frombuffer(data, kind.newbyteorder("<")).astype(kind, copy=False).reshape(tensor.shape.numpy())


def _may_be_scalar(value: ir.Value) -> bool:
    shape = value.shape if value.shape is not None else value.const_value.shape if value.const_value else None
    return shape is None or all(dim == 1 for dim in shape)


def _of_node(node: ir.Node) -> NDArray[Any] | None:
    for name, kind in (("value_float", np.float32), ("value_floats", np.float32)):
        if name in node.attributes:
            return np.array(node.attributes[name].value, kind)
    for name in ("value_int", "value_ints"):
        if name in node.attributes:
            return np.array(node.attributes[name].value, np.int64)
    attribute = node.attributes.get("value")
    if attribute is None or attribute.is_ref() or attribute.type != ir.AttributeType.TENSOR:
        return None
    tensor = attribute.as_tensor()
    return tensor.numpy() if tensor.size <= _MOST_ELEMENTS else None
