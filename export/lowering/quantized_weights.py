"""Quantize the constant weights of the matrix products of a lowered graph (`quantize_weights`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from ...models.dtypes import onnx_name
from ..graph.metadata import PATH_KEY
from .weight_quantizer import DOMAIN, DTYPES, OPERATOR, QuantizedMatrix, Scheme

_VERSION = 1
# ONNX Runtime's kernels round the columns behind the last whole tile in another order. Measured on the CPU with 1.32:
# with widths of which each is a multiple of this, products side by side have the bits of those alone.
_TILE = 16
# As many products of one factor become one.
_LEAST = 3
# The operators whose constant weights stay as they are, by the place of the weight.
_OTHERS = {"Gemm": 1, "Conv": 1, "Gather": 0}


@dataclass(slots=True)
class QuantizedWeights:
    """What was quantized.

    Attributes:
        scheme: how.
        nodes: the number of MatMuls that became `MatMulNBits`; those of one x with weights of their own became one,
            with a Split behind it.
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


@dataclass(frozen=True, slots=True, eq=False)
class _Product:
    """A MatMul to quantize, its weight, and whether it reads the weight's transposition."""

    node: ir.Node
    weight: ir.Value
    transposed: bool

    @property
    def key(self) -> tuple[int, bool]:
        return id(self.weight), self.transposed

    @property
    def width(self) -> int:
        """The columns of the product."""
        assert self.weight.const_value is not None
        return int(self.weight.const_value.shape.numpy()[0 if self.transposed else 1])


