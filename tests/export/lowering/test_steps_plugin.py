"""The plugin target: nodes that follow the contract, and a file that runs without the plugin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from rmsnorm_deploy.export.from_torch.lower import lower
from rmsnorm_deploy.export.graph.captured_nodes import CAPTURE_DOMAIN
from rmsnorm_deploy.plugins import contract
from tests.helpers.graphs.capture_graph import GraphMaker, errors, run
from tests.helpers.norms.norm_cases import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    case,
    plugin_nodes,
    residual_feeds,
    residual_model,
)
from tests.helpers.norms.norm_zoo import ONE_PLUS, ZOO


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_plugin_nodes_have_exactly_the_attributes_of_the_contract(name: str, dtype: torch.dtype) -> None:
    it = case(name, dtype)
    lowered, _ = lower(it.model, "plugin")
    (node,) = plugin_nodes(lowered)
    assert node.op_type == contract.RMS_NORM
    assert sorted(node.attributes) == sorted(contract.ATTRIBUTES)
    for attribute, kind in contract.KERNEL_ATTRIBUTES.items():
        assert node.attributes[attribute].type == ir.AttributeType[kind]
    assert {key: node.attributes[key].as_string() for key in contract.PARSER_ATTRIBUTES} == contract.PARSER_ATTRIBUTES
    assert len(node.inputs) == len(contract.INPUTS[contract.RMS_NORM])
    assert len(node.outputs) == len(contract.OUTPUTS[contract.RMS_NORM])
    assert len({value.dtype for value in (*node.inputs, *node.outputs)}) == 1
    assert node.inputs[1].shape == ir.Shape((node.inputs[0].shape[-1],)) or it.spec.trailing_dims > 1
    eps = node.attributes["epsilon"].as_float()
    count = it.spec.group_size or 64
    expected = it.spec.eps / count if it.spec.reduction == "sum" else it.spec.eps
    assert eps == pytest.approx(float(np.float32(expected)), rel=1e-7)


@pytest.mark.parametrize(
    ("name", "dtype", "offset", "scale_type", "x_type"),
    [
        ("torch", torch.float32, 0.0, FLOAT32, FLOAT32),
        ("torch", torch.float16, 0.0, FLOAT32, FLOAT16),
        ("llama", torch.float16, 0.0, FLOAT16, FLOAT16),
        ("llama", torch.bfloat16, 0.0, BFLOAT16, BFLOAT16),
        ("gemma2", torch.float32, 1.0, FLOAT32, FLOAT32),
        ("gemma2", torch.bfloat16, 1.0, FLOAT32, BFLOAT16),
        ("nanochat", torch.float16, 0.0, FLOAT32, FLOAT16),
        ("mamba2", torch.float16, 0.0, FLOAT32, FLOAT32),
    ],
)
def test_plugin_attributes_say_where_the_scale_multiplies(
    name: str, dtype: torch.dtype, offset: float, scale_type: ir.DataType, x_type: ir.DataType
) -> None:
    (node,) = plugin_nodes(lower(case(name, dtype).model, "plugin")[0])
    assert node.attributes["scale_offset"].as_float() == offset
    assert node.attributes["scale_type"].as_int() == scale_type
    assert node.inputs[0].dtype == x_type


def test_add_plugin_nodes_follow_the_contract_too() -> None:
    lowered, _ = lower(residual_model(FLOAT16, ONE_PLUS), "plugin")
    (node,) = plugin_nodes(lowered)
    assert node.op_type == contract.ADD_RMS_NORM
    assert sorted(node.attributes) == sorted(contract.ATTRIBUTES)
    assert [value.name for value in node.inputs[:2]] == ["x", "residual"]
    assert [value.name for value in node.outputs] == ["y", "sum"]
    assert len(node.inputs) == len(contract.INPUTS[contract.ADD_RMS_NORM])


@pytest.mark.parametrize("add", [False, True])
def test_the_file_has_the_function_at_top_level_and_loads_in_plain_onnxruntime(add: bool, tmp_path: Path) -> None:
    model = residual_model(FLOAT32) if add else case("llama", torch.float32).model
    lowered, _ = lower(model, "plugin")
    path = tmp_path / "model.onnx"
    ir.save(lowered, path)
    loaded = ir.load(path)
    op_type = contract.ADD_RMS_NORM if add else contract.RMS_NORM
    assert list(loaded.functions) == [(contract.DOMAIN, op_type, "")]
    (function,) = loaded.functions.values()
    assert [value.name for value in function.inputs] == list(contract.INPUTS[op_type])
    assert len(function.outputs) == len(contract.OUTPUTS[op_type])
    assert sorted(function.attributes) == sorted(contract.ATTRIBUTES)
    assert [node.name for node in function] == [
        f"rmsnorm_deploy::{op_type}/{node.outputs[0].name}" for node in function
    ]
    assert function.opset_imports == {"": loaded.graph.opset_imports[""]}
    assert loaded.graph.opset_imports[contract.DOMAIN] == contract.DOMAIN_VERSION
    assert CAPTURE_DOMAIN not in loaded.graph.opset_imports
    assert len(plugin_nodes(loaded)) == 1
    onnx.checker.check_model(path, full_check=True)
    feeds = residual_feeds() if add else case("llama", torch.float32).feeds
    assert all(np.array_equal(a, b) for a, b in zip(run(loaded, feeds), run(lowered, feeds), strict=True))


def test_the_function_alone_computes_the_contracts_formula() -> None:
    """Every attribute does what the contract says, in float16, against the formula in NumPy."""
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(8)).half()
    scale = torch.linspace(-1, 1, 64).half()
    lowered, _ = lower(case("llama", torch.float16).model, "plugin")
    (function,) = lowered.functions.values()
    for eps in (1e-6, 0.25):
        for offset in (0.0, 1.0):
            maker = GraphMaker(FLOAT16)
            value = maker.input("x", ("rows", 64))
            attributes = {"epsilon": eps, "scale_offset": offset, "scale_type": int(FLOAT32),
                          **contract.PARSER_ATTRIBUTES}  # fmt: skip
            weight = maker.initializer("scale", scale)
            y = maker.node(contract.RMS_NORM, [value, weight], "y", ("rows", 64), attributes, domain=contract.DOMAIN)
            model = maker.model([y])
            model.graph.opset_imports[contract.DOMAIN] = contract.DOMAIN_VERSION
            del model.graph.opset_imports[CAPTURE_DOMAIN]
            model.functions[function.identifier()] = function
            (result,) = run(model, {"x": x})
            wide = x.double().numpy()
            reference = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * (scale.double().numpy() + offset)
            assert errors(result, reference, torch.float16).max() <= 0.51


def test_functions_are_only_those_that_are_used() -> None:
    assert [key[1] for key in lower(case("llama", torch.float32).model, "plugin")[0].functions] == ["RMSNorm"]
    assert [key[1] for key in lower(residual_model(FLOAT32), "plugin")[0].functions] == ["AddRMSNorm"]
    for target in ("primitives", "standard", "ort"):
        assert dict(lower(residual_model(FLOAT32), target)[0].functions) == {}
