"""Infer the dtypes and shapes that a file does not contain, with ONNX's shape inference.

Only small constants are read; weights are not. An operator that ONNX does not know is replaced by Identity where its
output has the type of its first input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from .constants import DEFAULT_DOMAINS, constant, integers
from .stand_ins import StandIns

# Constants of at most this many elements may hold a shape.
_SMALL = 1024
# A vector with more elements occurs only in a damaged file.
_LONGEST = 1 << 24
_GRAPH = onnx.AttributeProto.GRAPH
# Operators that ONNX does not define, with the indices of the outputs that have the first input's type.
_LIKE_FIRST_INPUT: dict[tuple[str, str], tuple[int, ...]] = {
    ("", "SimplifiedLayerNormalization"): (0,),
    ("com.microsoft", "SimplifiedLayerNormalization"): (0,),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): (0, 3),
    ("com.microsoft", "SkipLayerNormalization"): (0, 3),
    ("com.microsoft", "RotaryEmbedding"): (0,),
    ("com.microsoft", "BiasGelu"): (0,),
    ("com.microsoft", "FastGelu"): (0,),
    ("com.microsoft", "Gelu"): (0,),
    ("com.microsoft", "QuickGelu"): (0,),
    ("rmsnorm_deploy", "RMSNorm"): (0,),
    ("rmsnorm_deploy", "AddRMSNorm"): (0, 1),
    ("trt.plugins", "RMSNorm"): (0,),
    ("trt.plugins", "AddRMSNorm"): (0, 1),
}


@dataclass(frozen=True, slots=True, eq=False)
class Filled:
    """A value whose dtype or shape was inferred, with its previous type and shape."""

    value: ir.Value
    type: ir.TypeProtocol | None
    shape: ir.Shape | None


def fill_types(model: ir.Model) -> list[Filled]:
    """Infer the missing dtypes and shapes of all values in the model's graphs, in place.

    Where the stated shape contradicts the inferred one, the inferred one replaces it: files whose inputs were edited
    often contain outdated shapes, and still run.

    Returns:
        The values that were changed.
    """
    filled: list[Filled] = []
    _fill_types(model, {}, filled)
    computed = _computed_shapes(model)
    if computed:
        _fill_types(model, computed, filled)
    return filled


def _computed_shapes(model: ir.Model) -> dict[str, list[int]]:
    """The integer vectors that nodes compute from known shapes and that ONNX's inference does not follow, by name.

    Only those count whose readers have a result of unknown rank, such as a mean over axes that are a Range.
    """
    found: dict[str, list[int]] = {}
    for node in model.graph:
        if node.domain not in DEFAULT_DOMAINS or all(output.shape is not None for output in node.outputs):
            continue
        for value in node.inputs[1:]:
            known = integers(value) if value is not None and constant(value) is None else None
            if value is not None and known is not None and value.shape is not None and len(value.shape) == 1:
                found[str(value.name)] = known
    return found


def _fill_types(model: ir.Model, computed: Mapping[str, list[int]], filled: list[Filled]) -> None:
    skeleton = _skeleton(model, computed)
    try:
        inferred = _inferred(skeleton)
    except Exception:  # the graph contradicts itself, so only the stated types are known
        return
    known = {info.name: info.type for info in (*inferred.graph.value_info, *inferred.graph.output)}
    with_graphs = (node for node in inferred.graph.node if any(a.type == _GRAPH for a in node.attribute))
    pending: list[tuple[ir.Graph, dict[str, onnx.TypeProto], list[onnx.NodeProto]]] = [
        (model.graph, known, list(with_graphs))
    ]
    while pending:
        graph, known, holders = pending.pop()
        following = iter(holders)
        for node in graph:
            for value in node.outputs:
                if value.name in known:
                    _fill(value, known[value.name], filled)
            inner = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
            if inner and (node.domain, node.op_type) not in _LIKE_FIRST_INPUT:
                protos = [a.g for a in next(following).attribute if a.type == _GRAPH]
                pending.extend(_inner(g, p) for g, p in zip(inner, protos, strict=True))


def _inferred(skeleton: onnx.ModelProto) -> onnx.ModelProto:
    """The model with inferred shapes, including those that depend on computed values.

    For the latter, onnx allocates one entry per element of a vector, so a damaged file could fill the memory.
    """
    plain = onnx.shape_inference.infer_shapes(skeleton)
    graph = plain.graph
    shapes = (info.type.tensor_type.shape.dim for info in (*graph.input, *graph.value_info, *graph.output))
    if any(len(dims) == 1 and dims[0].dim_value > _LONGEST for dims in shapes):
        return plain
    return onnx.shape_inference.infer_shapes(skeleton, data_prop=True)


def _inner(graph: ir.Graph, proto: onnx.GraphProto) -> tuple[ir.Graph, dict[str, onnx.TypeProto], list[onnx.NodeProto]]:
    known = {info.name: info.type for info in (*proto.value_info, *proto.output)}
    return graph, known, [node for node in proto.node if any(a.type == _GRAPH for a in node.attribute)]


def _skeleton(model: ir.Model, computed: Mapping[str, list[int]]) -> onnx.ModelProto:
    """The model as a proto in which large constants are replaced by inputs of the same type.

    A node whose result is in `computed` becomes a constant.
    """
    proto = onnx.ModelProto(ir_version=10)
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    graph = proto.graph
    graph.name = "types"
    for value in model.graph.inputs:
        if value.name not in model.graph.initializers:
            ir.serde.serialize_value_into(graph.input.add(), value)
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.size <= _SMALL:
            ir.serde.serialize_tensor_into(graph.initializer.add(), value.const_value)
            graph.initializer[-1].name = str(value.name)
        else:
            ir.serde.serialize_value_into(graph.input.add(), value)
    for node in model.graph:
        like_first = _LIKE_FIRST_INPUT.get((node.domain, node.op_type))
        if node.outputs and node.outputs[0].name in computed:
            graph.node.add(
                op_type="Constant",
                output=[str(node.outputs[0].name)],
                attribute=[onnx.helper.make_attribute("value_ints", computed[str(node.outputs[0].name)])],
            )
        elif (stand_ins := StandIns(node)).nodes:
            graph.node.extend(stand_ins.nodes)
            graph.input.extend(stand_ins.inputs)
        elif like_first is None:
            ir.serde.serialize_node_into(graph.node.add(), node)
        elif node.inputs and node.inputs[0] is not None:
            outputs = [node.outputs[index] for index in like_first if index < len(node.outputs)]
            for output in (value for value in outputs if value.name):
                graph.node.add(op_type="Identity", input=[str(node.inputs[0].name)], output=[str(output.name)])
        inferred = node.domain in ("", "ai.onnx") and onnx.defs.has(node.op_type)
        for value in node.outputs if not inferred else ():
            if value.type is not None and value.name:
                ir.serde.serialize_value_into(graph.value_info.add(), value)
    for value in model.graph.outputs:
        graph.output.add(name=str(value.name))
    for function in model.functions.values():
        ir.serde.serialize_function_into(proto.functions.add(), function)
    return proto


def _fill(value: ir.Value, known: onnx.TypeProto, filled: list[Filled]) -> None:
    if not known.HasField("tensor_type"):
        return
    tensor = known.tensor_type
    before = Filled(value, value.type, value.shape)
    if value.dtype is None and tensor.elem_type != 0:
        value.dtype = ir.DataType(tensor.elem_type)
    if tensor.HasField("shape"):
        shape = ir.Shape([_dim(dim) for dim in tensor.shape.dim])
        if value.shape is None or _contradict(value.shape, shape):
            value.shape = shape
    if value.type is not before.type or value.shape is not before.shape:
        filled.append(before)


def _contradict(said: ir.Shape, inferred: ir.Shape) -> bool:
    if len(said) != len(inferred):
        return True
    return any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(said, inferred, strict=True))


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return dim.dim_value
    return dim.dim_param or None
