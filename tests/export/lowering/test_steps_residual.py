"""Residual adds in front of a norm: recognized where they are one, the sum kept, every other use kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from rmsnorm_deploy.export.from_torch.lower import lower
from rmsnorm_deploy.export.graph.metadata import FORM_KEY, PATH_KEY
from rmsnorm_deploy.export.lowering.table import TARGETS
from rmsnorm_deploy.models.reference import reference
from rmsnorm_deploy.models.spec import NormSpec
from tests.helpers.graphs.capture_graph import GraphMaker, errors, op_counts, run
from tests.helpers.norms.norm_cases import FLOAT16, FLOAT32, FLOAT32_ULP, residual_feeds, residual_model
from tests.helpers.norms.norm_zoo import BARE, CAST_FIRST, ONE_PLUS, SCALE_FIRST, TORCH, ZOO


@pytest.mark.parametrize("keep_sum", [True, False])
@pytest.mark.parametrize("spec", [TORCH, CAST_FIRST, ONE_PLUS, SCALE_FIRST], ids=NormSpec.describe)
@pytest.mark.parametrize("target", TARGETS)
def test_a_residual_add_keeps_its_sum_and_its_other_uses(target: str, spec: NormSpec, keep_sum: bool) -> None:
    lowered, (site,) = lower(residual_model(FLOAT32, spec, keep_sum=keep_sum), target)
    assert site.form == "residual_add"
    assert op_counts(lowered).get("rmsnorm_deploy::AddRMSNorm", 0) == (target == "plugin")
    names = ["y", "sum", "z"] if keep_sum else ["y", "z"]
    assert [value.name for value in lowered.graph.outputs] == names
    feeds = residual_feeds()
    results = dict(zip(names, run(lowered, feeds), strict=True))
    total = feeds["x"] + feeds["residual"]
    if keep_sum:
        assert results["sum"].tobytes() == total.numpy().tobytes()
    assert results["z"].tobytes() == (-total).numpy().tobytes()
    expected = reference(spec, total.numpy(), np.linspace(0.5, 1.5, 64, dtype=np.float32))
    assert errors(results["y"], expected, torch.float32).max() <= FLOAT32_ULP
    onnx.checker.check_model(ir.to_proto(lowered)) if target != "ort" else None
    for node in lowered.graph:
        if PATH_KEY in node.metadata_props:
            assert node.metadata_props[FORM_KEY] == "residual_add"


@pytest.mark.parametrize("target", TARGETS)
def test_a_float16_residual_add_keeps_its_sum(target: str) -> None:
    lowered, (site,) = lower(residual_model(FLOAT16, ONE_PLUS), target)
    assert site.form == "residual_add"
    feeds = residual_feeds(torch.float16)
    y, total, z = run(lowered, feeds)
    wanted = feeds["x"] + feeds["residual"]
    assert total.tobytes() == wanted.numpy().tobytes()
    assert z.tobytes() == (-wanted).numpy().tobytes()
    expected = reference(ONE_PLUS, wanted.numpy(), torch.linspace(0.5, 1.5, 64).half().numpy())
    # The sum may reach the norm unrounded here, an ULP of the larger operand away from what the module normalizes.
    assert errors(y, expected, torch.float16).max() <= 1.6


@pytest.mark.parametrize("target", TARGETS)
def test_two_norms_on_one_sum(target: str) -> None:
    maker = GraphMaker(FLOAT32)
    dims = ("batch", "sequence", 64)
    x, residual = maker.input("x", dims), maker.input("residual", dims)
    total = maker.node("Add", [x, residual], "sum", dims)
    weights = [maker.initializer(f"weight.{i}", torch.full((64,), i + 1.0)) for i in range(2)]
    outputs = [maker.norm(CAST_FIRST, [total, w], f"y{i}", dims, path=f"norm{i}") for i, w in enumerate(weights)]
    lowered, sites = lower(maker.model([*outputs, total]), target)
    assert [site.path for site in sites] == ["norm0", "norm1"]
    if target == "plugin":
        assert op_counts(lowered) == {"rmsnorm_deploy::AddRMSNorm": 1, "rmsnorm_deploy::RMSNorm": 1}
    feeds = residual_feeds()
    one, two, summed = run(lowered, feeds)
    assert summed.tobytes() == (feeds["x"] + feeds["residual"]).numpy().tobytes()
    assert np.array_equal(two, one * 2)
    expected = reference(CAST_FIRST, summed, np.ones(64))
    assert errors(one, expected, torch.float32).max() <= FLOAT32_ULP


@pytest.mark.parametrize("target", TARGETS)
def test_a_chain_of_residual_adds(target: str) -> None:
    maker = GraphMaker(FLOAT32)
    dims = ("batch", "sequence", 64)
    total = maker.node("Add", [maker.input("x", dims), maker.input("residual", dims)], "sum0", dims)
    sums = [total]
    for i in range(2):
        y = maker.norm(BARE, [total], f"y{i}", dims, path=f"layers.{i}.norm")
        total = maker.node("Add", [total, y], f"sum{i + 1}", dims)
        sums.append(total)
    lowered, sites = lower(maker.model(sums), target)
    assert [site.form for site in sites] == ["residual_add", "residual_add"]
    feeds = residual_feeds()
    results = run(lowered, feeds)
    h = (feeds["x"] + feeds["residual"]).double().numpy()
    for result in results:
        assert errors(result, h, torch.float32).max() <= 2 * FLOAT32_ULP
        h = h + reference(BARE, h)


@pytest.mark.parametrize(
    ("dims", "residual_dims", "shapes"),
    [
        (("batch", "sequence", 64), (1, "sequence", 64), [(2, 5, 64), (1, 5, 64)]),
        (("batch", "sequence", 64), (64,), [(2, 5, 64), (64,)]),
        ((2, 5, 64), (2, 1, 64), [(2, 5, 64), (2, 1, 64)]),
        (("batch", 64), ("other", 64), [(5, 64), (1, 64)]),
        ((None, None, 64), (None, None, 64), [(2, 5, 64), (1, 5, 64)]),  # nothing is known of these dims
    ],
)  # fmt: skip
@pytest.mark.parametrize("target", TARGETS)
def test_a_broadcast_add_is_no_residual(target: str, dims: Any, residual_dims: Any, shapes: list[Any]) -> None:
    lowered, (site,) = lower(residual_model(FLOAT32, dims=dims, residual_dims=residual_dims), target)
    assert site.form == "plain"
    assert op_counts(lowered)["Add"] >= 1
    x, residual = (torch.randn(shape, generator=torch.Generator().manual_seed(6)) for shape in shapes)
    y, total, _ = run(lowered, {"x": x, "residual": residual})
    assert total.tobytes() == (x + residual).numpy().tobytes()
    expected = reference(CAST_FIRST, total, np.linspace(0.5, 1.5, 64, dtype=np.float32))
    assert errors(y, expected, torch.float32).max() <= FLOAT32_ULP


def test_an_added_constant_is_no_residual() -> None:
    maker = GraphMaker(FLOAT32)
    dims = (2, 5, 64)
    total = maker.node("Add", [maker.input("x", dims), maker.initializer("position", torch.ones(dims))], "sum", dims)
    model = maker.model([maker.norm(BARE, [total], "y", dims)])
    for target in TARGETS:
        assert lower(model, target)[1][0].form == "plain"


def test_a_norm_with_more_than_a_scale_leaves_the_add_in_front_of_it() -> None:
    for name in ("mamba2", "biased", "per_head_weight"):
        norm = ZOO[name]
        weight, bias = norm.tensors(norm.build())
        maker = GraphMaker(FLOAT32)
        dims = ("batch", "sequence", *norm.tail)
        x, residual = maker.input("x", dims), maker.input("residual", dims)
        total = maker.node("Add", [x, residual], "sum", dims)
        inputs = [total, maker.initializer("weight", weight)]
        inputs += [maker.initializer("bias", bias) if bias is not None else None, x if norm.gated else None]
        lowered, _ = lower(maker.model([maker.norm(norm.spec, inputs, "y", dims), total]), "plugin")
        counts = op_counts(lowered)
        assert counts["rmsnorm_deploy::RMSNorm"] == 1
        assert "rmsnorm_deploy::AddRMSNorm" not in counts
        feeds = {key: torch.randn(2, 3, *norm.tail) for key in ("x", "residual")}
        assert run(lowered, feeds)[1].tobytes() == (feeds["x"] + feeds["residual"]).numpy().tobytes()


@pytest.mark.parametrize("target", TARGETS)
def test_a_weight_computed_after_the_add_stays_in_front_of_the_norm(target: str) -> None:
    maker = GraphMaker(FLOAT32)
    dims = ("batch", 64)
    total = maker.node("Add", [maker.input("x", dims), maker.input("residual", dims)], "sum", dims)
    weight = maker.node("Exp", [maker.initializer("log_weight", torch.zeros(64))], "weight", (64,))
    lowered, _ = lower(maker.model([maker.norm(CAST_FIRST, [total, weight], "y", dims), total]), target)
    made = {value.name for value in lowered.graph.inputs} | set(lowered.graph.initializers)
    for node in lowered.graph:
        assert {value.name for value in node.inputs if value is not None} <= made, node
        made |= {value.name for value in node.outputs}


def test_the_sum_reaches_a_use_inside_a_branch() -> None:
    for target in TARGETS:
        maker = GraphMaker(FLOAT32)
        dims = ("batch", 64)
        x, residual = maker.input("x", dims), maker.input("residual", dims)
        flag = maker.input("flag", (), ir.DataType.BOOL)
        total = maker.node("Add", [x, residual], "sum", dims)
        y = maker.norm(BARE, [total], "y", dims)
        branches = {}
        for name, value in (("then_branch", total), ("else_branch", y)):
            inner = GraphMaker(FLOAT32)
            output = inner.node("Neg", [value], f"{name}_output", dims)
            branches[name] = ir.Graph([], [output], nodes=inner.nodes, name=name)
        z = maker.node("If", [flag], "z", dims, branches)
        lowered, _ = lower(maker.model([z]), target)
        feeds = {"x": torch.randn(3, 64), "residual": torch.randn(3, 64)}
        total_value = feeds["x"] + feeds["residual"]
        (taken,) = run(lowered, {**feeds, "flag": torch.tensor(True)})
        assert taken.tobytes() == (-total_value).numpy().tobytes()
        (other,) = run(lowered, {**feeds, "flag": torch.tensor(False)})
        assert errors(other, -reference(BARE, total_value.numpy()), torch.float32).max() <= FLOAT32_ULP
