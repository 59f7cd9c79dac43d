"""Which layer runs a norm: read from the builder's log and from the inspector's JSON, and chosen."""

from __future__ import annotations

import json

import pytest

from rmsnorm_deploy.runtime.tensorrt.layers import (
    Layer,
    NormDtypes,
    layers_of_inspector,
    layers_of_log,
    nodes_of,
    norm_layers,
)
from rmsnorm_deploy.runtime.tensorrt.network import FileNorm

# From logs of TensorRT-RTX 1.7.1.116: a Llama in float16, as `plugin` (the first five) and as `standard`.
_TENSOR = "Dimensions: [-1,-1,32], Strides: [-1,32,1], StrideOrder: [2,1,0]"
_FORMAT = "Format: (Linear) Row major linear format"
LOG = f"""Layers:
Name: __mye13012_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: 
Name: __myl_CastGath_myl0_1, LayerType: kgen, Inputs: [ {{ Name: input_ids, Dimensions: [-1,-1], Strides: [-1,1], StrideOrder: [1,0], Datatype: Int64, {_FORMAT} }}], Constants: [ {{ Name: model.embed_tokens.weight_constantHalf_myl0, Dimensions: [97,32], Strides: [32,1], StrideOrder: [1,0], Datatype: Half, {_FORMAT} }}], Outputs: [ {{ Name: _symbolic_1.1_76_myl0, {_TENSOR}, Datatype: Half, {_FORMAT} }}], TacticName: __myl_CastGath_0x67314e8ba1f50e498d7ef8b53259e2e5, StreamId: 0, Metadata: [ONNX Layer: node_embedding]
Name: model.layers.0.input_layernorm/RMSNorm_myl0_2, LayerType: custom_layer, Inputs: [ {{ Name: _symbolic_1.1_76_myl0, {_TENSOR}, Datatype: Half, {_FORMAT} }}], Constants: [ {{ Name: model.layers.0.input_layernorm.weight_constantHalf_myl0, Dimensions: [32], Strides: [1], StrideOrder: [0], Datatype: Half, {_FORMAT} }}], Outputs: [ {{ Name: _symbolic.1_myl0, {_TENSOR}, Datatype: Half, {_FORMAT} }}], TacticName: , StreamId: 0, Metadata: [ONNX Layer: model.layers.0.input_layernorm/RMSNorm]
Name: node_linear_2+node_linear_1+node_linear_myl0_3, LayerType: gemm, Inputs: [ {{ Name: _symbolic.1_myl0, Dimensions: [-1,32], Strides: [32,1], StrideOrder: [1,0], Datatype: Half, {_FORMAT} }}, {{ Name: bias, Dimensions: [32], Strides: [1], StrideOrder: [0], Datatype: Float, {_FORMAT} }}, {{ Name: again, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Half, {_FORMAT} }}], Constants: [], Outputs: [], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: node_linear_2] [ONNX Layer: node_linear_1] [ONNX Layer: node_linear]
Name: __myl_CastMulMeanAddSqrtDivMulCastMul_myl0_4, LayerType: kgen, Inputs: [ {{ Name: s, {_TENSOR}, Datatype: BFloat16, {_FORMAT} }}], Constants: [], Outputs: [], TacticName: __myl_Cast_0x1, StreamId: 0, Metadata: [ONNX Layer: node_of_x32 | model.norm/RMSNorm (RMSNorm)] [ONNX Layer: node_of_scaled | model.norm/RMSNorm (RMSNorm)]
a line that is none
Name: __myl_CastGath_myl0_1, LayerType: kgen, Inputs: [ {{ Name: input_ids, Dimensions: [-1,-1], Strides: [-1,1], StrideOrder: [1,0], Datatype: Int64, {_FORMAT} }}], Constants: [], Outputs: [], TacticName: other_profile, StreamId: 0, Metadata: [ONNX Layer: node_embedding]
"""  # noqa: E501, W291

# As NVIDIA documents the inspector (Developer Guide, "Engine Inspector"), with detailed verbosity.
INSPECTOR = json.dumps({
    "Layers": [
        {
            "Name": "node_conv + node_relu", "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "data", "Location": "Device", "Dimensions": [16, 3, 224, 224],
                        "Format/Datatype": "Thirty-two wide channel vectorized row major FP16 format"}],
            "Outputs": [{"Name": "out", "Dimensions": [16, 8], "Format/Datatype": "Row major linear FP32"}],
            "ParameterType": "Convolution", "TacticName": "sm80_xmma_fprop", "TacticValue": "0x0", "StreamId": 0,
            "Metadata": "[ONNX Layer: node_conv]\u001e[ONNX Layer: node_relu]",
        },
        {
            "Name": "norm", "LayerType": "PluginV3",
            "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear BF16"},
                       {"Name": "scale", "Format/Datatype": "Row major linear FP32"}],
            "Outputs": [], "ParameterType": "PluginV3", "Metadata": "[ONNX Layer: norm]",
        },
        {"Name": "bare", "LayerType": "NoOp"},
        "only a name",
    ],
    "Bindings": ["data", "out"],
})  # fmt: skip


