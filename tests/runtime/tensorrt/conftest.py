"""Small ONNX files written by hand, and builds of them with the real builder of TensorRT-RTX, which needs no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from rmsnorm_deploy.export.lowering.plugin_functions import plugin_function
from rmsnorm_deploy.plugins import contract
from tests.helpers.interface.command_line import CommandLine

WIDTH = 32
ATTRIBUTES: dict[str, Any] = {
    "epsilon": 1e-5, "scale_offset": 0.0, "scale_type": 1, "plugin_namespace": "rmsnorm_deploy", "plugin_version": "1",
}  # fmt: skip
DIMS = ("batch", "sequence", WIDTH)


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], name: str | None = None, **attributes: Any) -> Any:
    return helper.make_node(op, inputs, outputs, outputs[0] if name is None else name, **attributes)


def weight(name: str, shape: Sequence[int], dtype: int = TensorProto.FLOAT) -> Any:
    values = np.random.default_rng(len(name)).uniform(0.5, 1.5, shape)
    return numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(dtype)), name)


class Files:
    """Writes small models into one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(
        self,
        nodes: Sequence[Any],
        weights: Sequence[Any],
        *,
        dims: Sequence[int | str] = DIMS,
        dtype: int = TensorProto.FLOAT,
        inputs: Sequence[Any] | None = None,
        output: str = "y",
        functions: Sequence[Any] = (),
        name: str = "model.onnx",
        external: bool = False,
        opset: int = 20,
        out_dtype: int | None = None,
    ) -> Path:
        """A model from `x` to `output`."""
        given = [helper.make_tensor_value_info("x", dtype, dims)] if inputs is None else list(inputs)
        made = helper.make_tensor_value_info(output, dtype if out_dtype is None else out_dtype, None)
        graph = helper.make_graph(list(nodes), "graph", given, [made], list(weights))
        domains = dict.fromkeys(["", contract.DOMAIN, *(f.domain for f in functions), *(n.domain for n in nodes)])
        imports = [helper.make_opsetid(domain, 1 if domain else opset) for domain in domains]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10, functions=list(functions))
        path = self.folder / name
        if external:
            onnx.save(model, path, save_as_external_data=True, location=f"{name}.data", size_threshold=0)
        else:
            onnx.save(model, path)
        return path

    def function(self, op_type: str = contract.RMS_NORM) -> Any:
        """The local function that replaces the plugin."""
        return ir.to_proto(plugin_function(op_type))

    def norm(self, op_type: str = contract.RMS_NORM, name: str = "norm", **changes: Any) -> Any:
        """A node of the contract from `x` (and `residual`) and `scale` to `n`; attributes of None are left out."""
        attributes = {key: value for key, value in {**ATTRIBUTES, **changes}.items() if value is not None}
        domain = attributes.pop("domain", contract.DOMAIN)
        inputs = attributes.pop("inputs", ["x", "scale"] if op_type == contract.RMS_NORM else ["x", "r", "scale"])
        outputs = ["n"] if op_type == contract.RMS_NORM else ["n", "sum"]
        return node(op_type, inputs, outputs, name, domain=domain, **attributes)

    def plugin(self, *, dtype: int = TensorProto.FLOAT, scale: Any = None, **changes: Any) -> Path:
        """One norm in the plugin, and a matmul behind it."""
        options = {key: changes.pop(key) for key in ("dims", "name_of_file", "functions") if key in changes}
        weights = [weight("scale", (WIDTH,), dtype) if scale is None else scale, weight("w", (WIDTH, WIDTH), dtype)]
        nodes = [self.norm(**changes), node("MatMul", ["n", "w"], ["y"])]
        functions = options.get("functions", [self.function()])
        name = options.get("name_of_file", "plugin.onnx")
        return self.save(nodes, weights, dtype=dtype, functions=functions, dims=options.get("dims", DIMS), name=name)

    def primitives(self, *, named: bool = True, dtype: int = TensorProto.FLOAT, **options: Any) -> Path:
        """One norm as any exporter would write it, and a matmul behind it; without metadata."""
        kind = helper.tensor_dtype_to_np_dtype(dtype)
        weights = [
            weight("scale", (WIDTH,), dtype), weight("w", (WIDTH, WIDTH), dtype),
            numpy_helper.from_array(np.array(2, kind), "two"), numpy_helper.from_array(np.array(1e-5, kind), "eps"),
            numpy_helper.from_array(np.array([-1]), "axes"),
        ]  # fmt: skip
        name = None if named else ""
        nodes = [
            node("Pow", ["x", "two"], ["squares"], name), node("ReduceMean", ["squares", "axes"], ["mean"], name),
            node("Add", ["mean", "eps"], ["under"], name), node("Sqrt", ["under"], ["root"], name),
            node("Div", ["x", "root"], ["normed"], name), node("Mul", ["normed", "scale"], ["n"], name),
            node("MatMul", ["n", "w"], ["y"], name),
        ]  # fmt: skip
        return self.save(nodes, weights, dtype=dtype, **options)

    def matmul(self, **options: Any) -> Path:
        """A model without norms."""
        return self.save([node("MatMul", ["x", "w"], ["y"])], [weight("w", (WIDTH, WIDTH))], **options)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    folder = tmp_path / "files"
    folder.mkdir()
    return Files(folder)


@pytest.fixture(scope="session")
def shared_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def rmsnorm(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys)
