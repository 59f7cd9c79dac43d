"""Rotary position embeddings as one operator of ONNX opset 23 (`find_rotary`, `RotaryWriter`), and back.

Recognized is `x * cos + concat(-second half of x, first half of x) * sin`, with the operands in any order, where the
graph shows that the two halves of cos are equal, and those of sin: both come from `Concat(f, f)` of the last axis
through nodes that compute each element alone. The operator reads the halves, which are computed once in a file.

Measured with ONNX Runtime's CPU provider: float16 has the bits of the primitive operators, which it computes in float32
too; float32 rounds one product less, and is as close to float64 or closer. Partial rotations of 4 axes run from
1.24.4, and not in 1.23.2.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..graph.constants import DEFAULT_DOMAINS, Dim, axes_of, dims, integers, same_dims, scalar
from ..graph.metadata import ROTARY_KEY
from .builder import Builder
from .norm_writer import NormWriter

if TYPE_CHECKING:
    from onnx import ModelProto

OPERATOR = "RotaryEmbedding"
OPERATOR_OPSET = 23
DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
LOWEST_PARTIAL = {"onnxruntime": "1.24.4"}
INT64 = ir.DataType.INT64
# Operators of one input that compute each element of the result from one element.
_UNARY = ("Identity", "Cast", "Cos", "Sin")
# The most nodes between a factor and the Concat that it comes from.
_DEEPEST = 16


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """A rotary embedding in primitive operators.

    Attributes:
        node: its last node.
        x: what is rotated, `[B, H, S, D]`.
        cos: the factor of x, `[B or 1, 1, S, R]`.
        sin: the factor of the turned x, of the same shape.
        rotated: R, how many channels of a head are rotated.
        width: D, all its channels.
    """

    node: ir.Node
    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    rotated: int
    width: int


def find_rotary(graph: ir.Graph) -> list[Rotary]:
    """The rotary embeddings of a graph that the operator computes, in graph order."""
    found = (_rotation(node) for node in graph if _is(node, "Add"))
    return [_partial(one) or one for one in found if one is not None]


def _rotation(add: ir.Node) -> Rotary | None:
    for left, right in _orders(add):
        direct, turning = _made_by(left, "Mul"), _made_by(right, "Mul")
        if direct is None or turning is None:
            continue
        for (x, cos), (turned, sin) in itertools.product(_orders(direct), _orders(turning)):
            width = _width(x)
            if x.dtype in DTYPES and width and width % 2 == 0 and _is_turned(turned, x, width):
                known = _is_factor(cos, x, add.graph) and _is_factor(sin, x, add.graph)
                return Rotary(add, x, cos, sin, width, width) if known else None
    return None


def _partial(inner: Rotary) -> Rotary | None:
    """The rotation of the first channels alone, where the rest is appended to them."""
    y, node = inner.node.outputs[0], inner.x.producer()
    uses = list(y.uses())
    if node is None or len(uses) != 1 or y.is_graph_output():
        return None
    concat, whole = uses[0].node, node.inputs[0]
    width = _width(whole)
    if not _is_concat(concat) or len(concat.inputs) != 2 or whole is None or width is None:
        return None
    first, rest = concat.inputs
    ends = _range_of(inner.x, whole, width), _range_of(rest, whole, width)
    if first is not y or concat.graph is not inner.node.graph:
        return None
    if ends != ((0, inner.rotated), (inner.rotated, width)):
        return None
    return Rotary(concat, whole, inner.cos, inner.sin, inner.rotated, width)


def _is_turned(value: ir.Value, x: ir.Value, width: int) -> bool:
    """Whether a value is `concat(-second half of x, first half of x)`."""
    concat = value.producer()
    if concat is None or not _is_concat(concat) or len(concat.inputs) != 2:
        return False
    negative, half = _made_by(concat.inputs[0], "Neg"), width // 2
    if negative is None:
        return False
    ends = _range_of(negative.inputs[0], x, width), _range_of(concat.inputs[1], x, width)
    return ends == ((half, width), (0, half))


def _range_of(part: ir.Value | None, whole: ir.Value, width: int) -> tuple[int, int] | None:
    """Where in the last axis of 4 a Slice or Split has taken a part, or None."""
    node = None if part is None else part.producer()
    if node is None or node.inputs[0] is not whole:
        return None
    if _is(node, "Slice") and len(node.inputs) in (4, 5):
        rows = [integers(value) for value in node.inputs[1:]]
        if any(row is None or len(row) != 1 for row in rows):
            return None
        start, end, axis, step = (*(row[0] for row in rows if row), 1)[:4]
        begin, stop, _ = slice(start, end).indices(width)
        return (begin, stop) if axis in (-1, 3) and step == 1 and begin < stop else None
    if _is(node, "Split") and node.attributes.get_int("axis", 0) in (-1, 3):
        count = len(node.outputs)
        given = node.inputs[1] if len(node.inputs) > 1 else None
        sizes = integers(given) if given is not None else [width // count] * count
        if sizes is None or len(sizes) != count or sum(sizes) != width:
            return None
        place = next(index for index, output in enumerate(node.outputs) if output is part)
        return sum(sizes[:place]), sum(sizes[: place + 1])
    return None


def _is_factor(value: ir.Value, x: ir.Value, graph: Any) -> bool:
    """Whether a value is `[B or 1, 1, S, R]` beside x, with two halves that are equal."""
    shape, own = dims(value), dims(x)
    if shape is None or own is None or len(shape) != 4 or shape[1] != 1 or value.dtype != x.dtype:
        return False
    # The operator requires the batch of x: of a factor with a batch of 1, the half is expanded to it.
    batch = own[:1] if shape[0] == 1 else shape[:1]
    if not same_dims(shape[2:], own[2:]) or not same_dims(batch, own[:1]):
        return False
    return _halves(value, graph) is not None


def _halves(value: ir.Value, graph: Any) -> list[ir.Node] | None:
    """The nodes from the Concat of one value twice, of 3 axes, to a value of 4 axes; or None."""
    nodes: list[ir.Node] = []
    current: ir.Value | None = value
    rank = 4
    while current is not None and len(nodes) < _DEEPEST:
        node = current.producer()
        if node is None or node.graph is not graph or len(node.outputs) != 1:
            return None
        nodes.append(node)
        if _is_concat(node, rank):
            inputs = node.inputs
            known = rank == 3 and len(inputs) == 2 and inputs[0] is inputs[1] and len(dims(inputs[0]) or ()) == 3
            return nodes[::-1] if known else None
        if _is(node, "Unsqueeze"):
            if rank != 4 or axes_of(node) not in ([1], [-3]):
                return None
            rank = 3
        current = _read(node)
    return None


def _read(node: ir.Node) -> ir.Value | None:
    """The value whose elements a node computes with, each alone; None for any other node."""
    if _is(node, *_UNARY, "Unsqueeze"):
        return node.inputs[0]
    if _is(node, "Mul"):
        for value, factor in _orders(node):
            if len(dims(factor) or ()) <= 1 and scalar(factor) is not None:
                return value
    return None


class RotaryWriter:
    """Writes the rotary embeddings of one graph.

    Args:
        root: the main graph.
        opset: opset import of the file.
        norms: the writer of the model's norms, which knows what replaced what, and the names of all nodes.
    """

    def __init__(self, root: ir.Graph, opset: int, norms: NormWriter) -> None:
        self._root, self._opset, self._norms = root, opset, norms
        self._constants: dict[Any, ir.Value] = {}
        self._half: dict[ir.Value, ir.Value] = {}
        self._made: dict[Any, ir.Value] = {}

    def write(self, rotary: Rotary) -> None:
        """Replace primitive operators by the operator."""
        builder, x = self._builder(), self._norms.current(rotary.x)
        assert x is not None
        cos, sin = (self._cache(value, x, builder) for value in (rotary.cos, rotary.sin))
        attributes = {} if rotary.rotated == rotary.width else {"rotary_embedding_dim": rotary.rotated}
        old = rotary.node.outputs[0]
        y = builder.op(OPERATOR, [x, cos, sin], attributes, dtype=_dtype(x), shape=x.shape)
        record = {"rotated": rotary.rotated, "width": rotary.width}
        builder.nodes[-1].metadata_props[ROTARY_KEY] = json.dumps(record)
        self._put(builder, rotary.node, old, y)

    def decompose(self, node: ir.Node) -> None:
        """Replace an operator that `write` wrote by primitive operators."""
        record = json.loads(node.metadata_props[ROTARY_KEY])
        whole, *caches = (value for value in node.inputs if value is not None)
        builder, dtype, half = self._builder(), _dtype(whole), record["rotated"] // 2

        def op(name: str, *values: ir.Value, outputs: int = 1, **attributes: Any) -> ir.Value:
            return builder.op(name, values, attributes, dtype=dtype, shape=None, outputs=outputs)

        def split(value: ir.Value, *sizes: int) -> tuple[ir.Value, ir.Value]:
            first = op("Split", value, builder.constant(np.array(sizes), INT64, "sizes"), outputs=2, axis=-1)
            return first, builder.nodes[-1].outputs[1]

        factors = []
        for cache in caches:
            if cache not in self._made:
                axis = builder.constant(np.array([1]), INT64, "axis")
                self._made[cache] = op("Unsqueeze", op("Concat", cache, cache, axis=-1), axis)
            factors.append(self._made[cache])
        is_whole = record["rotated"] == record["width"]
        x, *rest = [whole] if is_whole else split(whole, record["rotated"], record["width"] - record["rotated"])
        first, second = split(x, half, half)
        turned = op("Concat", op("Neg", second), first, axis=-1)
        y = op("Add", op("Mul", x, factors[0]), op("Mul", turned, factors[1]))
        y = op("Concat", y, *rest, axis=-1) if rest else y
        self._put(builder, node, node.outputs[0], y)

    def _builder(self) -> Builder:
        return Builder(self._root, self._root, {}, self._constants, self._opset)

    def _put(self, builder: Builder, node: ir.Node, old: ir.Value, y: ir.Value) -> None:
        self._norms.name_nodes(builder.nodes, "rotary")
        builder.insert_before(node)
        self._norms.take_over(old, y)
        self._norms.remove_unread([node])

    def _cache(self, factor: ir.Value, x: ir.Value, builder: Builder) -> ir.Value:
        """The first half of a factor without the axis of heads, `[B, S, R / 2]`, with the batch of x."""
        value = self._half_of(factor)
        shape, own = dims(value) or [], dims(x) or []
        if same_dims(shape[:1], own[:1]):
            return value
        key = (value, own[0])
        if key not in self._made:
            sizes = self._sizes(own[0], x, builder)
            expanded = ir.Shape([own[0], *shape[1:]])
            self._made[key] = builder.op("Expand", [value, sizes], dtype=_dtype(value), shape=expanded)
        return self._made[key]

    def _sizes(self, batch: Dim, x: ir.Value, builder: Builder) -> ir.Value:
        """The batch of x, and two ones."""
        if isinstance(batch, int):
            return builder.constant(np.array([batch, 1, 1]), INT64, "sizes")
        size = builder.op("Shape", [x], {"start": 0, "end": 1}, dtype=INT64, shape=ir.Shape([1]))
        ones = builder.constant(np.array([1, 1]), INT64, "sizes")
        return builder.op("Concat", [size, ones], {"axis": 0}, dtype=INT64, shape=ir.Shape([3]))

    def _half_of(self, factor: ir.Value) -> ir.Value:
        """The half of a factor: the same nodes, each beside its original, after the value that the Concat repeats."""
        nodes = _halves(factor, self._root)
        assert nodes is not None
        half = nodes[0].inputs[0]
        assert half is not None
        for node in nodes[1:]:
            original = node.outputs[0]
            if _is(node, "Unsqueeze"):
                continue
            if original not in self._half:
                read = _read(node)
                inputs = [half if value is read else value for value in node.inputs]
                copy = ir.Node("", node.op_type, inputs, node.attributes.values())
                made = copy.outputs[0]
                made.dtype = _dtype(original)
                made.shape = half.shape.copy() if half.shape is not None else None
                self._norms.name_nodes([copy], "rotary")
                self._root.insert_before(node, [copy])
                self._half[original] = made
            half = self._half[original]
        return half


def write_rotary(graph: ir.Graph, opset: int, norms: NormWriter) -> list[Rotary]:
    """Replace all rotary embeddings of a graph that the operator computes, if its opset has the operator."""
    found = find_rotary(graph) if opset >= OPERATOR_OPSET else []
    writer = RotaryWriter(graph, opset, norms)
    for rotary in found:
        writer.write(rotary)
    return found


def has_rotary(model: ModelProto) -> bool:
    """Whether a file has operators that `RotaryWriter` wrote."""
    return any(_is_written(node.op_type, [row.key for row in node.metadata_props]) for node in model.graph.node)


def decompose_rotary(model: ir.Model) -> int:
    """Replace the operators that `RotaryWriter` wrote by primitives, for a runtime without them; their number."""
    opset = model.graph.opset_imports[""]
    writer = RotaryWriter(model.graph, opset, NormWriter(model.graph, "primitives", opset))
    found = [node for node in model.graph if _is_written(node.op_type, node.metadata_props)]
    for node in found:
        writer.decompose(node)
    return len(found)


def _is_written(op_type: str, keys: Iterable[str]) -> bool:
    return op_type == OPERATOR and ROTARY_KEY in keys


def _is(node: ir.Node, *op_types: str) -> bool:
    return node.op_type in op_types and node.domain in DEFAULT_DOMAINS


def _is_concat(node: ir.Node, rank: int = 4) -> bool:
    """Whether a node is a Concat at the last axis."""
    return _is(node, "Concat") and node.attributes.get_int("axis", 0) in (-1, rank - 1)


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and _is(node, op_type) else None


def _orders(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """The two operands of a node in both orders."""
    a, b = node.inputs
    if a is not None and b is not None:
        yield a, b
        yield b, a


def _width(value: ir.Value | None) -> int | None:
    """The last of 4 axes if it is static, or None."""
    shape = dims(value)
    return shape[-1] if shape is not None and len(shape) == 4 and isinstance(shape[-1], int) else None


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype
