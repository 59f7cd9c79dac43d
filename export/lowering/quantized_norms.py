"""Norms of the plugin with a quantized output: as one operator, or as a norm followed by a QuantizeLinear."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from ...models.errors import UnsupportedError
from ...plugins import contract
from ..graph.constants import DEFAULT_DOMAINS, constant
from ..graph.metadata import PATH_KEY, VALUES_KEY
from ..graph.plugin_nodes import is_plugin_node
from ..graph.site import node_name
from ..onnx_io.raise_opset import raise_opset
from .builder import Builder
from .plugin_functions import QUANTIZED_OPSET

_NAMES: Final = {ir.DataType(number): name for name, number in contract.QUANT_TYPES.items()}
_SCALE_TYPES: Final = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True, slots=True)
class QuantizedOutput:
    """A norm whose result a QuantizeLinear reads.

    Attributes:
        path: path of the norm's module.
        node: name of the norm's node.
        dtype: `int8` or `float8_e4m3`; None where the norm was not fused.
        reason: why it was not fused, or empty.
    """

    path: str
    node: str
    dtype: str | None
    reason: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class _Quantization:
    """A norm and what quantizes its result: `way` are the nodes to remove, the QuantizeLinear last."""

    norm: ir.Node
    way: tuple[ir.Node, ...]
    scale: ir.Value
    dtype: ir.DataType


def fuse_quantized_outputs(model: ir.Model, *, may_raise_opset: bool = True) -> list[QuantizedOutput]:
    """Fuse each norm of the plugin with the QuantizeLinear behind it.

    Only the QuantizeLinear may read the norm's result, optionally through a Cast to float32; several equal ones (for
    query, key and value) are merged into one. It must quantize to int8 or float8e4m3fn with one constant scale, and
    without a zero point or with a zero point of 0. The nodes that read its output are unchanged.

    The functions of the new operators are added by `style_plugin_nodes`. The opset import is raised to 21 if a norm is
    fused.

    Args:
        model: a model whose norms are in the form of target `plugin`; it is changed.
        may_raise_opset: whether the opset import may be raised; if not, a file below opset 21 is not changed.

    Returns:
        Every norm whose result is quantized, in graph order, with the reason where it was not fused.
    """
    rows: list[QuantizedOutput] = []
    found: list[_Quantization] = []
    for node in model.graph:
        if node.op_type not in contract.QUANTIZED or not is_plugin_node(node):
            continue
        _merge_equal_readers(node.outputs[0], model.graph)
        quantization = _quantization(node, model.graph)
        if isinstance(quantization, _Quantization):
            found.append(quantization)
            rows.append(_row(node, _NAMES[quantization.dtype]))
        elif quantization is not None:
            rows.append(_row(node, None, quantization))
    problem = _reach_opset(model, may_raise_opset) if found else ""
    if problem:
        return [row if row.reason else QuantizedOutput(row.path, row.node, None, problem) for row in rows]
    builder = Builder(model.graph, model.graph, {}, {}, QUANTIZED_OPSET)
    for quantization in found:
        _fuse(quantization, builder)
    return rows


def split_quantized_outputs(model: ir.Model) -> list[str]:
    """Split each norm with a quantized output into a norm and a QuantizeLinear behind it.

    Operators whose y_scale is computed at run time are not split, because `fuse_quantized_outputs` could not fuse them.

    Returns:
        Names of the nodes that were split.
    """
    if (_opset(model) or 0) < QUANTIZED_OPSET:
        return []
    split = [node for node in model.graph if is_quantized_norm(node) and _is_one_number(node.inputs[-1])]
    for node in split:
        _split(node)
    return [node_name(node) for node in split]


def is_quantized_norm(node: ir.Node) -> bool:
    """Whether a node is one of the contract's operators with a quantized output."""
    return node.op_type in contract.UNQUANTIZED and is_plugin_node(node)


def _row(node: ir.Node, dtype: str | None, reason: str = "") -> QuantizedOutput:
    return QuantizedOutput(node.metadata_props.get(PATH_KEY, ""), node_name(node), dtype, reason)


def _opset(model: ir.Model) -> int | None:
    imports = model.graph.opset_imports
    return imports.get("", imports.get("ai.onnx"))


