"""Quantize the constant weights of the matrix products of a lowered graph (`quantize_weights`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from ...models.dtypes import onnx_name
from ..graph.metadata import PATH_KEY
from .weight_quantizer import DOMAIN, DTYPES, OPERATOR, QuantizedMatrix, Scheme

_VERSION = 1
# The operators whose constant weights stay as they are, by the place of the weight.
_OTHERS = {"Gemm": 1, "Conv": 1, "Gather": 0}


@dataclass(slots=True)
class QuantizedWeights:
    """What was quantized.

    Attributes:
        scheme: how.
        nodes: the number of MatMuls that became `MatMulNBits`.
        weights: the number of their weights; several nodes may read one.
        left: the number of nodes with a constant weight that stayed as they are, by the reason.
    """

    scheme: Scheme
    nodes: int = 0
    weights: int = 0
    left: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """The value in a manifest."""
        scheme = self.scheme
        return {
            "profile": scheme.name,
            "operator": f"{DOMAIN}::{OPERATOR}",
            "bits": scheme.bits,
            "block_size": scheme.block_size,
            "symmetric": scheme.symmetric,
            "accuracy_level": scheme.accuracy_level,
            "nodes": self.nodes,
            "weights": self.weights,
            "left": dict(self.left),
        }


def summed(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The manifest's value for a model of several parts, from those of its parts."""
    rows = list(rows)
    left: Counter[str] = Counter()
    for row in rows:
        left.update(row["left"])
    counts = {key: sum(row[key] for row in rows) for key in ("nodes", "weights")}
    return {**rows[0], **counts, "left": dict(left)}


def quantize_weights(model: ir.Model, scheme: Scheme) -> QuantizedWeights:
    """Replace each `MatMul(x, weight)` and `MatMul(x, Transpose(weight))` by MatMulNBits, which ONNX Runtime runs.

    The weight is a constant matrix of float32 or float16 with at least as many rows as a block has; the nodes of norms
    and all others stay as they are. The weights are read and quantized when their new constants are read.

    Args:
        model: a lowered graph, which is changed.
        scheme: how.

    Raises:
        UnsupportedError: the quantizer failed on a weight.
    """
    result, names = QuantizedWeights(scheme), _names(model)
    made: dict[tuple[int, bool], tuple[QuantizedMatrix, list[ir.Value]]] = {}
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if node.domain != "" or PATH_KEY in node.metadata_props:
            continue
        if node.op_type in _OTHERS:
            weight = node.inputs[_OTHERS[node.op_type]]
            if weight is not None and weight.is_initializer() and _dtype(weight) in DTYPES:
                result.left[f"the operator is {node.op_type}"] += 1
            continue
        found = _weight(node)
        if found is None:
            continue
        weight, transposed = found
        reason = _why_not(node, weight, transposed, scheme)
        if reason:
            result.left[reason] += 1
            continue
        key = (id(weight), transposed)
        if key not in made:
            matrix = _matrix(weight, transposed, scheme)
            made[key] = matrix, [*_constants(model.graph, matrix, names)]
        _replace(node, *made[key])
        result.nodes += 1
    result.weights = len(made)
    if result.nodes:
        model.graph.opset_imports[DOMAIN] = _VERSION
    for graph in model.graphs():
        for name in [name for name, value in graph.initializers.items() if _is_unused(value)]:
            del graph.initializers[name]
    return result


def _weight(node: ir.Node) -> tuple[ir.Value, bool] | None:
    """The constant second factor of a MatMul, and whether the MatMul reads its transposition."""
    if node.op_type != "MatMul" or len(node.inputs) != 2 or node.inputs[1] is None:
        return None
    value, producer = node.inputs[1], node.inputs[1].producer()
    if producer is None:
        return (value, False) if _is_constant(value) else None
    if producer.op_type != "Transpose" or producer.domain != "" or not producer.inputs:
        return None
    weight = producer.inputs[0]
    if weight is None or not _is_constant(weight):
        return None
    return weight, True


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() and not value.is_graph_input() and value.const_value is not None


def _why_not(node: ir.Node, weight: ir.Value, transposed: bool, scheme: Scheme) -> str:
    """Why a product stays as it is; empty if it need not."""
    assert weight.const_value is not None
    x, shape = node.inputs[0], weight.const_value.shape.numpy()
    if _dtype(weight) not in DTYPES:
        return f"the weight is in {_dtype(weight)}"
    if len(shape) != 2:
        return "the weight is not a matrix"
    inputs = shape[1] if transposed else shape[0]
    if inputs < scheme.block_size:
        return f"the weight has fewer than {scheme.block_size} inputs"
    if x is None or x.shape is None or len(x.shape) < 2:
        return "the other factor is not known to be a matrix"
    return ""


def _dtype(value: ir.Value) -> str:
    assert value.const_value is not None
    return onnx_name(value.const_value.dtype)


def _matrix(weight: ir.Value, transposed: bool, scheme: Scheme) -> QuantizedMatrix:
    tensor = weight.const_value
    assert tensor is not None

    def matrix() -> np.ndarray[Any, Any]:
        array = tensor.numpy()
        return array.T if transposed else array

    return QuantizedMatrix(str(weight.name), matrix, scheme)


def _constants(graph: ir.Graph, matrix: QuantizedMatrix, names: set[str | None]) -> Iterator[ir.Value]:
    """The constants that the operator reads behind the first factor, in its order."""
    for suffix, (dtype, shape) in matrix.parts.items():
        name = _new_name(f"{matrix.name}{suffix}", names)

        def read(suffix: str = suffix, name: str = name) -> ir.Tensor:
            return ir.Tensor(matrix.read(suffix), name=name)

        kind = ir.DataType.from_numpy(dtype)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))
        value.const_value = ir.LazyTensor(read, kind, ir.Shape(shape), name=name)
        graph.initializers[name] = value
        yield value


def _replace(node: ir.Node, matrix: QuantizedMatrix, constants: list[ir.Value]) -> None:
    graph, y = node.graph, node.outputs[0]
    assert isinstance(graph, ir.Graph)
    transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
    attributes = [ir.AttrInt64(name, int(value)) for name, value in matrix.attributes.items()]
    new = ir.Node(DOMAIN, OPERATOR, [node.inputs[0], *constants], attributes, name=node.name)
    new.metadata_props.update(node.metadata_props)
    result = new.outputs[0]
    result.name, result.shape, result.type, y.name = y.name, y.shape, y.type, None
    graph.insert_before(node, new)
    ir.convenience.replace_all_uses_with(y, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if transpose is not None and not transpose.outputs[0].uses() and isinstance(transpose.graph, ir.Graph):
        transpose.graph.remove(transpose, safe=True)


def _is_unused(value: ir.Value) -> bool:
    return not value.uses() and not value.is_graph_output() and not value.is_graph_input()


def _names(model: ir.Model) -> set[str | None]:
    names: set[str | None] = set()
    for graph in model.graphs():
        names |= {value.name for node in graph for value in node.outputs}
        names |= {value.name for value in graph.inputs} | set(graph.initializers)
    return names


def _new_name(name: str, names: set[str | None]) -> str:
    number, found = 2, name
    while found in names:
        found, number = f"{name}_{number}", number + 1
    names.add(found)
    return found
