"""What a file asks of TensorRT: its inputs, and its norms whether or not the file says what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rmsnorm_deploy.models.errors import UnsupportedError
from rmsnorm_deploy.runtime.tensorrt.network import InputDims, NetworkFile, read_network

NODES = {"squares", "mean", "under", "root", "normed", "n"}


def test_inputs_have_numbers_names_or_nothing(files: Any) -> None:
    path = files.matmul()
    model = onnx.load(path)
    extra = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, "b", 3]) for name in ("more", "w2")]
    model.graph.input.extend(extra)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 1, 3), "f4"), "w2"))
    onnx.save(model, path)
    found = read_network(path)
    assert found.inputs == [InputDims("x", ("batch", "sequence", 32)), InputDims("more", (None, "b", 3))]
    assert (found.norms, found.plugin_nodes, found.functions, found.external_files) == ([], [], [], ())
    assert found.path == path


def test_norms_of_a_foreign_file_are_found(files: Any) -> None:
    (norm,) = read_network(files.primitives()).norms
    assert (norm.form, norm.is_plugin) == ("plain", False)
    assert norm.nodes == NODES
    assert norm.node == "n"
    assert norm.path == "squares"  # its first node


def test_nodes_without_names_have_those_that_tensorrt_gives_them(files: Any) -> None:
    (norm,) = read_network(files.primitives(named=False)).norms
    assert norm.nodes == {f"node_of_{name}" for name in NODES}
    assert norm.node == "node_of_n"


def test_the_contracts_nodes_are_norms(files: Any) -> None:
    found = read_network(files.plugin())
    assert (found.plugin_nodes, found.functions, found.has_unnamed_plugins) == (["norm"], ["RMSNorm"], False)
    (norm,) = found.norms
    assert (norm.path, norm.node, norm.nodes, norm.is_plugin, norm.form) == ("norm", "norm", {"norm"}, True, "plain")


def test_the_contracts_nodes_without_names(files: Any) -> None:
    found = read_network(files.plugin(name=""))
    assert (found.plugin_nodes, found.has_unnamed_plugins) == ([""], True)
    assert [(norm.node, norm.is_plugin) for norm in found.norms] == [("node_of_n", True)]


def test_a_residual_add_is_a_form(files: Any) -> None:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 32]) for name in ("x", "r")]
    weights = [numpy_helper.from_array(np.ones(32, np.float32), "scale")]
    nodes = [files.norm("AddRMSNorm"), helper.make_node("Add", ["n", "sum"], ["y"], "last")]
    found = read_network(files.save(nodes, weights, inputs=inputs, functions=[files.function("AddRMSNorm")]))
    assert [(norm.form, norm.is_plugin) for norm in found.norms] == [("residual_add", True)]
    assert found.functions == ["AddRMSNorm"]


def test_a_plugin_of_others_in_onnx_runtimes_domain_is_not_ours(files: Any) -> None:
    path = files.plugin(domain="trt.plugins", functions=[], plugin_namespace="somebody")
    network = read_network(path)
    assert (network.plugin_nodes, network.norms) == ([], [])


def test_onnx_runtimes_domain_counts_too(files: Any) -> None:
    found = read_network(files.plugin(domain="trt.plugins", functions=[]))
    assert (found.plugin_nodes, found.functions) == (["norm"], [])


@pytest.mark.parametrize("opset", [20, 23])
def test_fused_operators_are_norms(opset: int, files: Any) -> None:
    node = (
        helper.make_node("RMSNormalization", ["x", "scale"], ["y"], "fused", epsilon=1e-5, axis=-1)
        if opset == 23
        else helper.make_node("SimplifiedLayerNormalization", ["x", "scale"], ["y"], "fused", epsilon=1e-5, axis=-1)
    )
    weights = [numpy_helper.from_array(np.ones(32, np.float32), "scale")]
    (norm,) = read_network(files.save([node], weights, opset=opset)).norms
    assert (norm.node, norm.nodes, norm.is_plugin) == ("fused", {"fused"}, False)


def test_weights_outside_are_listed_and_not_read(files: Any) -> None:
    found = read_network(files.primitives(external=True))
    assert found.external_files == (files.folder / "model.onnx.data",)
    assert [norm.node for norm in found.norms] == ["n"]


def test_the_scale_type_must_match_the_scales_dtype(files: Any) -> None:
    def read(dtype: int, scale_type: int) -> NetworkFile:
        return read_network(files.plugin(dtype=dtype, scale_type=scale_type))

    for dtype, allowed in ((TensorProto.FLOAT, {1}), (TensorProto.FLOAT16, {1, 10}), (TensorProto.BFLOAT16, {1, 16})):
        for scale_type in (1, 10, 16):
            if scale_type in allowed:
                assert read(dtype, scale_type).plugin_nodes == ["norm"]
            else:
                with pytest.raises(UnsupportedError, match=f"scale_type: expected .*, got {scale_type}"):
                    read(dtype, scale_type)


def test_an_export_says_its_norms_by_itself(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from rmsnorm_deploy.export.from_torch.export_model import export_model
    from tests.helpers.models.small_models import Residual, residual_inputs

    torch.manual_seed(0)
    results = export_model(Residual(), tmp_path / "out", inputs=residual_inputs(), target=("plugin", "standard"))
    for result in results:
        found = read_network(result.folder / "model.onnx")
        assert {norm.path for norm in found.norms} == {"norms.0", "norms.1"}, result.target
        assert len(found.plugin_nodes) == (2 if result.target == "plugin" else 0)
        assert all(norm.node in norm.nodes for norm in found.norms)
