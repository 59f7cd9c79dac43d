"""Raising the opset import: only where no operator changes its meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper

from rmsnorm_deploy.export.from_torch.lower import lower
from rmsnorm_deploy.export.onnx_io.raise_opset import CONVERTED, MEANING_CHANGED, raise_opset
from rmsnorm_deploy.models.errors import UnsupportedError
from tests.helpers.graphs.capture_graph import GraphMaker, norm_model, op_counts, run
from tests.helpers.norms.norm_zoo import ZOO

FLOAT = ir.DataType.FLOAT


def model_of(
    op_type: str, attributes: Mapping[str, Any] | None = None, *, inputs: int = 1, opset: int = 20, domain: str = ""
) -> ir.Model:
    """One node, `inputs` inputs of `[2, 4, 8, 8]`."""
    maker = GraphMaker(FLOAT)
    dims = (2, 4, 8, 8)
    values = [maker.input(f"x{i}", dims) for i in range(inputs)]
    return maker.model([maker.node(op_type, values, "y", dims, attributes, domain=domain)], opset)


@pytest.mark.parametrize(("current", "wanted"), [(18, 18), (18, 20), (20, 23), (18, 23), (22, 23)])
def test_plain_operators_are_raised(current: int, wanted: int) -> None:
    model = model_of("Relu", opset=current)
    raise_opset(model, wanted)
    assert model.graph.opset_imports[""] == wanted
    assert op_counts(model) == {"Relu": 1}


@pytest.mark.parametrize(("current", "wanted"), [(20, 18), (23, 22), (21, 20)])
def test_an_opset_is_never_lowered(current: int, wanted: int) -> None:
    model = model_of("Relu", opset=current)
    with pytest.raises(
        UnsupportedError, match=f"the graph has opset {current}, which cannot be lowered to {wanted}"
    ) as error:
        raise_opset(model, wanted)
    assert error.value.exit_code == 3
    assert model.graph.opset_imports[""] == current


UNCHANGED: dict[str, tuple[dict[str, Any], int]] = {
    "Cast": ({"to": ir.DataType.FLOAT16}, 1),  # newer versions know more dtypes
    "Softmax": ({"axis": -1}, 1),
    "Add": ({}, 2),
    "Conv": ({"kernel_shape": [1, 1]}, 2),
    "AveragePool": ({"kernel_shape": [2, 2]}, 1),
    "LayerNormalization": ({}, 2),
    "ReduceMean": ({"keepdims": 1}, 1),
    "Reshape": ({"allowzero": 0}, 2),
    "Transpose": ({}, 1),
    "Gelu": ({}, 1),
    "Pad": ({"mode": "constant"}, 2),
    "Resize": ({"mode": "nearest"}, 3),
    "QuantizeLinear": ({}, 2),
}


@pytest.mark.parametrize("op_type", UNCHANGED)
def test_an_operator_that_only_gained_is_raised(op_type: str) -> None:
    attributes, inputs = UNCHANGED[op_type]
    model = model_of(op_type, attributes, inputs=inputs)
    raise_opset(model, 23)
    assert model.graph.opset_imports[""] == 23


CHANGED: list[Any] = [
    # Its scale is per group up to opset 20 and per channel from 21 on.
    ("GroupNormalization", {"num_groups": 2}, 3, 20, 23),
    ("GroupNormalization", {"num_groups": 2}, 3, 20, 21),
    ("GroupNormalization", {"num_groups": 2}, 3, 18, 23),
    # The default mode was called bilinear, and is called linear from 20 on.
    ("GridSample", {}, 2, 18, 20),
    # An attribute became an input.
    ("DFT", {"axis": 2}, 1, 18, 20),
    # This value of it is unknown from 20 on.
    ("GridSample", {"mode": "bilinear"}, 2, 18, 20),
    # Without the attribute the axis was 1, without the input it is -2.
    ("DFT", {}, 1, 18, 20),
    # Windows that start in the padding at the end do not count from 22 on; their average is another one from 19 on.
    ("AveragePool", {"kernel_shape": [3, 3], "ceil_mode": 1}, 1, 18, 19),
    ("AveragePool", {"kernel_shape": [3, 3], "ceil_mode": 1}, 1, 19, 22),
    ("MaxPool", {"kernel_shape": [3, 3], "ceil_mode": 1}, 1, 18, 22),
    ("LpPool", {"kernel_shape": [3, 3], "ceil_mode": 1}, 1, 18, 22),
    # The odd element of padding changed its side.
    ("ConvTranspose", {"auto_pad": "SAME_UPPER"}, 2, 10, 18),
    ("ConvTranspose", {"output_shape": [9, 9]}, 2, 10, 18),
    # Coordinates: asymmetric until 10, half-pixel from 11 on; a mode is gone from 13 on.
    ("Upsample", {"mode": "nearest"}, 2, 9, 18),
    ("Resize", {"mode": "nearest"}, 2, 10, 18),
    ("Resize", {"coordinate_transformation_mode": "tf_half_pixel_for_nn"}, 3, 11, 18),
    ("RoiAlign", {}, 3, 10, 18),
    # Negative indices were off, and count from the end from 11 on.
    ("OneHot", {}, 3, 9, 18),
    # All dims from the axis on were taken together, and ONNX's converter does not know.
    ("Hardmax", {"axis": 1}, 1, 11, 18),
    ("Hardmax", {}, 1, 12, 18),
    # Training, said by the number of outputs, and attributes that are gone.
    ("BatchNormalization", {"spatial": 0}, 5, 7, 18),
    # Per step of the batch, and then with axes.
    ("Scan", {}, 2, 8, 18),
]  # fmt: skip


@pytest.mark.parametrize(("op_type", "attributes", "inputs", "current", "wanted"), CHANGED)
def test_an_operator_that_changes_its_meaning_is_refused(
    op_type: str, attributes: dict[str, Any], inputs: int, current: int, wanted: int
) -> None:
    model = model_of(op_type, attributes, inputs=inputs, opset=current)
    with pytest.raises(
        UnsupportedError, match=f"opset {current} cannot be raised to {wanted}: {op_type} would change meaning"
    ) as error:
        raise_opset(model, wanted)
    assert "primitives" in str(error.value)
    assert "'node_y'" in str(error.value)
    assert model.graph.opset_imports[""] == current


def test_group_normalization_is_raised_where_it_does_not_change() -> None:
    for current, wanted in ((18, 20), (21, 23)):
        model = model_of("GroupNormalization", {"num_groups": 2}, inputs=3, opset=current)
        raise_opset(model, wanted)
        assert model.graph.opset_imports[""] == wanted


def test_every_changing_operator_is_named_once() -> None:
    maker = GraphMaker(FLOAT)
    dims = (2, 4, 8, 8)
    x, scale, bias = maker.input("x", dims), maker.input("scale", (2,)), maker.input("bias", (2,))
    for i in range(2):
        x = maker.node("GroupNormalization", [x, scale, bias], f"g{i}", dims, {"num_groups": 2})
    x = maker.node("GridSample", [x, x], "s", dims)
    with pytest.raises(UnsupportedError, match="raised to 23: GridSample, GroupNormalization would change"):
        raise_opset(maker.model([x], 18), 23)


def test_operators_of_other_domains_and_unknown_ones_are_left_alone() -> None:
    for domain, op_type in (("com.microsoft", "GroupNormalization"), ("", "SimplifiedLayerNormalization")):
        model = model_of(op_type, domain=domain)
        raise_opset(model, 23)
        assert model.graph.opset_imports[""] == 23


def test_a_node_inside_a_branch_counts() -> None:
    inner = GraphMaker(FLOAT)
    maker = GraphMaker(FLOAT)
    dims = (2, 4, 8, 8)
    x, flag = maker.input("x", dims), maker.input("flag", (), ir.DataType.BOOL)
    scale = maker.input("scale", (2,))
    y = inner.node("GroupNormalization", [x, scale, scale], "inner", dims, {"num_groups": 2})
    branches = {
        name: ir.Graph([], [value], nodes=nodes, name=name)
        for name, value, nodes in (
            ("then_branch", y, inner.nodes),
            ("else_branch", *_identity(x, dims)),
        )
    }
    model = maker.model([maker.node("If", [flag], "z", dims, branches)])
    with pytest.raises(UnsupportedError, match="GroupNormalization would change"):
        raise_opset(model, 23)


def _identity(x: ir.Value, dims: tuple[int, ...]) -> tuple[ir.Value, list[ir.Node]]:
    inner = GraphMaker(FLOAT)
    return inner.node("Identity", [x], "same", dims), inner.nodes


@pytest.mark.parametrize("opset", range(18, 24))
@pytest.mark.parametrize("target", ["primitives", "standard", "ort", "plugin"])
def test_a_norm_gives_the_same_numbers_at_every_opset(target: str, opset: int) -> None:
    norm = ZOO["olmo2"]
    module = norm.build()
    model = norm_model(norm, module, torch.float32)
    model.graph.opset_imports[""] = 18
    if target == "standard" and opset < 23:
        with pytest.raises(UnsupportedError, match="requires opset 23"):
            lower(model, target, opset)
        return
    lowered, _ = lower(model, target, opset)
    assert lowered.graph.opset_imports[""] == opset
    assert all(function.opset_imports[""] == opset for function in lowered.functions.values())
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    (result,) = run(lowered, {"x": x})
    with torch.no_grad():
        np.testing.assert_allclose(result, module(x).numpy(), rtol=1e-6, atol=1e-7)


def test_lowering_refuses_an_opset_below_that_of_the_capture() -> None:
    model = norm_model(ZOO["olmo2"], ZOO["olmo2"].build(), torch.float32)
    with pytest.raises(UnsupportedError, match="the graph has opset 20, which cannot be lowered to 18"):
        lower(model, "primitives", 18)


def test_the_standard_target_refuses_a_graph_that_opset_23_would_change() -> None:
    model = model_of("GroupNormalization", {"num_groups": 2}, inputs=3)
    with pytest.raises(UnsupportedError, match=r"GroupNormalization would change meaning.*such as primitives"):
        lower(model, "standard")
    assert op_counts(lower(model, "primitives")[0]) == {"GroupNormalization": 1}


RNG = np.random.default_rng(0)
Arrays = Sequence[NDArray[Any]]


def normal(*shape: int, dtype: str = "float32") -> NDArray[Any]:
    return RNG.standard_normal(shape).astype(dtype)


def whole(*values: int) -> NDArray[Any]:
    return np.array(values, np.int64)


X = normal(2, 3, 4)
IMAGE = normal(1, 2, 6, 7)
STATISTICS = [IMAGE, normal(2), normal(2), normal(2), np.abs(normal(2))]
PADS = {"pads": [0, 1, 2, 0, 1, 1]}
# Operator, opset, attributes, inputs, number of outputs.
Case = tuple[str, int, dict[str, Any], Arrays, int]
CONVERSIONS: list[Case] = [
    *((f"Reduce{name}", opset, attributes, [np.abs(X) + 0.1], 1)
      for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
      for opset, attributes in ((7, {"axes": [0, 2], "keepdims": 0}), (11, {"axes": [-1]}))),
    ("ReduceMean", 13, {"axes": [1]}, [X.astype(np.float16)], 1),
    ("Squeeze", 7, {"axes": [1]}, [normal(2, 1, 4, 1)], 1),
    ("Squeeze", 11, {"axes": [-1, 1]}, [normal(2, 1, 4, 1)], 1),
    ("Unsqueeze", 11, {"axes": [0, 2]}, [X], 1),
    ("Split", 7, {"axis": 2}, [X], 2),
    ("Split", 11, {"axis": 2, "split": [1, 3]}, [X], 2),
    ("Split", 13, {"axis": 2}, [X], 2),
    *((name, opset, attributes, [X], 1)
      for name in ("Softmax", "LogSoftmax") for opset in (7, 12) for attributes in ({}, {"axis": 0}, {"axis": 1})),
    ("Softmax", 7, {}, [normal(3, 5)], 1),
    ("Clip", 7, {"min": -0.5, "max": 0.5}, [X], 1),
    ("Clip", 7, {"max": 0.5}, [X], 1),
    ("Dropout", 7, {"ratio": 0.3}, [X], 1),
    ("Dropout", 10, {"ratio": 0.3}, [X.astype(np.float16)], 1),
    ("Pad", 7, {**PADS, "value": 2.0}, [X], 1),
    ("Pad", 7, {**PADS, "mode": "reflect"}, [X], 1),
    ("TopK", 7, {"k": 2, "axis": 1}, [X], 2),
    ("Slice", 7, {"starts": [0, 1], "ends": [1, 3], "axes": [0, 2]}, [X], 1),
    ("Slice", 7, {"starts": [0, -2], "ends": [1, 9999]}, [X], 1),
    ("BatchNormalization", 7, {"epsilon": 0.1}, STATISTICS, 1),
    ("BatchNormalization", 7, {"spatial": 1}, STATISTICS, 1),
    ("BatchNormalization", 9, {}, STATISTICS, 1),
    ("Scatter", 9, {"axis": 1}, [normal(3, 3), np.array([[1, 0, 2]]), normal(1, 3)], 1),
]  # fmt: skip
SAME: list[Case] = [
    ("Softmax", 7, {"axis": 2}, [X], 1),
    ("Softmax", 12, {"axis": -1}, [X], 1),
    ("Hardmax", 11, {"axis": -1}, [X], 1),
    ("ReduceMean", 7, {}, [X], 1),
    ("Squeeze", 7, {}, [normal(2, 1, 4, 1)], 1),
    ("Clip", 11, {}, [X, np.float32(-0.5), np.float32(0.5)], 1),
    ("Pad", 11, {}, [X, whole(0, 1, 2, 0, 1, 1)], 1),
    ("Slice", 10, {}, [X, whole(0), whole(2), whole(1)], 1),
    ("TopK", 10, {}, [X, whole(2)], 2),
    ("Split", 13, {"axis": 2}, [X, whole(1, 3)], 2),
    ("MaxPool", 7, {"kernel_shape": [3, 2], "strides": [2, 3], "auto_pad": "SAME_LOWER"}, [IMAGE], 1),
    ("LpPool", 7, {"kernel_shape": [3, 2], "auto_pad": "VALID"}, [IMAGE], 1),
    ("Conv", 7, {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, [IMAGE, normal(3, 2, 3, 3)], 1),
    ("ConvTranspose", 7, {"pads": [1, 1, 1, 1], "strides": [2, 2]}, [IMAGE, normal(2, 3, 3, 3)], 1),
    *(("Resize", 11, {"mode": mode, "coordinate_transformation_mode": coordinates},
       [IMAGE, np.empty(0, np.float32), np.array([1, 1, 1.7, 0.6], np.float32)], 1)
      for mode, coordinates in (("nearest", "asymmetric"), ("linear", "half_pixel"), ("cubic", "align_corners"))),
    ("Gemm", 7, {"alpha": 0.5}, [normal(3, 2), normal(2, 4), normal(4)], 1),
    ("PRelu", 7, {}, [X, normal(4)], 1),
    ("Pow", 7, {}, [np.abs(X), normal(4)], 1),
    ("Cast", 7, {"to": 6}, [X * 9], 1),
    ("ArgMax", 7, {"axis": 1}, [X.round()], 1),
    ("Flatten", 7, {"axis": 2}, [X], 1),
    ("Reshape", 7, {}, [X, whole(0, -1)], 1),
    ("Gather", 7, {"axis": 1}, [X, whole(1, 0)], 1),
    ("OneHot", 11, {}, [whole(0, -2), whole(3), normal(2)], 1),
    ("DepthToSpace", 7, {"blocksize": 2}, [normal(1, 8, 2, 2)], 1),
    ("ScatterElements", 11, {}, [normal(3, 3), np.array([[1, 0, 2]]), normal(1, 3)], 1),
    ("InstanceNormalization", 7, {}, [IMAGE, normal(2), normal(2)], 1),
    ("LayerNormalization", 17, {}, [X, normal(4)], 1),
    ("LSTM", 7, {"hidden_size": 4}, [X, normal(1, 16, 4), normal(1, 16, 4), normal(1, 32)], 3),
    ("GRU", 7, {"hidden_size": 4}, [X, normal(1, 12, 4), normal(1, 12, 4), normal(1, 24)], 2),
    ("QuantizeLinear", 10, {}, [X, np.float32(0.1), np.uint8(3)], 1),
    ("DequantizeLinear", 10, {}, [np.arange(6, dtype=np.uint8), np.float32(0.1), np.uint8(3)], 1),
]  # fmt: skip


def proto_of(case: Case, sizes: bool = True) -> onnx.ModelProto:
    """One node called `the node`; dims are symbols where `sizes` is not set."""
    op_type, opset, attributes, inputs, outputs = case
    names, results = [f"i{k}" for k in range(len(inputs))], [f"o{k}" for k in range(outputs)]
    node = helper.make_node(op_type, names, results, name="the node", **attributes)
    node.metadata_props.add(key="module", value="layers.0")
    infos = [
        helper.make_tensor_value_info(
            name,
            helper.np_dtype_to_tensor_dtype(np.asarray(array).dtype),
            np.shape(array) if sizes else [f"{name}_{k}" for k in range(np.ndim(array))],
        )
        for name, array in zip(names, inputs, strict=True)
    ]
    graph = helper.make_graph([node], "main", infos, [onnx.ValueInfoProto(name=name) for name in results])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def results_of(proto: onnx.ModelProto, inputs: Arrays) -> list[NDArray[Any]]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {f"i{k}": np.asarray(array) for k, array in enumerate(inputs)})


def identity(case: Any) -> str | None:
    return "-".join(str(part) for part in case[:3]) if isinstance(case, tuple) else None


@pytest.mark.parametrize("case", CONVERSIONS, ids=identity)
@pytest.mark.parametrize("sizes", [True, False])
def test_a_converted_operator_computes_the_same_bits(case: Case, sizes: bool) -> None:
    proto, inputs = proto_of(case, sizes), case[3]
    before = results_of(proto, inputs)
    for opset in (18, 23):
        model = ir.from_proto(proto)
        outputs = list(model.graph.outputs)
        raise_opset(model, opset)
        assert model.graph.opset_imports == {"": opset}
        assert model.graph.outputs == outputs
        last = model.graph.node("the node")
        assert list(last.outputs) == outputs
        assert all(node.metadata_props == {"module": "layers.0"} for node in model.graph)
        raised = ir.to_proto(model)
        onnx.checker.check_model(raised, full_check=True)
        for old, new in zip(before, results_of(raised, inputs), strict=True):
            assert old.dtype == new.dtype
            np.testing.assert_array_equal(new, old)


def test_every_conversion_is_tried() -> None:
    assert {case[0] for case in CONVERSIONS} == CONVERTED
    refused = {case[0] for case in CHANGED} | {"BatchNormalization", "Dropout"}
    assert refused | {case[0] for case in CONVERSIONS} >= set(MEANING_CHANGED)


@pytest.mark.parametrize("case", SAME, ids=identity)
def test_an_operator_that_stays_computes_the_same_bits(case: Case) -> None:
    proto, inputs = proto_of(case), case[3]
    model = ir.from_proto(proto)
    raise_opset(model, 23)
    raised = ir.to_proto(model)
    assert list(raised.graph.node) == list(proto.graph.node)
    for old, new in zip(results_of(proto, inputs), results_of(raised, inputs), strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("opset", [7, 11, 19])
def test_the_average_of_a_pool_is_the_same_to_the_last_bit_but_one(opset: int) -> None:
    for attributes in ({"strides": [2, 2], "pads": [1, 1, 1, 1]}, {"auto_pad": "SAME_LOWER", "count_include_pad": 1}):
        case = ("AveragePool", opset, {"kernel_shape": [3, 3], **attributes}, [IMAGE], 1)
        model = ir.from_proto(proto_of(case))
        raise_opset(model, 23)
        (old,), (new,) = results_of(proto_of(case), [IMAGE]), results_of(ir.to_proto(model), [IMAGE])
        np.testing.assert_allclose(new, old, rtol=0, atol=np.spacing(np.float32(np.abs(IMAGE).max())))


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (("Clip", 7, {"max": 0.5}, [X.astype(np.float16)], 1), "cannot convert it .*inconsistent type"),
        (("Pad", 7, {**PADS, "value": 2.0}, [X.astype(np.float64)], 1), "cannot convert it .*inconsis"),
        (("Dropout", 7, {}, [X], 2), "another meaning since opset 10"),
        (("Dropout", 10, {}, [X], 2), "another meaning since opset 12"),
        (("BatchNormalization", 9, {}, STATISTICS, 5), "another meaning since opset 14"),
    ],
    ids=identity,
)
def test_a_conversion_that_would_be_wrong_is_refused_and_changes_nothing(case: Case, reason: str) -> None:
    model = ir.from_proto(proto_of(case))
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(UnsupportedError, match=rf"{case[0]} would change meaning \('the node': .*{reason}"):
        raise_opset(model, 18)
    assert ir.to_proto(model).SerializeToString() == before


def test_nothing_is_converted_where_one_node_cannot_be() -> None:
    maker = GraphMaker(FLOAT)
    dims = (2, 4, 8, 8)
    x = maker.input("x", dims)
    y = maker.node("ReduceMean", [x], "y", (2, 1, 8, 8), {"axes": [1]})
    z = maker.node("Hardmax", [x], "z", dims, {"axis": 1})
    model = maker.model([y, z], 11)
    with pytest.raises(UnsupportedError, match=r"raised to 18: Hardmax would change meaning \('node_z'"):
        raise_opset(model, 18)
    assert op_counts(model) == {"ReduceMean": 1, "Hardmax": 1}
    assert model.graph.opset_imports[""] == 11


def test_what_needs_a_dtype_is_refused_without_one_and_what_does_not_is_converted() -> None:
    reduction, limit = (
        ir.from_proto(proto_of((op_type, 7, attributes, [X], 1)))
        for op_type, attributes in (("ReduceMean", {"axes": [1]}), ("Clip", {"max": 0.5}))
    )
    for model in (reduction, limit):
        model.graph.inputs[0].type, model.graph.inputs[0].shape = None, None
    raise_opset(reduction, 18)
    assert op_counts(reduction) == {"Constant": 1, "ReduceMean": 1}
    with pytest.raises(UnsupportedError, match="the dtype of its inputs is unknown"):
        raise_opset(limit, 18)


def test_new_names_are_new() -> None:
    maker = GraphMaker(FLOAT)
    x = maker.input("x", (2, 4))
    one = maker.node("ReduceMean", [x], "node_y/Constant", (2, 1), {"axes": [1]})
    two = maker.node("ReduceMean", [one], "node_y/Constant/output", (1, 1), {"axes": [0]})
    y = maker.node("ReduceMean", [two], "y", (1, 1), {"axes": [1]})
    model = maker.model([y], 13)
    raise_opset(model, 18)
    assert op_counts(model) == {"Constant": 3, "ReduceMean": 3}
    for names in ([n.name for n in model.graph], [o.name for n in model.graph for o in n.outputs]):
        assert len(set(names)) == len(names) == 6
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_a_node_in_a_branch_is_converted_there() -> None:
    inner, maker = GraphMaker(FLOAT), GraphMaker(FLOAT)
    x, flag = maker.input("x", (2, 4)), maker.input("flag", (), ir.DataType.BOOL)
    y = inner.node("ReduceMean", [x], "inner", (2, 1), {"axes": [1]})
    other = GraphMaker(FLOAT)
    z = other.node("ReduceMax", [x], "other", (2, 1), {"axes": [1]})
    branches = {
        "then_branch": ir.Graph([], [y], nodes=inner.nodes, name="then"),
        "else_branch": ir.Graph([], [z], nodes=other.nodes, name="else"),
    }
    model = maker.model([maker.node("If", [flag], "result", (2, 1), branches)], 13)
    before = [run(model, {"x": torch.tensor(X[0, :2]), "flag": torch.tensor(f)})[0] for f in (True, False)]
    raise_opset(model, 23)
    assert op_counts(model) == {"If": 1}
    after = [run(model, {"x": torch.tensor(X[0, :2]), "flag": torch.tensor(f)})[0] for f in (True, False)]
    np.testing.assert_array_equal(after, before)


def with_function(opset: int, function_opset: int, op_type: str, **attributes: Any) -> ir.Model:
    """`y = own::F(x)`, the function being one node."""
    body = [helper.make_node(op_type, ["a"], ["b"], **attributes)]
    function = helper.make_function("own", "F", ["a"], ["b"], body, [helper.make_opsetid("", function_opset)])
    graph = helper.make_graph(
        [helper.make_node("F", ["i0"], ["y"], domain="own")],
        "main",
        [helper.make_tensor_value_info("i0", onnx.TensorProto.FLOAT, X.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=8))


def test_functions_are_raised_with_the_model() -> None:
    model = with_function(13, 13, "ReduceMean", axes=[1])
    (before,) = results_of(ir.to_proto(model), [X])
    raise_opset(model, 18)
    (function,) = model.functions.values()
    assert function.opset_imports[""] == 18
    assert [node.op_type for node in function] == ["Constant", "ReduceMean"]
    np.testing.assert_array_equal(results_of(ir.to_proto(model), [X])[0], before)


@pytest.mark.parametrize(("opset", "own"), [(13, 11), (17, 13), (13, 17)])
def test_a_function_of_another_opset_is_raised_only_where_that_is_no_matter(opset: int, own: int) -> None:
    model = with_function(opset, own, "Relu")
    raise_opset(model, 20)
    (function,) = model.functions.values()
    assert function.opset_imports[""] == 20
    np.testing.assert_array_equal(results_of(ir.to_proto(model), [X])[0], np.maximum(X, 0))
    with pytest.raises(UnsupportedError, match="ReduceMean would change meaning"):
        raise_opset(with_function(opset, own, "ReduceMean", axes=[1]), 20)


def test_a_function_of_a_newer_opset_stays() -> None:
    model = with_function(13, 22, "Relu")
    raise_opset(model, 18)
    (function,) = model.functions.values()
    assert (model.graph.opset_imports[""], function.opset_imports[""]) == (18, 22)


def test_both_names_of_the_default_domain_are_one() -> None:
    model = model_of("Relu", opset=13)
    model.graph.opset_imports["ai.onnx"] = model.graph.opset_imports.pop("")
    raise_opset(model, 18)
    assert {name: model.graph.opset_imports.get(name) for name in ("", "ai.onnx")} == {"": None, "ai.onnx": 18}


def test_the_oldest_files_are_not_read() -> None:
    with pytest.raises(UnsupportedError, match="opset of the model: expected at least 7, got 6"):
        raise_opset(model_of("Relu", opset=6), 18)