@dataclass(frozen=True, slots=True, eq=False)
class _SideBySide:
    """Weights of one product; each is quantized alone."""

    matrices: Sequence[QuantizedMatrix]

    @property
    def name(self) -> str:
        return f"{self.matrices[0].name}_and_{len(self.matrices) - 1}_more"

    @property
    def widths(self) -> list[int]:
        return [int(matrix.attributes["N"]) for matrix in self.matrices]

    @property
    def attributes(self) -> dict[str, Any]:
        return {**self.matrices[0].attributes, "N": sum(self.widths)}

    @property
    def parts(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        found = {}
        for suffix, (dtype, shape) in self.matrices[0].parts.items():
            rows = sum(matrix.parts[suffix][1][0] for matrix in self.matrices)
            found[suffix] = dtype, (rows, *shape[1:])
        return found

    def read(self, suffix: str) -> np.ndarray[Any, Any]:
        return np.concatenate([matrix.read(suffix) for matrix in self.matrices])


def quantize_weights(model: ir.Model, scheme: Scheme) -> QuantizedWeights:
    """Replace each `MatMul(x, weight)` and `MatMul(x, Transpose(weight))` by MatMulNBits, which ONNX Runtime runs.

    The weight is a constant matrix of float32 or float16 with at least as many rows as a block has; the nodes of norms
    and all others stay as they are. The weights are read and quantized when their new constants are read.

    Three MatMuls of one x (queries, keys and values) or more become one operator with their columns side by side, and a
    Split behind it: columns are quantized and multiplied independently, and a step reads x once. Two (gate and up) stay
    apart, because the Split costs as much as the operator that it saves, and a prompt more, for which it copies.

    Args:
        model: a lowered graph, which is changed.
        scheme: how.

    Raises:
        UnsupportedError: the quantizer failed on a weight.
    """
    result, names = QuantizedWeights(scheme), _names(model)
    found_products: list[_Product] = []
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
        found_products.append(_Product(node, weight, transposed))
    uses = Counter(product.key for product in found_products)
    matrices: dict[tuple[int, bool], QuantizedMatrix] = {}
    made: dict[tuple[int, bool], list[ir.Value]] = {}
    for group in _groups(found_products, uses):
        for product in group:
            if product.key not in matrices:
                matrices[product.key] = _matrix(product.weight, product.transposed, scheme)
        sources = [matrices[product.key] for product in group]
        if len(group) > 1:
            joined = _SideBySide(sources)
            _join([product.node for product in group], joined, [*_constants(model.graph, joined, names)], names)
            continue
        (product,) = group
        if product.key not in made:
            made[product.key] = [*_constants(model.graph, sources[0], names)]
        _replace(product.node, sources[0], made[product.key])
    result.nodes, result.weights = len(found_products), len(matrices)
    if result.nodes:
        model.graph.opset_imports[DOMAIN] = _VERSION
    for graph in model.graphs():
        for name in [name for name, value in graph.initializers.items() if _is_unused(value)]:
            del graph.initializers[name]
    return result


def _groups(products: Sequence[_Product], uses: Mapping[tuple[int, bool], int]) -> list[list[_Product]]:
    """The products that become one operator: three or more of one x in one graph, without a bias, with own weights."""
    groups: dict[Any, list[_Product]] = {}
    for product in products:
        alone = uses[product.key] > 1 or product.width % _TILE != 0 or _has_bias(product.node)
        key = product if alone else (product.node.inputs[0], id(product.node.graph), _dtype(product.weight))
        groups.setdefault(key, []).append(product)
    return [part for group in groups.values() for part in ([group] if len(group) >= _LEAST else [[p] for p in group])]


def _has_bias(node: ir.Node) -> bool:
    """Whether a constant is added to a product alone, which ONNX Runtime then adds in the product's kernel."""
    uses = list(node.outputs[0].uses())
    return (
        len(uses) == 1
        and uses[0].node.op_type == "Add"
        and any(value is not None and value.is_initializer() for value in uses[0].node.inputs)
    )


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


def _constants(graph: ir.Graph, matrix: QuantizedMatrix | _SideBySide, names: set[str | None]) -> Iterator[ir.Value]:
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


def _operator(node: ir.Node, matrix: QuantizedMatrix | _SideBySide, constants: list[ir.Value]) -> ir.Node:
    """The operator in place of a MatMul, before it in the graph."""
    assert isinstance(node.graph, ir.Graph)
    attributes = [ir.AttrInt64(name, int(value)) for name, value in matrix.attributes.items()]
    new = ir.Node(DOMAIN, OPERATOR, [node.inputs[0], *constants], attributes, name=node.name)
    new.metadata_props.update(node.metadata_props)
    node.graph.insert_before(node, new)
    return new


def _replace(node: ir.Node, matrix: QuantizedMatrix, constants: list[ir.Value]) -> None:
    _give_way(node, _operator(node, matrix, constants).outputs[0])


def _join(nodes: Sequence[ir.Node], matrix: _SideBySide, constants: list[ir.Value], names: set[str | None]) -> None:
    """Put one operator and a Split in the place of the first of several MatMuls."""
    first, graph = nodes[0], nodes[0].graph
    assert isinstance(graph, ir.Graph)
    whole = _operator(first, matrix, constants).outputs[0]
    y, name = first.outputs[0], _new_name(f"{matrix.name}_columns", names)
    whole.name, whole.type = _new_name(f"{matrix.name}_product", names), y.type
    if y.shape is not None:
        whole.shape = ir.Shape([*y.shape[:-1], sum(matrix.widths)])
    sizes = ir.Value(name=name, shape=ir.Shape([len(nodes)]), type=ir.TensorType(ir.DataType.INT64))
    sizes.const_value = ir.Tensor(np.array(matrix.widths, np.int64), name=name)
    graph.initializers[name] = sizes
    split = ir.Node("", "Split", [whole, sizes], [ir.AttrInt64("axis", -1)], num_outputs=len(nodes))
    split.name = f"{first.name}/Split"
    graph.insert_before(first, split)
    for node, result in zip(nodes, split.outputs, strict=True):
        _give_way(node, result)


def _give_way(node: ir.Node, result: ir.Value) -> None:
    """Let a value have the name and the readers of a MatMul's result, and remove the MatMul."""
    graph, y = node.graph, node.outputs[0]
    assert isinstance(graph, ir.Graph)
    transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
    result.name, result.shape, result.type, y.name = y.name, y.shape, y.type, None
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