def _reach_opset(model: ir.Model, may_raise: bool) -> str:
    """Raise the opset import as far as the operators' functions require; returns why it cannot be raised, or `""`."""
    opset = _opset(model) or 1
    if opset >= QUANTIZED_OPSET:
        return ""
    if not may_raise:
        return f"the function of a quantized norm requires opset {QUANTIZED_OPSET}, and the requested opset is {opset}"
    try:
        raise_opset(model, QUANTIZED_OPSET)
    except UnsupportedError as error:
        return str(error)
    return ""


def _quantization(norm: ir.Node, root: ir.Graph) -> _Quantization | str | None:
    """What quantizes a norm's result; or why the two cannot be fused; or None where the result is not quantized."""
    value, way = norm.outputs[0], []
    if not any(map(_is_quantizer, _readers_behind_casts(value))):
        return None
    for _ in range(2):
        if value.is_graph_output():
            return "its result is also an output of the graph"
        uses = list(value.uses())
        if len(uses) != 1:
            return f"its result has {len(uses)} readers"
        reader = uses[0].node
        if reader.graph is not root:
            return "its result is quantized in a subgraph of a control-flow node"
        way.append(reader)
        if _is_quantizer(reader):
            return _checked(norm, tuple(way), uses[0].idx)
        value = reader.outputs[0]
    return "its result is cast more than once before it is quantized"


def _merge_equal_readers(value: ir.Value, root: ir.Graph) -> None:
    """Merge all readers of a norm's result if they are equal QuantizeLinear nodes, or all casts to float32."""
    nodes = [use.node for use in value.uses()]
    if value.is_graph_output() or any(node.graph is not root or node.outputs[0].is_graph_output() for node in nodes):
        return
    if nodes and all(map(_is_widening, nodes)):
        cast = _merged(nodes, root)
        _merge_equal_readers(cast.outputs[0], root)
        return
    keys = {_quantizer_key(node, value) for node in nodes}
    if len(keys) == 1 and None not in keys:
        _merged(nodes, root)


def _merged(nodes: list[ir.Node], root: ir.Graph) -> ir.Node:
    """The first of equal nodes, which replaces the others."""
    others = set(nodes)
    first = nodes[0] if len(others) == 1 else next(node for node in root if node in others)
    for node in others - {first}:
        node.outputs[0].replace_all_uses_with(first.outputs[0])
        root.remove(node, safe=True)
    return first


def _quantizer_key(node: ir.Node, value: ir.Value) -> tuple[object, ...] | None:
    """A key that is equal for equal QuantizeLinear nodes of one value; None where that is unknown."""
    if not _is_quantizer(node) or not node.inputs or node.inputs[0] is not value:
        return None
    parts: list[object] = [(name, node.attributes[name].value) for name in sorted(node.attributes)]
    for given in node.inputs[1:]:
        array = constant(given)
        if given is not None and array is None:
            return None
        parts.append(None if array is None else (given.dtype, array.shape, array.tobytes()) if given else None)
    return tuple(parts)


def _readers_behind_casts(value: ir.Value) -> Iterator[ir.Node]:
    for use in value.uses():
        yield use.node
        if _is_widening(use.node):
            yield from (further.node for further in use.node.outputs[0].uses())


def _is_quantizer(node: ir.Node) -> bool:
    return node.op_type == "QuantizeLinear" and node.domain in DEFAULT_DOMAINS


def _is_widening(node: ir.Node) -> bool:
    is_cast = node.op_type == "Cast" and node.domain in DEFAULT_DOMAINS
    return is_cast and node.attributes.get_int("to", 0) == int(ir.DataType.FLOAT)


def _checked(norm: ir.Node, way: tuple[ir.Node, ...], index: int) -> _Quantization | str:
    """The quantization, or why the kernel does not support it."""
    node = way[-1]
    scale = node.inputs[1] if len(node.inputs) > 1 else None
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if index != 0 or not all(map(_is_widening, way[:-1])):
        return "its result is not the value that is quantized"
    if node.attributes.get_int("block_size", 0) or node.attributes.get_int("saturate", 1) != 1:
        return "it is quantized in blocks, or without saturation"
    if node.attributes.get_int("precision", 0) not in (0, int(ir.DataType.FLOAT)):
        return "its quantization divides in another dtype than float32"
    array = constant(scale)
    if scale is None or array is None:
        return "the scale of its quantization is not constant"
    if array.size != 1 or array.ndim > 1:
        return f"it is quantized by {array.size} scales, but the kernel supports one for the whole tensor"
    number = float(array.reshape(()))
    if scale.dtype not in _SCALE_TYPES or not (np.isfinite(number) and number > 0):
        return f"the scale of its quantization is {number:g}; expected a finite number above 0"
    dtype = ir.DataType(node.attributes.get_int("output_dtype", 0) or int(ir.DataType.UINT8))
    if zero_point is not None:
        zero = constant(zero_point)
        if zero is None or zero_point.dtype is None:
            return "the zero point of its quantization is not constant"
        if zero.astype(np.float32).any():
            return "the zero point of its quantization is not 0"
        dtype = zero_point.dtype
    if dtype not in _NAMES:
        return f"it is quantized to {dtype.name.lower()}, but the kernel supports {' and '.join(_NAMES.values())}"
    return _Quantization(norm, way, scale, dtype)


