"""Captured graphs made by hand, so that hundreds of norms can be lowered and run without any exporter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rmsnorm_deploy.export.graph.captured_nodes import CAPTURE_DOMAIN, NORM_OP
from rmsnorm_deploy.models.eager import result_dtype
from rmsnorm_deploy.models.spec import NormSpec

from ..norms.norm_zoo import ZooNorm

PATH = "layers.0.norm"
OPSET = 20
DATA_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float64: ir.DataType.DOUBLE,
}
Dims = Sequence[int | str | None]


def tensor(value: Tensor, name: str) -> ir.Tensor:
    """A torch tensor as a constant; the data is copied."""
    dtype = DATA_TYPES[value.dtype]
    array = value.detach().contiguous().view(torch.uint8 if value.ndim else value.dtype).numpy()
    return ir.Tensor(array.view(dtype.numpy()).reshape(value.shape), dtype=dtype, name=name)


@dataclass
class GraphMaker:
    """Collects a graph, value by value."""

    dtype: ir.DataType
    inputs: list[ir.Value] = field(default_factory=list)
    initializers: list[ir.Value] = field(default_factory=list)
    nodes: list[ir.Node] = field(default_factory=list)

    def value(self, name: str, dims: Dims, dtype: ir.DataType | None = None) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype or self.dtype))

    def input(self, name: str, dims: Dims, dtype: ir.DataType | None = None) -> ir.Value:
        self.inputs.append(self.value(name, dims, dtype))
        return self.inputs[-1]

    def initializer(self, name: str, value: Tensor) -> ir.Value:
        made = self.value(name, tuple(value.shape), DATA_TYPES[value.dtype])
        made.const_value = tensor(value, name)
        self.initializers.append(made)
        return made

    def node(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, dims: Dims,
        attributes: Mapping[str, Any] | None = None, *, domain: str = "", dtype: ir.DataType | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> ir.Value:  # fmt: skip
        output = self.value(name, dims, dtype)
        self.nodes.append(
            ir.node(op_type, inputs, attributes or {}, domain=domain, outputs=[output], name=f"node_{name}",
                    metadata_props=dict(metadata or {}))
        )  # fmt: skip
        return output

    def norm(
        self, spec: NormSpec, inputs: Sequence[ir.Value | None], name: str, dims: Dims, *, path: str = PATH,
        dtype: ir.DataType | None = None, metadata: Mapping[str, str] | None = None,
    ) -> ir.Value:  # fmt: skip
        """One captured norm; inputs are x, weight, bias, gate, without the absent ones at the end."""
        present = list(inputs)
        while present and present[-1] is None:
            present.pop()
        attributes = {"spec": spec.to_json(), "path": path}
        dtype = dtype or self._result_dtype(spec, inputs)
        return self.node(
            NORM_OP, present, name, dims, attributes, domain=CAPTURE_DOMAIN, dtype=dtype, metadata=metadata
        )

    def _result_dtype(self, spec: NormSpec, inputs: Sequence[ir.Value | None]) -> ir.DataType | None:
        """What a norm of these inputs returns in PyTorch."""
        known = {number: dtype for dtype, number in DATA_TYPES.items()}
        x, weight, bias = (
            None if value is None or value.dtype not in known or value.shape is None
            else torch.empty([1] * len(value.shape), dtype=known[value.dtype])
            for value in [*inputs, None, None][:3]
        )  # fmt: skip
        return None if x is None else DATA_TYPES[result_dtype(spec, x.dtype, weight, bias)]

    def graph(self, outputs: Sequence[ir.Value], opset: int = OPSET) -> ir.Graph:
        return ir.Graph(
            self.inputs, outputs, nodes=self.nodes, initializers=self.initializers,
            opset_imports={"": opset, CAPTURE_DOMAIN: 1}, name="main",
        )  # fmt: skip

    def model(self, outputs: Sequence[ir.Value], opset: int = OPSET) -> ir.Model:
        return ir.Model(self.graph(outputs, opset), ir_version=10)


def norm_model(
    norm: ZooNorm, module: nn.Module, dtype: torch.dtype, *, spec: NormSpec | None = None,
    leading: Dims = ("batch", "sequence"),
) -> ir.Model:  # fmt: skip
    """`y = norm(x)` or `y = norm(x, gate)` as a captured graph, with the module's weights."""
    maker = GraphMaker(DATA_TYPES[dtype])
    dims = (*leading, *norm.tail)
    x = maker.input("x", dims)
    gate = maker.input("gate", dims) if norm.gated else None
    weight, bias = norm.tensors(module)
    inputs = [
        x,
        maker.initializer("norm.weight", weight) if weight is not None else None,
        maker.initializer("norm.bias", bias) if bias is not None else None,
        gate,
    ]
    return maker.model([maker.norm(spec or norm.spec, inputs, "y", dims)])


def run(model: ir.Model, feeds: Mapping[str, Tensor], optimized: str | None = None) -> list[NDArray[Any]]:
    """The model's outputs in ONNX Runtime on the CPU; float16, float32 and float64 feeds."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = optimized
    data = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in feeds.items()})


def op_counts(model: ir.Model) -> dict[str, int]:
    """How often each operator stands in the main graph, `domain::op` outside the default domain."""
    names = [f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def errors(result: NDArray[Any], reference: NDArray[np.float64], dtype: torch.dtype) -> NDArray[np.float64]:
    """Each element's error in ULP of `dtype` at max(|truth|, root mean square of its row).

    An element far below its row's size is a difference of larger ones (bias, gate): its own ULP says nothing.
    """
    row = np.sqrt(np.mean(reference**2, axis=-1, keepdims=True))
    scale = np.maximum(np.maximum(np.abs(reference), row), torch.finfo(dtype).tiny)
    return np.abs(result.astype(np.float64) - reference) / (scale * torch.finfo(dtype).eps)
