"""Properties of single values and dtypes of a graph: small constants, dims, regrouped dims, widening casts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...models.dtypes import BYTES, HALF_DTYPES, NORM_DTYPES, onnx_dtype

# A constant with more elements is a weight matrix, which is not read.
_MOST_ELEMENTS = 1 << 20
HALF_TYPES = tuple(map(onnx_dtype, HALF_DTYPES))
_WIDTH = {onnx_dtype(name): BYTES[name] for name in NORM_DTYPES}

# Operators that only cast or reshape a constant, of any dtype; and those whose other inputs are read elsewhere.
_CAST_LIKE = ("Identity", "Cast", "CastLike", "Reshape", "Unsqueeze", "Squeeze")
_FIRST_ONLY = ("CastLike", "Reshape", "Unsqueeze", "Squeeze")
_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)
_CASTS = (*_WIDTH, *_INTEGERS)
# The most elements of a computed constant, and the most nodes between it and a constant or a shape.
_MOST_FOLDED, _DEEPEST = 64, 8
DEFAULT_DOMAINS = ("", "ai.onnx")

Dim = int | ir.SymbolicDim
_Known = np.ma.MaskedArray[Any, np.dtype[Any]]


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


def _folded(value: ir.Value | None) -> NDArray[Any] | None:
    """`constant`, also through casts and the integer arithmetic by which exporters compute shapes and axes."""
    array = constant(value)
    if array is not None or value is None:
        return array
    known = _computed(value, _DEEPEST)
    return None if known is None or np.ma.is_masked(known) else np.asarray(known.data)


def _computed(value: ir.Value | None, deepest: int) -> _Known | None:
    """What is known of a value that nodes compute from constants and shapes; the unknown elements are masked."""
    array = constant(value)
    if array is not None:
        return np.ma.MaskedArray(array)
    node = None if value is None else value.producer()
    if node is None or not deepest or node.domain not in DEFAULT_DOMAINS or value is not node.outputs[0]:
        return None
    if node.op_type == "Shape":
        return _shape_of(node)
    if node.op_type == "Size":
        return _size_of(node, deepest)
    fold = _FOLDS.get(node.op_type)
    # The dtype keeps activations out, of which there are many and which have no constant operands.
    if fold is None or (node.op_type not in _CAST_LIKE and value.dtype not in _INTEGERS):
        return None
    inputs = [_computed(given, deepest - 1) for given in node.inputs[: 1 if node.op_type in _FIRST_ONLY else None]]
    known = [array for array in inputs if array is not None and array.size <= _MOST_FOLDED]
    if len(known) != len(node.inputs[: len(inputs)]) or not known:
        return None
    try:
        result = fold(node, *known)
    except (TypeError, ValueError, IndexError, np.exceptions.AxisError):  # the node's inputs do not fit together
        return None
    return None if result is None or result.size > _MOST_FOLDED else np.ma.asanyarray(result)


def _shape_of(node: ir.Node) -> _Known | None:
    shape = dims(node.inputs[0])
    if shape is None or len(shape) > _MOST_FOLDED:
        return None
    start, end = (node.attributes[n].as_int() if n in node.attributes else None for n in ("start", "end"))
    shape = shape[start:end]
    known = [isinstance(dim, int) for dim in shape]
    sizes = [dim if isinstance(dim, int) else 0 for dim in shape]
    return np.ma.MaskedArray(np.array(sizes, np.int64), mask=np.logical_not(np.array(known, np.bool_)))


def _size_of(node: ir.Node, deepest: int) -> _Known | None:
    shape = dims(node.inputs[0])
    if shape is None:
        known = _computed(node.inputs[0], deepest - 1)
        shape = None if known is None else list(known.shape)
    if shape is None or not all(isinstance(dim, int) for dim in shape):
        return None
    return np.ma.MaskedArray(np.array(math.prod(dim for dim in shape if isinstance(dim, int)), np.int64))


def _cast(node: ir.Node, array: _Known) -> _Known | None:
    to = node.outputs[0].dtype
    return np.ma.asanyarray(array.astype(to.numpy())) if to in _CASTS else None


def _divided(_: ir.Node, a: _Known, b: _Known) -> _Known:
    """ONNX rounds integer quotients toward zero; a quotient by zero is masked."""
    return np.ma.floor_divide(abs(a), abs(b)) * np.ma.where(a < 0, -1, 1) * np.ma.where(b < 0, -1, 1)


def _range(_: ir.Node, start: _Known, limit: _Known, delta: _Known) -> _Known | None:
    if any(np.ma.is_masked(given) or given.size != 1 for given in (start, limit, delta)) or int(delta.item()) == 0:
        return None
    numbers = range(int(start.item()), int(limit.item()), int(delta.item()))
    return np.ma.MaskedArray(np.array(numbers, start.dtype)) if len(numbers) <= _MOST_FOLDED else None


def _gather(node: ir.Node, data: _Known, picked: _Known) -> _Known | None:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if np.ma.is_masked(picked) or data.ndim != 1 or axis not in (0, -1):
        return None
    return np.ma.asanyarray(data[np.ma.getdata(picked).astype(np.int64)])


def _slice(node: ir.Node, data: _Known, *given: _Known) -> _Known | None:
    """A slice of a vector, in the form since opset 10."""
    if data.ndim != 1 or len(given) not in (2, 3, 4) or any(np.ma.is_masked(row) or row.size != 1 for row in given):
        return None
    start, end, axis, step = (*(int(row.item()) for row in given), *(0, 1)[len(given) - 2 :])
    if axis not in (0, -1) or step == 0:
        return None
    return data[start:end:step]


def _concat(node: ir.Node, *parts: _Known) -> _Known:
    return np.ma.concatenate(parts, axis=node.attributes["axis"].as_int())


def _filled(node: ir.Node, shape: _Known) -> _Known | None:
    if np.ma.is_masked(shape) or math.prod(map(int, shape)) > _MOST_FOLDED:
        return None
    value = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1, np.float32)
    return np.ma.MaskedArray(np.full([int(size) for size in shape], value.reshape(())))


def _reshaped(node: ir.Node, array: _Known) -> _Known | None:
    """Reshape, Squeeze and Unsqueeze. Without a known target, only one element stays what it was."""
    axes = axes_of(node)
    if node.op_type == "Unsqueeze" and axes is not None:
        return np.ma.MaskedArray(np.expand_dims(np.ma.getdata(array), axes), np.expand_dims(_mask(array), axes))
    if node.op_type == "Squeeze" and (axes is not None or len(node.inputs) == 1):
        return array.squeeze(None if axes is None else tuple(axes))
    target = integers(node.inputs[1]) if node.op_type == "Reshape" and len(node.inputs) > 1 else None
    if target is not None and (0 not in target):
        return array.reshape(target)
    return array if array.size == 1 else None


def _mask(array: _Known) -> NDArray[np.bool_]:
    return np.ma.getmaskarray(array)


# How integer nodes are computed: the node and what is known of its inputs.
_FOLDS: dict[str, Callable[..., _Known | None]] = {
    "Identity": lambda _, array: array,
    "Cast": _cast,
    "CastLike": _cast,
    "Reshape": _reshaped,
    "Squeeze": _reshaped,
    "Unsqueeze": _reshaped,
    "Range": _range,
    "Add": lambda _, a, b: a + b,
    "Sub": lambda _, a, b: a - b,
    "Mul": lambda _, a, b: a * b,
    "Div": _divided,
    "Neg": lambda _, array: -array,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "ConstantOfShape": _filled,
}


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