def _fuse(quantization: _Quantization, builder: Builder) -> None:
    norm, way, scale = quantization.norm, quantization.way, quantization.scale
    read = [value for node in way for value in node.inputs if value is not None]
    if not (scale.is_initializer() and scale.dtype == ir.DataType.FLOAT and scale.shape == ir.Shape([])):
        array = constant(scale)
        assert array is not None
        scale = builder.constant(array.reshape(()).astype(np.float32), ir.DataType.FLOAT, str(scale.name))
    y, quantized = norm.outputs[0], way[-1].outputs[0]
    name, shape = quantized.name, quantized.shape
    quantized.replace_all_uses_with(y, replace_graph_outputs=True)
    for node in reversed(way):
        builder.graph.remove(node, safe=True)
    quantized.name, y.name = None, name
    y.type = ir.TensorType(quantization.dtype)
    y.shape = shape if shape is not None else y.shape
    norm.op_type = contract.QUANTIZED[norm.op_type]
    norm.resize_inputs(len(norm.inputs) + 1)
    norm.replace_input_with(len(norm.inputs) - 1, scale)
    norm.attributes["quant_type"] = ir.AttrInt64("quant_type", int(quantization.dtype))
    _note_result(norm)
    for value in read:
        producer = value.producer()
        if value.uses() or value.is_graph_output() or value.is_graph_input():
            continue
        if value.is_initializer():
            builder.root.initializers.pop(str(value.name), None)
        elif producer is not None and producer.op_type == "Constant" and producer.graph is builder.graph:
            builder.graph.remove(producer, safe=True)


def _split(node: ir.Node) -> None:
    graph, (x, *_, y_scale) = node.graph, node.inputs
    assert isinstance(graph, ir.Graph)
    assert x is not None
    result, quant_type = node.outputs[0], node.attributes["quant_type"].as_int()
    name, dtype, shape = result.name, x.dtype, result.shape
    quantize = ir.Node(
        "", "QuantizeLinear", [None, y_scale], [ir.AttrInt64("output_dtype", quant_type)],
        name=f"{node_name(node)}/QuantizeLinear",
    )  # fmt: skip
    quantized = quantize.outputs[0]
    quantized.type, quantized.shape = ir.TensorType(ir.DataType(quant_type)), shape
    result.replace_all_uses_with(quantized, replace_graph_outputs=True)
    result.name, quantized.name = f"{name}.normed", name
    result.type = None if dtype is None else ir.TensorType(dtype)
    read, made = result, [quantize]
    if dtype != ir.DataType.FLOAT:
        cast = ir.Node(
            "", "Cast", [result], [ir.AttrInt64("to", int(ir.DataType.FLOAT))], name=f"{node_name(node)}/Cast"
        )
        read, made = cast.outputs[0], [cast, quantize]
        read.name, read.type, read.shape = f"{name}.normed32", ir.TensorType(ir.DataType.FLOAT), shape
    quantize.replace_input_with(0, read)
    graph.insert_after(node, made)
    node.op_type = contract.UNQUANTIZED[node.op_type]
    node.resize_inputs(len(node.inputs) - 1)
    del node.attributes["quant_type"]
    _note_result(node)


def _note_result(norm: ir.Node) -> None:
    """Update the name of the norm's result in its metadata."""
    try:
        names = json.loads(norm.metadata_props[VALUES_KEY])
        norm.metadata_props[VALUES_KEY] = json.dumps({**names, "y": norm.outputs[0].name}, sort_keys=True)
    except (KeyError, ValueError, TypeError, RecursionError):
        return  # no metadata, or not that of this package


def _is_one_number(value: ir.Value | None) -> bool:
    array = constant(value)
    return array is not None and array.size == 1 and array.ndim <= 1
