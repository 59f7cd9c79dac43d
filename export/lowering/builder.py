"""Build new nodes of an ONNX graph, whose values have dtypes and shapes, and share their constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..graph.constants import constant
from ..graph.metadata import METADATA_PREFIX


class Builder:
    """Collects new nodes for one place in a graph; `insert_before` inserts them.

    Args:
        graph: the graph to insert the nodes into.
        root: the main graph, which contains the constants.
        metadata: metadata of every node.
        constants: constants that exist already for this model, shared between builders.
        opset: opset import of the finished file.
    """

    def __init__(
        self, graph: ir.Graph, root: ir.Graph, metadata: Mapping[str, str], constants: dict[Any, ir.Value], opset: int
    ) -> None:
        self.graph = graph
        self.root = root
        self.opset = opset
        self.metadata = dict(metadata)
        self.nodes: list[ir.Node] = []
        self._constants = constants
        self._made: list[Any] = []

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, Any] | None = None,
        *,
        dtype: ir.DataType,
        shape: ir.Shape | None,
        domain: str = "",
        outputs: int = 1,
    ) -> ir.Value:
        """Add a node; every output has the given dtype and shape. Returns the first output."""
        node = ir.node(
            op_type,
            inputs,
            attributes or {},
            domain=domain,
            num_outputs=outputs,
            metadata_props=dict(self.metadata),
        )
        for output in node.outputs:
            output.dtype = dtype
            output.shape = shape.copy() if shape is not None else None
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: NDArray[Any], dtype: ir.DataType, hint: str) -> ir.Value:
        """An initializer of the main graph with this value; equal ones are shared."""
        cast = np.asarray(array).astype(dtype.numpy())
        key = (cast.tobytes(), cast.shape, dtype)
        if key not in self._constants:
            name = self._free_name(f"{METADATA_PREFIX}{_stem(hint)}.{dtype.name.lower()}")
            value = ir.Value(
                name=name, shape=ir.Shape(cast.shape), type=ir.TensorType(dtype),
                const_value=ir.Tensor(cast, dtype=dtype, name=name),
            )  # fmt: skip
            self.root.register_initializer(value)
            self._constants[key] = value
            self._made.append(key)
        return self._constants[key]

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in `dtype`: itself, a converted constant, or a Cast node."""
        if value.dtype == dtype:
            return value
        array = constant(value)
        if array is not None:
            return self.constant(array, dtype, value.name or "constant")
        return self.op("Cast", [value], {"to": dtype}, dtype=dtype, shape=value.shape)

    def binary(self, op_type: str, a: ir.Value, b: ir.Value, shape: ir.Shape | None) -> ir.Value:
        """`a op b` with PyTorch's promotion between two floating dtypes."""
        dtype = promote(a.dtype, b.dtype)
        return self.op(op_type, [self.cast(a, dtype), self.cast(b, dtype)], dtype=dtype, shape=shape)

    def insert_before(self, node: ir.Node) -> None:
        """Insert the collected nodes before `node`."""
        self.graph.insert_before(node, self.nodes)

    def withdraw(self) -> None:
        """Discard the collected nodes, and the constants that were added for them."""
        for node in reversed(self.nodes):
            node.resize_inputs(0)
        self.nodes.clear()
        for key in self._made:
            del self.root.initializers[str(self._constants.pop(key).name)]
        self._made.clear()

    def _free_name(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self.root.initializers:
            name, number = f"{wanted}.{number}", number + 1
        return name


def _stem(hint: str) -> str:
    """A name without the prefix and suffixes of a constant that this package added."""
    if not hint.startswith(METADATA_PREFIX):
        return hint
    parts = hint.removeprefix(METADATA_PREFIX).split(".")
    while len(parts) > 1 and (parts[-1].isdecimal() or parts[-1].upper() in ir.DataType.__members__):
        parts.pop()
    return ".".join(parts)


def promote(a: ir.DataType | None, b: ir.DataType | None) -> ir.DataType:
    """The dtype in which PyTorch computes with tensors of two floating dtypes."""
    if a is None or b is None:
        raise ValueError("a value of the graph has no dtype")
    if a == b:
        return a
    if ir.DataType.DOUBLE in (a, b):
        return ir.DataType.DOUBLE
    return ir.DataType.FLOAT


def lowest(dtype: ir.DataType) -> float:
    """The lowest finite value of a floating dtype, which masks add to scores."""
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype.numpy()).min)