def test_the_log_names_every_layer_once() -> None:
    found = layers_of_log(LOG)
    assert [(layer.name, layer.kind, layer.dtypes) for layer in found] == [
        ("__mye13012_0_myl0_0", "shape_call", ()),
        ("__myl_CastGath_myl0_1", "kgen", ("int64",)),
        ("model.layers.0.input_layernorm/RMSNorm_myl0_2", "custom_layer", ("float16",)),
        ("node_linear_2+node_linear_1+node_linear_myl0_3", "gemm", ("float16", "float32")),
        ("__myl_CastMulMeanAddSqrtDivMulCastMul_myl0_4", "kgen", ("bfloat16",)),
    ]
    assert [layer.is_plugin for layer in found] == [False, False, True, False, False]
    assert found[1].tactic == "__myl_CastGath_0x67314e8ba1f50e498d7ef8b53259e2e5"  # the first profile's
    assert [sorted(layer.nodes) for layer in found] == [
        [], ["node_embedding"], ["model.layers.0.input_layernorm/RMSNorm"],
        ["node_linear", "node_linear_1", "node_linear_2"],
        ["model.norm/RMSNorm", "node_of_scaled", "node_of_x32"],
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "Layers:\n", "something else\nName: x, LayerType: y\n"])
def test_a_log_without_layers(text: str) -> None:
    assert layers_of_log(text) == []


def test_the_inspector_names_every_layer() -> None:
    conv, plugin, bare, name = layers_of_inspector(INSPECTOR)
    nodes = frozenset({"node_conv", "node_relu"})
    assert conv == Layer("node_conv + node_relu", "CaskConvolution", ("float16",), "sm80_xmma_fprop", nodes)
    assert plugin == Layer("norm", "PluginV3", ("bfloat16", "float32"), "", frozenset({"norm"}))
    assert [layer.is_plugin for layer in (conv, plugin, bare, name)] == [False, True, False, False]
    assert (bare, name) == (
        Layer("bare", "NoOp", (), "", frozenset()), Layer("only a name", "", (), "", frozenset())
    )  # fmt: skip
    assert layers_of_inspector("{}") == []


@pytest.mark.parametrize(("metadata", "nodes"), [
    ("", set()),
    ("[ONNX Layer: /model/norm/Mul]", {"/model/norm/Mul"}),
    ("[ONNX Layer: a] [ONNX Layer: b]\u001e[ONNX Layer: a]", {"a", "b"}),
    ("[ONNX Layer: node_of_x | layers.0/norm (RMSNorm)]", {"node_of_x", "layers.0/norm"}),
    ("[ONNX Layer: node_of_x | inner (Norm) | outer (Block)]", {"node_of_x", "inner", "outer"}),
    ("[ONNX Layer: a (with brackets) of its own]", {"a (with brackets) of its own"}),
    ("[TF Layer: a]", set()),
])  # fmt: skip
def test_metadata_names_nodes(metadata: str, nodes: set[str]) -> None:
    assert nodes_of(metadata) == nodes


def norm(*nodes: str, plugin: bool = False, path: str = "norm") -> FileNorm:
    return FileNorm(path, "plain", nodes[-1], frozenset(nodes), plugin)


def layer(name: str, *nodes: str, kind: str = "kgen") -> Layer:
    return Layer(name, kind, (), "", frozenset(nodes))


@pytest.mark.parametrize(("layers", "chosen", "others"), [
    ([], None, 0),
    ([layer("elsewhere", "z")], None, 0),
    ([layer("__myl_Mul_0", "d"), layer("__myl_CastMulMeanAddSqrt_1", "a")], "__myl_CastMulMeanAddSqrt_1", 1),
    ([layer("__myl_Add_0", "a", "b"), layer("__myl_Mul_1", "c")], "__myl_Add_0", 1),
    ([layer("__myl_MeanAddSqrt_0", "a", "b", "c"), layer("plug", "d", kind="custom_layer")], "plug", 1),
    ([layer("__myl_ReduceSum_0", "a"), layer("__myl_Mul_1", "b", "c", "d")], "__myl_ReduceSum_0", 1),
])  # fmt: skip
def test_the_layer_of_the_statistics_runs_a_norm(layers: list[Layer], chosen: str | None, others: int) -> None:
    (row,) = norm_layers([norm("a", "b", "c", "d")], layers, {})
    assert (row.layer, row.others, row.plugin) == (chosen, others, False)
    assert (row.precision, row.statistics) == (None, None)


@pytest.mark.parametrize(("kind", "ours", "plugin"), [
    ("custom_layer", True, True), ("PluginV3", True, True), ("kgen", True, False), ("custom_layer", False, False),
])  # fmt: skip
def test_only_a_plugin_layer_of_a_plugin_node_is_our_plugin(kind: str, ours: bool, plugin: bool) -> None:
    (row,) = norm_layers([norm("a", plugin=ours)], [layer("x", "a", kind=kind)], {})
    assert (row.plugin, row.kind) == (plugin, kind)


def test_rows_stand_in_the_norms_order_with_their_dtypes() -> None:
    norms = [norm("b", path="second"), norm("a", path="first", plugin=True)]
    layers = [layer("fused", "a", "b", kind="custom_layer")]
    rows = norm_layers(norms, layers, {"first": NormDtypes("float16", "float32")})
    assert [row.to_dict() for row in rows] == [
        {"path": "second", "form": "plain", "layer": "fused", "kind": "custom_layer", "plugin": False,
         "precision": None, "statistics": None, "others": 0},
        {"path": "first", "form": "plain", "layer": "fused", "kind": "custom_layer", "plugin": True,
         "precision": "float16", "statistics": "float32", "others": 0},
    ]  # fmt: skip
