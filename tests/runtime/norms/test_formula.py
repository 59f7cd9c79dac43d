"""What the norms of a file compute, read from its graph, and how that differs from PyTorch's module."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.export.lowering.table import TARGETS
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.runtime.norms.access import Formula
from rmsnorm_deploy.runtime.norms.formula import COMPARED, differences, read_formulas

WEIGHT = np.linspace(0.5, 2.0, 64, dtype=np.float32)
BASE = NormSpec(eps=1e-6)


def formula(dtype: str = "float32", weight: Any = WEIGHT, bias: Any = None, **changes: Any) -> Formula:
    return Formula(BASE.replace(**changes), dtype, weight, bias)


def test_every_field_has_an_entry() -> None:
    assert set(COMPARED) == {field.name for field in dataclasses.fields(NormSpec)}


def test_equal_formulas_have_no_differences() -> None:
    assert differences(formula(), formula()) == []


@pytest.mark.parametrize(
    ("file", "module", "phrase"),
    [
        (formula(eps=0.3), formula(), "epsilon is 0.3 in the file and 1e-06 in the module"),
        (formula(trailing_dims=2), formula(), "the file normalizes the last 2 dims, the module the last 1"),
        (formula(scale="one_plus_weight"), formula(), "the file adds 1 to the weight, the module does not"),
        (formula(), formula(scale="one_plus_weight"), "the module adds 1 to the weight, the file does not"),
        (formula(weight=None, scale="none"), formula(), "the module multiplies by a weight, the file does not"),
        (
            formula("float16", order="no_upcast", statistics="input"),
            formula("float16"),
            "statistics are float16 in the file and float32 in the module",
        ),
        (
            formula("float64"),
            formula("float64", statistics="promoted"),
            "statistics are float32 in the file and float64 in the module",
        ),
        (
            formula("float16"),
            formula("float16", order="cast_then_scale"),
            "the file multiplies by the weight before it rounds to float16, "
            "the module rounds to float16 before it multiplies by the weight",
        ),
        (
            formula(reduction="sum"),
            formula(),
            "the file sums the squares without a mean, the module takes the mean of the squares",
        ),
        (formula(group_size=16), formula(), "the file normalizes groups of 16, the module the whole row"),
        (
            formula(gate="before", activation="silu"),
            formula(gate="after", activation="silu"),
            "the file multiplies by the gate before it normalizes, "
            "the module multiplies by the gate after it normalizes",
        ),
        (
            formula(gate="after", activation="sigmoid"),
            formula(gate="after", activation="silu"),
            "the file applies the sigmoid to the gate, the module applies SiLU to the gate",
        ),
        (formula(), formula(bias=WEIGHT).__class__(BASE.replace(bias=True), "float32", WEIGHT, WEIGHT), ""),
        (
            formula("float16", scale="one_plus_weight", offset_in_float32=False),
            formula("float16", scale="one_plus_weight"),
            "the file adds 1 to the weight in float16, the module in float32",
        ),
    ],
)
def test_each_field_has_its_phrase(file: Formula, module: Formula, phrase: str) -> None:
    assert differences(file, module) == [phrase or "the module adds a bias, the file does not"]


def test_what_computes_the_same_is_no_difference() -> None:
    ones, zeros = np.ones(64, np.float32), np.zeros(64, np.float32)
    assert differences(formula(weight=None, scale="none"), formula(weight=ones)) == []
    assert differences(formula(), Formula(BASE.replace(bias=True), "float32", WEIGHT, zeros)) == []
    assert differences(formula(root="sqrt", order="cast_then_scale"), formula()) == []
    assert differences(formula(weight=1 + WEIGHT), formula(scale="one_plus_weight")) == []


def test_weights_are_compared_channel_by_channel() -> None:
    other = WEIGHT.copy()
    other[[5, 9, 11]] = 0.71
    (phrase,) = differences(formula(weight=other), formula())
    assert phrase == "the weight differs in 3 of 64 channels, the first at 5: 0.71 in the file, 0.619 in the module"
    other = WEIGHT.copy()
    other[7] = np.nextafter(other[7], np.float32(9))
    (phrase,) = differences(formula(weight=other), formula())
    assert phrase.startswith("the weight differs in 1 of 64 channels, at 7: 0.66666")
    (phrase,) = differences(formula(weight=2 + WEIGHT), formula(scale="one_plus_weight"))
    assert phrase.startswith("the weight differs in 64 of 64 channels, the first at 0: 2.5 in the file, 1.5 in")
    (phrase,) = differences(formula(weight=WEIGHT[:32]), formula())
    assert phrase == "the weight has 32 channels in the file and 64 in the module"


class OneNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.RMSNorm(64, eps=1e-5), nn.Linear(64, 8)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


@pytest.mark.parametrize("target", TARGETS)
def test_the_graph_decides_and_not_its_metadata(target: str, tmp_path: Path) -> None:
    model = OneNorm().eval()
    export_model(model, tmp_path / "out", target=target, inputs={"x": torch.randn(2, 5, 64)})
    proto = onnx.load(tmp_path / "out" / "model.onnx")
    (weight,) = [t for t in proto.graph.initializer if t.name == "norm.weight"]
    doubled = 2 * onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(doubled, weight.name))
    for node in proto.graph.node:
        for entry in node.metadata_props:
            entry.value = entry.value.replace("1e-05", "0.25")
    onnx.save(proto, tmp_path / "changed.onnx")
    found = read_formulas(tmp_path / "changed.onnx")
    (norm,) = found.norms.values()
    assert (norm.spec.eps, norm.dtype, found.refusals) == (1e-5, "float32", {})
    assert norm.weight is not None
    np.testing.assert_array_equal(norm.weight, doubled)


def test_what_is_no_norm_has_a_reason(tmp_path: Path) -> None:
    export_model(OneNorm().eval(), tmp_path / "out", target="ort", inputs={"x": torch.randn(2, 5, 64)})
    proto = onnx.load(tmp_path / "out" / "model.onnx")
    (node,) = [node for node in proto.graph.node if "LayerNormalization" in node.op_type]
    (epsilon,) = [a for a in node.attribute if a.name == "epsilon"]
    epsilon.f = -1.0
    onnx.save(proto, tmp_path / "changed.onnx")
    found = read_formulas(tmp_path / "changed.onnx")
    assert (found.norms, list(found.refusals)) == ({}, ["norm"])
    assert "epsilon is -1" in found.refusals["norm"]
