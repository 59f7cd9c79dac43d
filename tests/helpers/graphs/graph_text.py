"""Small ONNX graphs, written down node by node."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

FLOATS = {
    "float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE,
    "bfloat16": TensorProto.BFLOAT16,
}  # fmt: skip


def numpy_type(dtype: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)


class Graph:
    """Collects nodes; values are names."""

    def __init__(self, opset: int = 18) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.domains: dict[str, int] = {}
        self._count = 0

    def input(self, name: str, shape: list[Any] | None, dtype: str = "float32") -> str:
        self.inputs.append(helper.make_tensor_value_info(name, FLOATS.get(dtype, TensorProto.INT64), shape))
        return name

    def output(self, name: str, dtype: str = "float32", shape: list[Any] | None = None) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, FLOATS[dtype], shape))

    def constant(self, value: Any, dtype: str | None = None, name: str | None = None) -> str:
        """An initializer."""
        array = np.asarray(value, None if dtype is None else numpy_type(dtype))
        self._count += 1
        name = name or f"c{self._count}"
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def constant_node(self, value: Any, dtype: str = "float32", attribute: str = "value") -> str:
        array = np.asarray(value, numpy_type(dtype))
        if attribute == "value":
            return self.op("Constant", value=numpy_helper.from_array(array))
        return self.op("Constant", **{attribute: array.tolist()})

    def op(self, op_type: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Any) -> str:
        """A node; the name of its first output."""
        self._count += 1
        names = [f"v{self._count}"] + [f"v{self._count}.{index}" for index in range(1, outputs)]
        if domain:
            self.domains.setdefault(domain, 1)
        self.nodes.append(
            helper.make_node(op_type, list(inputs), names, name=f"{op_type}{self._count}", domain=domain, **attributes)
        )
        return names[0]

    def cast(self, value: str, dtype: str) -> str:
        return self.op("Cast", value, to=FLOATS[dtype])

    def reduce(self, op_type: str, value: str, axes: list[int], keepdims: int = 1) -> str:
        """Axes as attribute or input, as the opset has it."""
        if self.opset < (13 if op_type == "ReduceSum" else 18):
            return self.op(op_type, value, axes=axes, keepdims=keepdims)
        return self.op(op_type, value, self.constant(np.array(axes, np.int64)), keepdims=keepdims)

    def unsqueeze(self, value: str, axes: list[int]) -> str:
        if self.opset < 13:
            return self.op("Unsqueeze", value, axes=axes)
        return self.op("Unsqueeze", value, self.constant(np.array(axes, np.int64)))

    def reshape(self, value: str, shape: list[int]) -> str:
        return self.op("Reshape", value, self.constant(np.array(shape, np.int64)))

    def graph(self, name: str = "graph") -> onnx.GraphProto:
        return helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.initializers)

    def model(self) -> onnx.ModelProto:
        opsets = [helper.make_opsetid("", self.opset)]
        opsets += [helper.make_opsetid(domain, version) for domain, version in self.domains.items()]
        return helper.make_model(self.graph(), opset_imports=opsets, ir_version=8, functions=self.functions)


def weight(width: int, dtype: str = "float32", seed: int = 0) -> NDArray[Any]:
    """A weight around 1 that float16 does not hold exactly, unless it is one."""
    return (1 + 0.4 * np.random.default_rng([seed, width]).standard_normal(width)).astype(numpy_type(dtype))
