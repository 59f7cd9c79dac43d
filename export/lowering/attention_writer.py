"""Write the captured attentions of a graph in a target's form (`AttentionWriter`)."""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ...models.attention.spec import AttentionSpec
from ...models.dtypes import onnx_name
from ..graph.constants import HALF_TYPES
from ..graph.metadata import ATTENTION_KEY, VALUES_KEY
from .attention_table import OPERATOR, AttentionCell, AttentionMode, attention_form
from .builder import Builder, lowest
from .head_layout import read_rows
from .in_place_cache import CachePlace, InPlaceCache, grouped
from .norm_writer import NormWriter
from .table import Environment

if TYPE_CHECKING:
    from onnx import ModelProto

FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """What an attention reads: q `[B, H, S, D]`, k `[B, Hk, T, D]`, v `[B, Hk, T, Dv]`, and what is added to scores."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    bias: ir.Value | None
    sink: ir.Value | None


@dataclass(frozen=True, slots=True)
class LoweredAttention:
    """One attention of the finished graph.

    Attributes:
        path: path of its module.
        spec: what it computes in this call.
        node: name of its main node: the operator, or the Softmax or Div in its place.
        cell: the cell of the table that it was written by.
        reason: why this is not the target's own cell, or None.
    """

    path: str
    spec: AttentionSpec
    node: str
    cell: AttentionCell
    reason: str | None

    def to_dict(self) -> dict[str, Any]:
        """The attention as the manifest shows it."""
        row = {"path": self.path, "spec": self.spec.to_dict(), "node": self.node, "emits": self.cell.emits}
        return row if self.reason is None else {**row, "reason": self.reason}


class AttentionWriter:
    """Writes the attentions of one model.

    Args:
        root: the main graph, to which constants are added.
        target: one of `TARGETS`.
        opset: opset import of the finished file.
        norms: the writer of the model's norms, which knows what replaced what, and the names of all nodes.
        mode: `node`, or `in-place` for nodes that write the cache in place where they can.
    """

    def __init__(
        self, root: ir.Graph, target: str, opset: int, norms: NormWriter, mode: AttentionMode = "node"
    ) -> None:
        self._root, self._target, self._opset, self._norms, self._mode = root, target, opset, norms, mode
        self._constants: dict[Any, ir.Value] = {}
        self._sizes: dict[ir.Value, tuple[ir.Value, ...]] = {}
        self.cache = InPlaceCache(root)

    def write(self, node: ir.Node) -> LoweredAttention:
        """Replace a captured node by the operators of the target.

        Raises:
            ValueError: the node does not have what a captured attention has.
        """
        spec = AttentionSpec.from_json(node.attributes["spec"].as_string())
        path = node.attributes["path"].as_string()
        query, key, value, bias, sink = (*node.inputs, None, None)[:5]
        graph = node.graph
        if query is None or key is None or value is None or query.dtype is None or not isinstance(graph, ir.Graph):
            raise ValueError(f"attention {path!r}: expected a query of a known dtype, a key and a value")
        environment = Environment(opset=self._opset, dtype=onnx_name(query.dtype))
        cell, reason = attention_form(spec, self._target, environment, self._mode)
        place = self.cache.place(query, key, value, bias) if cell.mode == "in-place" else None
        if isinstance(place, str):
            cell, reason = attention_form(spec, self._target, environment)[0], place
        builder = Builder(graph, self._root, {}, self._constants, self._opset)
        heads = (node.attributes["heads"].as_int(), node.attributes["groups"].as_int())
        inputs = AttentionInputs(query, key, value, bias, sink)
        if isinstance(place, CachePlace):
            main, y = self._in_place(builder, spec, inputs, place, heads)
        else:
            write = _operator if cell.is_operator else _primitives
            main, y = write(builder, spec, inputs, *heads)
            y = builder.op("Transpose", [y], {"perm": [0, 2, 1, 3]}, dtype=query.dtype, shape=node.outputs[0].shape)
        record = {"path": path, "spec": spec.to_dict(), "heads": heads}
        main.metadata_props[ATTENTION_KEY] = json.dumps(record, sort_keys=True)
        self._replace(graph, node, builder, y, path)
        values = {"query": query, "key": key, "value": value, "bias": bias, "y": y}
        if isinstance(place, CachePlace):
            self._take_presents(main, key, value)
            read_rows(y, main.outputs[0], self._norms)
            unread = [one.producer() for one in (query, place.key, place.value, y, bias) if one is not None]
            self._norms.remove_unread([node for node in unread if node is not None])
            values |= dict(zip(("query", "key", "value"), main.inputs, strict=False)) | {"y": main.outputs[0]}
            values |= {"bias": place.bias, "past_key": place.past_key, "past_value": place.past_value}
        names = {role: value.name for role, value in values.items() if value is not None}
        main.metadata_props[VALUES_KEY] = json.dumps(names, sort_keys=True)
        return LoweredAttention(path, spec, main.name or "", cell, reason)

    def _in_place(
        self, builder: Builder, spec: AttentionSpec, inputs: AttentionInputs, place: CachePlace, heads: tuple[int, int]
    ) -> tuple[ir.Node, ir.Value]:
        attributes: dict[str, Any] = {"num_heads": heads[0], "kv_num_heads": heads[1], "scale": spec.scale}
        if spec.softcap is not None:
            attributes["softcap"] = spec.softcap
        self.cache.use(place)
        return grouped(builder, place, (inputs.query, inputs.sink), attributes, self._sizes)

    def _take_presents(self, main: ir.Node, key: ir.Value, value: ir.Value) -> None:
        """Let the operator return the caches in place of what joined them."""
        for old, new in zip((key, value), main.outputs[1:], strict=True):
            joining = old.producer()
            assert joining is not None
            assert isinstance(joining.graph, ir.Graph)
            new.shape = old.shape
            self._norms.take_over(old, new)
            joining.graph.remove(joining, safe=True)

    def decompose(self, node: ir.Node) -> bool:
        """Replace an operator that `write` wrote by primitives; False where the file does not say what they need."""
        record = json.loads(node.metadata_props[ATTENTION_KEY])
        query, key, value, bias = (*node.inputs, None)[:4]
        graph = node.graph
        if query is None or key is None or value is None or query.dtype is None or not isinstance(graph, ir.Graph):
            return False
        softcap = node.attributes.get_float("softcap", 0.0)
        spec = AttentionSpec(
            node.attributes["scale"].as_float(), softcap or None, bool(node.attributes.get_int("is_causal", 0))
        )
        builder = Builder(graph, self._root, {}, self._constants, self._opset)
        _, y = _primitives(builder, spec, AttentionInputs(query, key, value, bias, None), *record["heads"])
        self._replace(graph, node, builder, y, record["path"])
        return True

    def _replace(self, graph: ir.Graph, node: ir.Node, builder: Builder, y: ir.Value, path: str) -> None:
        """Put the new nodes, named after the module, in the place of a node whose result `y` is."""
        self._norms.name_nodes(builder.nodes, path)
        builder.insert_before(node)
        self._norms.take_over(node.outputs[0], y)
        graph.remove(node, safe=True)


def has_operators(model: ModelProto) -> bool:
    """Whether a file has operators that `AttentionWriter` wrote."""
    return any(_is_written(node.op_type, [row.key for row in node.metadata_props]) for node in model.graph.node)


def decompose_operators(model: ir.Model) -> int:
    """Replace the operators that `AttentionWriter` wrote by primitives, for a runtime without them; their number."""
    opset = model.graph.opset_imports[""]
    writer = AttentionWriter(model.graph, "primitives", opset, NormWriter(model.graph, "primitives", opset))
    found = [node for node in model.graph if _is_written(node.op_type, node.metadata_props)]
    return sum(writer.decompose(node) for node in found)


def _is_written(op_type: str, keys: Container[str]) -> bool:
    return op_type == OPERATOR and ATTENTION_KEY in keys


_Main = tuple[ir.Node, ir.Value]


def _operator(builder: Builder, spec: AttentionSpec, inputs: AttentionInputs, heads: int, groups: int) -> _Main:
    dtype = inputs.query.dtype
    assert dtype is not None
    attributes: dict[str, Any] = {"scale": spec.scale}
    if spec.softcap is not None:
        attributes["softcap"] = spec.softcap
    if spec.causal:
        attributes["is_causal"] = 1
    if dtype in HALF_TYPES:
        attributes["softmax_precision"] = FLOAT
    given = [inputs.query, inputs.key, inputs.value, *([inputs.bias] if inputs.bias is not None else [])]
    y = builder.op(OPERATOR, given, attributes, dtype=dtype, shape=None)
    return _producer(y), y


def _primitives(builder: Builder, spec: AttentionSpec, inputs: AttentionInputs, heads: int, groups: int) -> _Main:
    """Queries of one key are rows of one product, so that keys and values are not repeated."""
    dtype = inputs.query.dtype
    assert dtype is not None
    shared = heads != groups

    def op(name: str, *values: ir.Value, dtype: ir.DataType = dtype, **attributes: Any) -> ir.Value:
        return builder.op(name, list(values), attributes, dtype=dtype, shape=None)

    def number(value: float, dtype: ir.DataType = dtype) -> ir.Value:
        return builder.constant(np.array(value), dtype, "attention")

    def reshaped(value: ir.Value, count: int) -> ir.Value:
        return op("Reshape", value, builder.constant(np.array([0, count, -1, 0]), ir.DataType.INT64, "heads"))

    def rows(value: ir.Value, count: int) -> ir.Value:
        """`[B, h, r, w]` as `[B, count, h r / count, w]`."""
        return reshaped(value, count) if shared else value

    query = op("Mul", inputs.query, number(spec.scale)) if spec.scale != 1.0 else inputs.query
    # Without this Reshape, which changes nothing, ONNX Runtime moves the Transpose up to the norm of the keys, which it
    # then cannot fuse.
    columns = op("Transpose", reshaped(inputs.key, groups), perm=[0, 1, 3, 2])
    scores = op("MatMul", rows(query, groups), columns)
    scores = rows(scores, heads)
    if spec.softcap is not None:
        cap = number(spec.softcap)
        scores = op("Mul", op("Tanh", op("Div", scores, cap)), cap)
    if inputs.bias is not None:
        scores = op("Add", scores, inputs.bias)
    if spec.causal:
        scores = _causal(builder, scores, dtype)
    wide = FLOAT if dtype in HALF_TYPES else dtype
    scores = builder.cast(scores, wide)
    if inputs.sink is None:
        weights = op("Softmax", scores, dtype=wide, axis=-1)
    else:
        shape = builder.constant(np.array([1, heads, 1, 1]), ir.DataType.INT64, "heads")
        sink = op("Reshape", builder.cast(inputs.sink, wide), shape, dtype=wide)
        last = builder.constant(np.array([-1]), ir.DataType.INT64, "axis")
        most = op("Max", op("ReduceMax", scores, last, dtype=wide, keepdims=1), sink, dtype=wide)
        parts = op("Exp", op("Sub", scores, most, dtype=wide), dtype=wide)
        own = op("Exp", op("Sub", sink, most, dtype=wide), dtype=wide)
        total = op("Add", op("ReduceSum", parts, last, dtype=wide, keepdims=1), own, dtype=wide)
        weights = op("Div", parts, total, dtype=wide)
    main = _producer(weights)
    weights = builder.cast(weights, dtype)
    return main, rows(op("MatMul", rows(weights, groups), inputs.value), heads)


def _causal(builder: Builder, scores: ir.Value, dtype: ir.DataType) -> ir.Value:
    """The scores, with the lowest value of the dtype for every key after the query."""
    least = builder.constant(np.array(lowest(dtype)), dtype, "lowest")
    shape = builder.op("Shape", [scores], {"start": 2}, dtype=ir.DataType.INT64, shape=None)
    one = builder.constant(np.array(1), ir.DataType.INT64, "one")
    ones = builder.op("Expand", [one, shape], dtype=ir.DataType.INT64, shape=None)
    later = builder.op("Trilu", [ones, one], {"upper": 1}, dtype=ir.DataType.INT64, shape=None)
    hidden = builder.op("Cast", [later], {"to": ir.DataType.BOOL}, dtype=ir.DataType.BOOL, shape=None)
    return builder.op("Where", [hidden, least, scores], dtype=dtype, shape=None)


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node
