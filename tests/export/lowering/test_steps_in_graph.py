"""What a lowered graph looks like: its operators, dtypes, names, metadata, and what ONNX Runtime fuses of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from rmsnorm_deploy.export.from_torch.lower import lower
from rmsnorm_deploy.export.graph.captured_nodes import CAPTURE_DOMAIN
from rmsnorm_deploy.export.graph.metadata import FORM_KEY, PATH_KEY, SPEC_KEY, TARGET_KEY
from rmsnorm_deploy.export.lowering.table import TARGETS, cell
from rmsnorm_deploy.models.errors import UnsupportedError, UsageError
from rmsnorm_deploy.models.reference import reference
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.plugins import contract
from tests.helpers.graphs.capture_graph import DATA_TYPES, GraphMaker, errors, norm_model, op_counts, run, tensor
from tests.helpers.norms.norm_cases import (
    BFLOAT16,
    CASES,
    FLOAT16,
    FLOAT32,
    FLOAT32_ULP,
    Case,
    case,
    main_node,
    plugin_nodes,
    residual_model,
)
from tests.helpers.norms.norm_zoo import BARE, CAST_FIRST, ONE_PLUS, TORCH, ZOO

FUSED = ("SimplifiedLayerNormalization", "RMSNormalization")
PIECES = {"Pow", "ReduceMean", "ReduceSum", "Sqrt", "Div"}


# One fused kernel -----------------------------------------------------------------------------------------------------

# ONNX Runtime's fusion requires a mean over the last dim, an added eps and a constant weight of one dim.
UNFUSED = {"torch_two_dims", "torch_two_dims_no_affine", "torch_three_dims", "torch_eps_0", "l2", "l2_weighted"}
FUSED_BY_THE_PLUGIN = UNFUSED - {"torch_eps_0"}


@pytest.mark.parametrize("name", ZOO)
def test_a_float32_norm_becomes_one_fused_kernel(name: str, tmp_path: Path) -> None:
    it = case(name, torch.float32)
    for target in ("primitives", "plugin"):
        path = tmp_path / f"{target}.onnx"
        run(lower(it.model, target)[0], it.feeds, str(path))
        counts = op_counts(ir.load(path))
        fused = name not in UNFUSED or (target == "plugin" and name in FUSED_BY_THE_PLUGIN)
        assert counts.get("SimplifiedLayerNormalization", 0) == int(fused), (target, counts)
        assert bool(PIECES & set(counts)) is not fused
        assert not any(name.startswith(contract.DOMAIN) for name in counts)  # the function was inlined


@pytest.mark.parametrize("target", TARGETS)
def test_many_norms_become_as_many_fused_kernels(target: str, tmp_path: Path) -> None:
    maker = GraphMaker(FLOAT32)
    dims = ("batch", "sequence", 64)
    h = maker.input("x", dims)
    for layer in range(4):
        weight = maker.initializer(f"weight.{layer}", torch.rand(64) + 0.5)
        y = maker.norm(CAST_FIRST, [h, weight], f"y{layer}", dims, path=f"layers.{layer}.norm")
        h = maker.node("Add", [h, y], f"h{layer}", dims)
    lowered, sites = lower(maker.model([h]), target)
    path = tmp_path / "optimized.onnx"
    run(lowered, {"x": torch.randn(2, 3, 64)}, str(path))
    counts = op_counts(ir.load(path))
    fused = sum(counts.get(name, 0) for name in (*FUSED, "com.microsoft::SkipSimplifiedLayerNormalization"))
    assert fused == 4
    assert not PIECES & set(counts)
    made = [v for name, v in lowered.graph.initializers.items() if name.startswith("rmsnorm_deploy.")]
    assert len({(v.dtype, v.const_value.numpy().tobytes()) for v in made}) == len(made) <= 3  # shared by all four
    assert [site.path for site in sites] == [f"layers.{layer}.norm" for layer in range(4)]
    assert [site.form for site in sites] == ["plain", "residual_add", "residual_add", "residual_add"]


MAIN_OPERATOR = {
    "primitives": "Div",
    "standard": "RMSNormalization",
    "ort": "SimplifiedLayerNormalization",
    "plugin": "rmsnorm_deploy::RMSNorm",
}


@pytest.mark.parametrize(("name", "target"), CASES)
def test_the_operators_are_those_of_the_table(name: str, target: str) -> None:
    spec = ZOO[name].spec
    for dtype in (torch.float32, torch.float16):
        lowered, (site,) = lower(case(name, dtype).model, target)
        counts = op_counts(lowered)
        if target == "primitives":
            reduce = "ReduceSum" if spec.reduction == "sum" else "ReduceMean"
            assert {"Pow": 1, reduce: 1, "Sqrt": 1, "Div": 1}.items() <= counts.items()
        else:
            assert counts[MAIN_OPERATOR[target]] == 1
            assert not PIECES & set(counts)
            assert MAIN_OPERATOR[target] in cell(target, "plain").emits
        assert f"{CAPTURE_DOMAIN}::Norm" not in counts
        assert CAPTURE_DOMAIN not in lowered.graph.opset_imports
        node = main_node(lowered, site)
        if target != "primitives":
            assert node.op_type == MAIN_OPERATOR[target].split("::")[-1]


# Structure: dtypes, bfloat16 too --------------------------------------------------------------------------------------

SAME_TYPED = {
    "Add", "Mul", "Div", "Pow", "RMSNormalization", "SimplifiedLayerNormalization", "RMSNorm", "AddRMSNorm", "Sqrt",
    "Sigmoid",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "target", "dtype"),
    [
        (name, target, dtype) for name, target in CASES for dtype in DATA_TYPES
        if dtype != torch.float64 or (target != "plugin" and ZOO[name].float64 != "refused")
    ],
)  # fmt: skip
def test_every_node_has_inputs_of_one_dtype_and_the_graph_checks(name: str, target: str, dtype: torch.dtype) -> None:
    norm = ZOO[name]
    wanted = norm.build(dtype)(*[torch.ones(1, 1, *norm.tail, dtype=dtype)] * (2 if norm.gated else 1)).dtype
    lowered, _ = lower(case(name, dtype).model, target)
    for node in lowered.graph:
        if node.op_type in SAME_TYPED:
            assert len({value.dtype for value in node.inputs if value is not None}) == 1, node
        if node.op_type in ("RMSNormalization", "SimplifiedLayerNormalization"):
            stash = node.attributes["stash_type"].as_int()
            assert stash == (ir.DataType.DOUBLE if node.inputs[0].dtype == ir.DataType.DOUBLE else FLOAT32)
    if target == "primitives":  # statistics are never in a half type
        (root,) = [node for node in lowered.graph if node.op_type == "Sqrt"]
        assert root.outputs[0].dtype in (FLOAT32, ir.DataType.DOUBLE)
    stated = {value.name: value.dtype for node in lowered.graph for value in node.outputs}
    proto = ir.to_proto(lowered)
    if target == "ort":
        output = lowered.graph.outputs[0].dtype
    else:  # onnx does not know ONNX Runtime's own operator
        onnx.checker.check_model(proto, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
        for value in (*inferred.graph.value_info, *inferred.graph.output):
            assert stated.get(value.name) in (None, value.type.tensor_type.elem_type)
        output = ir.DataType(inferred.graph.output[0].type.tensor_type.elem_type)
    declared = case(name, dtype).model.graph.outputs[0].dtype
    assert output in (declared, DATA_TYPES[wanted])


def test_bfloat16_constants_hold_the_weights_bits() -> None:
    it = Case("llama", torch.bfloat16)
    lowered, _ = lower(it.model, "standard")
    (weight,) = [v for v in lowered.graph.initializers.values() if v.shape == ir.Shape((64,))]
    assert weight.dtype == BFLOAT16
    assert weight.const_value.numpy().view(np.uint16).tobytes() == it.weight.view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_plus_weight_is_added_in_float32_and_not_in_a_half_type(dtype: torch.dtype) -> None:
    it = Case("gemma2", dtype)
    for target in TARGETS:
        lowered, _ = lower(it.model, target)
        (scale,) = [value for value in lowered.graph.initializers.values() if value.shape == ir.Shape((64,))]
        held = scale.const_value.numpy().astype(np.float64)
        if target == "plugin":  # the kernel adds, also in float32
            (node,) = plugin_nodes(lowered)
            assert node.attributes["scale_offset"].as_float() == 1.0
            assert node.attributes["scale_type"].as_int() == FLOAT32
            held = held + 1
        else:
            assert scale.dtype == FLOAT32
        assert np.array_equal(held, it.weight.double().numpy() + 1)


# The captured graph and the file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_lowering_leaves_the_captured_graph_as_it_was(target: str) -> None:
    model = residual_model(FLOAT32)
    before = ir.to_proto(model).SerializeToString()
    first = ir.to_proto(lower(model, target)[0]).SerializeToString()
    assert ir.to_proto(model).SerializeToString() == before
    assert ir.to_proto(lower(model, target)[0]).SerializeToString() == first


@pytest.mark.parametrize("target", TARGETS)
def test_metadata_names_module_spec_target_and_form_after_saving(target: str, tmp_path: Path) -> None:
    maker = GraphMaker(FLOAT16)
    dims = ("batch", "sequence", 64)
    x = maker.input("x", dims)
    weight = maker.initializer("weight", torch.ones(64).half())
    notes = {
        "pkg.torch.onnx.name_scopes": "kept", "pkg.torch.onnx.stack_trace": "/home/someone",
        "pkg.torch.onnx.fx_node": "code",
    }  # fmt: skip
    y = maker.norm(ONE_PLUS, [x, weight], "y", dims, path="model.norm", metadata=notes)
    z = maker.node("Neg", [y], "z", dims, metadata=notes)
    lowered, (site,) = lower(maker.model([z]), target)
    ir.save(lowered, tmp_path / "model.onnx")
    nodes = list(ir.load(tmp_path / "model.onnx").graph)
    norms = [node for node in nodes if node.op_type != "Neg"]
    assert norms
    for node in norms:
        assert node.metadata_props[PATH_KEY] == "model.norm"
        assert node.metadata_props[TARGET_KEY] == target
        assert node.metadata_props[FORM_KEY] == "plain"
        assert node.name.startswith("model.norm/")
    for node in nodes:
        assert node.metadata_props["pkg.torch.onnx.name_scopes"] == "kept"
        assert "/home/someone" not in str(node.metadata_props.values())
    (core,) = [node for node in norms if SPEC_KEY in node.metadata_props]
    assert NormSpec.from_json(core.metadata_props[SPEC_KEY]) == ONE_PLUS
    assert core.name == site.node
    assert [value.name for value in lowered.graph.outputs] == ["z"]


@pytest.mark.parametrize("target", TARGETS)
def test_names_of_inputs_and_outputs_stay(target: str) -> None:
    lowered, _ = lower(norm_model(ZOO["mamba2"], ZOO["mamba2"].build(), torch.float32), target)
    assert [value.name for value in lowered.graph.inputs] == ["x", "gate"]
    assert [value.name for value in lowered.graph.outputs] == ["y"]
    assert lowered.graph.outputs[0].shape == ir.Shape(("batch", "sequence", 64))


@pytest.mark.parametrize("target", TARGETS)
def test_a_graph_without_norms_stays_as_it_is(target: str) -> None:
    maker = GraphMaker(FLOAT32)
    y = maker.node("Relu", [maker.input("x", ("n", 4))], "y", ("n", 4))
    lowered, sites = lower(maker.model([y]), target)
    assert sites == []
    assert op_counts(lowered) == {"Relu": 1}
    assert dict(lowered.functions) == {}
    assert run(lowered, {"x": torch.tensor([[-1.0, 0.0, 1.0, 2.0]])})[0].tolist() == [[0.0, 0.0, 1.0, 2.0]]


@pytest.mark.parametrize("target", TARGETS)
def test_weights_that_nothing_reads_any_more_are_left_out(target: str) -> None:
    lowered, _ = lower(case("gemma2", torch.float16).model, target)
    used = {value.name for node in lowered.graph for value in node.inputs if value is not None}
    assert set(lowered.graph.initializers) <= used


@pytest.mark.parametrize("target", TARGETS)
def test_a_norm_called_twice_gives_a_file_that_loads(target: str) -> None:
    maker = GraphMaker(FLOAT32)
    dims = ("batch", 64)
    weight = maker.initializer("weight", torch.rand(64))
    a, b = maker.input("a", dims), maker.input("b", dims)
    outputs = [maker.norm(TORCH, [value, weight], f"y_{value.name}", dims, path="norm") for value in (a, b)]
    lowered, sites = lower(maker.model(outputs), target)
    names = [node.name for node in lowered.graph]
    assert len(set(names)) == len(names)
    assert len({site.node for site in sites}) == 2
    feeds = {"a": torch.randn(2, 64), "b": torch.randn(2, 64)}
    for result, feed in zip(run(lowered, feeds), feeds.values(), strict=True):
        expected = reference(TORCH, feed.double().numpy(), weight.const_value.numpy())
        assert errors(result, expected, torch.float32).max() <= FLOAT32_ULP


def test_an_unknown_target_is_an_error() -> None:
    with pytest.raises(UsageError, match="target: expected one of primitives, standard, ort, plugin, got 'tflite'"):
        lower(case("llama", torch.float32).model, "tflite")


def test_an_input_without_a_dtype_is_an_error() -> None:
    model = norm_model(ZOO["llama"], ZOO["llama"].build(), torch.float32)
    model.graph.inputs[0].type = None
    with pytest.raises(ValueError, match="expected an input with a known dtype"):
        lower(model, "primitives")


@pytest.mark.parametrize("spec", [BARE, BARE.replace(reduction="sum")])
def test_a_dynamic_width_without_a_weight_is_for_primitives_only(spec: NormSpec) -> None:
    maker = GraphMaker(FLOAT32)
    dims = ("batch", "width")
    model = maker.model([maker.norm(spec, [maker.input("x", dims)], "y", dims)])
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    (result,) = run(lower(model, "primitives")[0], {"x": x})
    assert errors(result, reference(spec, x.numpy()), torch.float32).max() <= FLOAT32_ULP
    for target in ("standard", "ort", "plugin"):
        with pytest.raises(UnsupportedError, match=r"(normalizes are dynamic|dynamic width).*--target primitives"):
            lower(model, target)


# Inside a branch ------------------------------------------------------------------------------------------------------


def branch_model() -> ir.Model:
    """A norm that stands in one branch of an If, on an outer residual add."""
    maker = GraphMaker(FLOAT32)
    dims = ("batch", 64)
    x, flag = maker.input("x", dims), maker.input("flag", (), ir.DataType.BOOL)
    weight = maker.initializer("weight", torch.linspace(0.5, 1.5, 64))
    inner = GraphMaker(FLOAT32)
    y = inner.norm(CAST_FIRST, [x, weight], "inner_y", dims, path="branch.norm")
    other = GraphMaker(FLOAT32)
    same = other.node("Identity", [x], "inner_x", dims)
    z = maker.node("If", [flag], "z", dims, {
        "then_branch": ir.Graph([], [y], nodes=inner.nodes, name="then"),
        "else_branch": ir.Graph([], [same], nodes=other.nodes, name="else"),
    })  # fmt: skip
    return maker.model([z])


@pytest.mark.parametrize("target", ["primitives", "standard", "ort"])
def test_a_norm_inside_a_branch_is_lowered_there(target: str) -> None:
    lowered, (site,) = lower(branch_model(), target)
    assert site.path == "branch.norm"
    assert op_counts(lowered) == {"If": 1}
    x = torch.randn(3, 64)
    (result,) = run(lowered, {"x": x, "flag": torch.tensor(True)})
    expected = reference(CAST_FIRST, x.numpy(), np.linspace(0.5, 1.5, 64, dtype=np.float32))
    assert errors(result, expected, torch.float32).max() <= FLOAT32_ULP
    (untouched,) = run(lowered, {"x": x, "flag": torch.tensor(False)})
    assert untouched.tobytes() == x.numpy().tobytes()


def test_a_norm_inside_a_branch_is_refused_by_the_plugin_with_the_reason() -> None:
    with pytest.raises(
        UnsupportedError, match=r"main graph only.*control-flow subgraph.*Use --target primitives"
    ) as error:
        lower(branch_model(), "plugin")
    assert error.value.exit_code == 3


# The helper itself ----------------------------------------------------------------------------------------------------


def test_constants_of_the_test_graphs_hold_the_tensors_bits() -> None:
    for dtype in DATA_TYPES:
        value = torch.tensor([1.5, -2.25, 3.0], dtype=dtype)
        made = tensor(value, "value").numpy().astype(np.float64)
        assert made.tolist() == [1.5, -2.25, 3.0]
    assert tensor(nn.Parameter(torch.tensor(2.0)), "scalar").numpy() == 2.0
