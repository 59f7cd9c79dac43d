"""Raising the opset import: only where no operator changes its meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from helpers.capture_graph import GraphMaker, norm_model, op_counts, run
from helpers.norm_zoo import ZOO

from rmsnorm_deploy.export.lower import lower
from rmsnorm_deploy.export.opset import raise_opset
from rmsnorm_deploy.models.errors import UnsupportedError

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
        UnsupportedError, match=f"captured at opset {current} and cannot be lowered to {wanted}"
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
    ("ReduceMean", {"axes": [1]}, 1, 17, 18),
    # This value of it is unknown from 20 on.
    ("GridSample", {"mode": "bilinear"}, 2, 18, 20),
    # Without the attribute the axis was 1, without the input it is -2.
    ("DFT", {}, 1, 18, 20),
]  # fmt: skip


@pytest.mark.parametrize(("op_type", "attributes", "inputs", "current", "wanted"), CHANGED)
def test_an_operator_that_changes_its_meaning_is_refused(
    op_type: str, attributes: dict[str, Any], inputs: int, current: int, wanted: int
) -> None:
    model = model_of(op_type, attributes, inputs=inputs, opset=current)
    with pytest.raises(
        UnsupportedError, match=f"opset {current} cannot be raised to {wanted}: {op_type} would change in meaning"
    ) as error:
        raise_opset(model, wanted)
    assert "primitives" in str(error.value)
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
        with pytest.raises(UnsupportedError, match="needs opset 23"):
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
    with pytest.raises(UnsupportedError, match="captured at opset 20 and cannot be lowered to 18"):
        lower(model, "primitives", 18)


def test_the_standard_target_refuses_a_graph_that_opset_23_would_change() -> None:
    model = model_of("GroupNormalization", {"num_groups": 2}, inputs=3)
    with pytest.raises(UnsupportedError, match=r"GroupNormalization would change in meaning.*such as primitives"):
        lower(model, "standard")
    assert op_counts(lower(model, "primitives")[0]) == {"GroupNormalization": 1}
