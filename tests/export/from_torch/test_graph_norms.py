"""Norms that are not modules with one input: found in the captured graph, named, marked and lowered."""

from __future__ import annotations

from functools import cache

import onnx_ir as ir
import pytest
import torch
from torch import nn

from rmsnorm_deploy.export.from_torch.export_model import prepare
from rmsnorm_deploy.export.from_torch.graph_norms import marked
from rmsnorm_deploy.export.from_torch.lower import lower_graph, site_rows
from rmsnorm_deploy.export.from_torch.save import PreparedModel
from rmsnorm_deploy.export.graph.captured_nodes import NORM_OP
from rmsnorm_deploy.export.graph.metadata import FOUND_KEY, PARAMETERS_KEY, PATH_KEY
from rmsnorm_deploy.export.lowering.table import TARGETS
from rmsnorm_deploy.models.recognition.site import Recognition
from tests.helpers.models.inline_norms import PATHS, Channels, Layers, Lengths, Modulated, Residual, inline_model

# The operators of a lowered norm, by target.
OPERATORS = {"standard": ["RMSNormalization"], "ort": ["SimplifiedLayerNormalization"], "plugin": ["RMSNorm"]}
CALLS = {Layers: 6, Residual: 3, Channels: 1, Modulated: 1}


@cache
def prepared(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> PreparedModel:
    model, inputs = inline_model(kind, dtype)
    return prepare(model, inputs=inputs, dynamic=False)


def computed(found: PreparedModel) -> dict[str, tuple[str, float, list[str]]]:
    """Order of casts, epsilon and parameters of each norm outside of modules."""
    rows = found.unswapped.rows
    return {row["path"]: (row["spec"]["order"], row["spec"]["eps"], row["parameters"]) for row in rows}


@pytest.mark.parametrize("kind", PATHS)
def test_each_norm_has_the_path_of_its_module(kind: type[nn.Module]) -> None:
    rows = prepared(kind).unswapped.rows
    assert [row["path"] for row in rows] == PATHS[kind]
    assert {row["found"] for row in rows} == {"graph"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_formulas_and_parameters(dtype: torch.dtype) -> None:
    values = "scale_then_cast" if dtype == torch.float32 else "cast_then_scale"
    found = computed(prepared(Layers, dtype))
    for layer in ("layers.0", "layers.1"):
        assert found[f"{layer}:rms_norm_0"] == ("scale_then_cast", 1e-6, [f"{layer}.q_weight"])
        assert found[f"{layer}:rms_norm_1"] == ("scale_then_cast", 1e-5, [])
        assert found[f"{layer}:rms_norm_2"] == (values, 1e-3, [f"{layer}.v_weight"])


def test_norms_that_were_swapped_are_not_counted_twice() -> None:
    found = prepared(Layers)
    assert [site.path for site in found.recognition.sites] == ["norms.0", "norms.1"]
    captured = [node for node in found.capture.model.graph if node.op_type == NORM_OP]
    assert (len(captured), len(list(marked(found.capture.model)))) == (2, 6)


def test_a_refused_module_whose_norm_is_found_is_not_left_as_it_is() -> None:
    found = prepared(Residual)
    assert (found.recognition, found.unswapped.refusals) == (Recognition(), [])
    (row,) = found.unswapped.rows
    assert (row["path"], row["class"], row["parameters"]) == ("norm", f"{Residual.__module__}.AddNorm", ["norm.weight"])
    assert found.notes == [
        "norm (AddNorm) found in the graph, because not recognized as a module: its name contains 'norm', but it does "
        "not normalize a single input"
    ]


def test_the_scale_of_a_modulated_norm_is_not_a_weight() -> None:
    (row,) = prepared(Modulated).unswapped.rows
    assert (row["spec"]["scale"], row["parameters"]) == ("none", [])


def test_a_clamped_length_is_refused_with_the_reason() -> None:
    unswapped = prepared(Lengths).unswapped
    assert (unswapped.rows, unswapped.replaced) == ([], [])
    assert [(refusal.path, refusal.op_type) for refusal in unswapped.refusals] == [("", "ReduceL2")]
    assert "the statistic is clamped (as in L2 normalization)" in unswapped.refusals[0].reason


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", PATHS)
def test_every_norm_is_lowered(kind: type[nn.Module], target: str) -> None:
    found = prepared(kind)
    lowered = lower_graph(found.capture.model, target)
    rows = site_rows(found.recognition, lowered.sites, found.unswapped)
    graph_rows = [row for row in rows if row.get("found") == "graph"]
    assert [row["path"] for row in graph_rows] == PATHS[kind]
    assert sum(len(row["calls"]) for row in graph_rows) == CALLS[kind]
    assert lowered.refusals == []
    nodes = [node for node in lowered.model.graph if FOUND_KEY in node.metadata_props]
    assert {node.metadata_props[PATH_KEY] for node in nodes} == set(PATHS[kind])
    if target != "primitives":
        wanted = {*OPERATORS[target], *(["AddRMSNorm"] if target == "plugin" else [])}
        cores = [node for node in nodes if node.op_type in wanted]
        assert len(cores) == CALLS[kind]
        assert not any(node.op_type == "ReduceMean" and FOUND_KEY not in node.metadata_props for node in nodes)


def test_what_a_target_does_not_support_stays_as_it_is() -> None:
    found = prepared(Channels, torch.float64)
    assert [row["path"] for row in found.unswapped.rows] == PATHS[Channels]
    lowered = lower_graph(found.capture.model, "plugin")
    assert lowered.sites == []
    (refusal,) = lowered.refusals
    assert refusal.path == "norm"
    assert "float64" in refusal.reason
    keys = {key for node in lowered.model.graph for key in node.metadata_props}
    assert keys.isdisjoint({PATH_KEY, FOUND_KEY, PARAMETERS_KEY})
    assert site_rows(found.recognition, lowered.sites, found.unswapped) == []
    assert len(lower_graph(found.capture.model, "primitives").sites) == 1


def test_a_graph_without_marks_is_not_searched() -> None:
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Relu", [x])
    assert list(marked(ir.Model(ir.Graph([x], node.outputs, nodes=[node]), ir_version=10))) == []
