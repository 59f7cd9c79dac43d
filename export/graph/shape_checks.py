"""Checks of the shapes and nodes around a norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import onnx_ir as ir

from .constants import DEFAULT_DOMAINS, constant, dims, is_floating, same_dims, scalar

_BROADCASTS = ("Add", "Sub", "Mul", "Div", "Pow")


def unreshaped(root: ir.Value) -> ir.Value | None:
    """The input of the Reshape node that computes this value, or None."""
    node = root.producer()
    if node is None or node.op_type != "Reshape" or node.domain not in DEFAULT_DOMAINS:
        return None
    return node.inputs[0]


def reshapes_back(node: ir.Node, before: ir.Value, root: Callable[[ir.Value], ir.Value]) -> bool:
    """Whether a Reshape node restores the shape of `before`."""
    wanted, got = dims(before), dims(node.outputs[0])
    if same_dims(wanted, got):
        return True
    if wanted is not None and got is not None and len(wanted) == len(got):
        # Both have the same number of elements: if all dims but one are equal, so is the last one.
        open_dims = [dim for dim, like in zip(got, wanted, strict=True) if not same_dims([dim], [like])]
        if len(open_dims) == 1 and not isinstance(open_dims[0], int):
            return True
    # The target shape is that of the value itself, read by a Shape node.
    shape_node = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if shape_node is not None and shape_node.op_type == "Shape" and not shape_node.attributes:
        read = shape_node.inputs[0]
        return read is not None and (root(read) is root(before) or same_dims(dims(read), wanted))
    return False


def subtracts_mean(root: ir.Value) -> bool:
    """Whether x is a difference whose second operand has one number per row."""
    node = root.producer()
    while node is not None and node.op_type in ("Cast", "Identity") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type not in ("Sub", "Add") or node.domain not in DEFAULT_DOMAINS:
        return False
    whole = dims(root)
    candidates = node.inputs[1:] if node.op_type == "Sub" else node.inputs
    for value in candidates:
        if value is None:
            continue
        shape = dims(value)
        wide = whole is None or not whole or whole[-1] != 1
        if shape is None or (len(shape) > 0 and shape[-1] == 1 and wide and constant(value) is None):
            if shape is None and not _reads_reduce(value):
                continue
            return True
    return False


def fits(value: ir.Value | None, like: ir.Value, axes: int) -> bool:
    """Whether a value has one element, or the shape of the trailing dims of `like`, with optional leading dims of 1."""
    if value is None or not is_floating(value.dtype):
        return False
    shape, whole = dims(value), dims(like)
    if shape is None or any(not isinstance(dim, int) for dim in shape):
        return False
    if math.prod(d for d in shape if isinstance(d, int)) == 1:
        return len(shape) <= (1 if whole is None else len(whole))
    if whole is None:
        return len(shape) == axes == 1
    if len(shape) > len(whole) or any(dim != 1 for dim in shape[: max(len(shape) - axes, 0)]):
        return False
    return len(shape) >= axes and list(shape[len(shape) - axes :]) == list(whole[len(whole) - axes :])


def may_fit(scale: ir.Value, like: ir.Value, axes: int) -> bool:
    """As `fits`, but True where unknown dims may match."""
    shape, whole = dims(scale), dims(like)
    if fits(scale, like, axes) or shape is None:
        return True
    tail = [None] * axes if whole is None else whole[-axes:]
    return len(shape) == axes and all(
        a == b for a, b in zip(shape, tail, strict=True) if isinstance(a, int) and isinstance(b, int)
    )


def raises_rank(node: ir.Node) -> bool:
    """Whether a constant operand of one element has more dims than the other, so that the result has more dims too."""
    if len(node.inputs) != 2 or node.op_type not in _BROADCASTS:
        return False
    for value, other in both_ways(node):
        shape, like = dims(value), dims(other)
        if scalar(value) is not None and (shape is None or len(shape) > (1 if like is None else len(like))):
            return True
    return False


def both_ways(node: ir.Node) -> Iterator[tuple[ir.Value | None, ir.Value | None]]:
    """The two inputs of a node, in both orders."""
    a, b = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    yield a, b
    yield b, a


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other input of a node with two inputs."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def result_dtype(node: ir.Node) -> ir.DataType:
    """The dtype of a node's result; if unknown, that of its first typed input."""
    out = node.outputs[0]
    if out.dtype is None:
        out.type = next((v.type for v in node.inputs if v is not None and v.dtype is not None), None)
    return out.dtype if out.dtype is not None else ir.DataType.FLOAT


def is_ones(value: ir.Value) -> bool:
    """Whether a value is a constant of only ones."""
    array = constant(value)
    return array is not None and bool((array == 1).all())


def copies_dims(node: ir.Node, shape: list[int | ir.SymbolicDim] | None) -> bool:
    """Whether zeros in a Reshape's target copy the input's dims."""
    return shape is not None and ("allowzero" not in node.attributes or node.attributes["allowzero"].as_int() == 0)


def _reads_reduce(value: ir.Value) -> bool:
    """Whether a value is computed from a Reduce node by at most a few operations."""
    for _ in range(4):
        node = value.producer()
        if node is None:
            return False
        if node.op_type.startswith("Reduce") or node.op_type == "GlobalAveragePool":
            return True
        if not node.inputs or node.inputs[0] is None:
            return False
        value = node.inputs[0]
    return False
