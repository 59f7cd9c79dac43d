"""Norms outside of modules: exported for every target, checked alone, and named where they are wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.export.lowering.table import TARGETS
from rmsnorm_deploy.runtime.validation.api import bisect, validate
from tests.helpers.models.inline_norms import PATHS, Channels, Layers, Modulated, Residual, inline_model

CALLS = {Layers: 8, Residual: 3, Channels: 1, Modulated: 1}
Exports = dict[type[nn.Module], tuple[nn.Module, dict[str, Tensor], Path]]


class Exported(Exports):
    """Each model, its inputs and the folder of its exports for all targets, made when it is asked for first."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, kind: type[nn.Module]) -> tuple[nn.Module, dict[str, Tensor], Path]:
        model, inputs = inline_model(kind)
        folder = self._folder / kind.__name__
        export_model(model, folder, target=TARGETS, inputs=inputs, dynamic=False)
        self[kind] = model, inputs, folder
        return self[kind]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exported(tmp_path_factory.mktemp("exports"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", PATHS)
def test_every_norm_is_checked_and_passes(kind: type[nn.Module], target: str, exports: Exports) -> None:
    model, inputs, folder = exports[kind]
    report = validate(folder / target, model, cases=[inputs])
    assert (report.verdict, report.culprits, report.notes, report.unchecked) == ("pass", [], [], "")
    assert len(report.norms) == CALLS[kind]
    assert {check.norm.key[0] for check in report.norms} >= set(PATHS[kind])
    assert all(len(check.kinds) == 11 for check in report.norms)


def _set_epsilon(file: Path, node_name: str, epsilon: float) -> None:
    proto = onnx.load(file)
    (node,) = [node for node in proto.graph.node if node.name == node_name]
    (attribute,) = [a for a in node.attribute if a.name == "epsilon"]
    attribute.f = epsilon
    onnx.save(proto, file)


@pytest.mark.parametrize("target", ["standard", "ort", "plugin"])
@pytest.mark.parametrize(
    ("kind", "path", "eps"),
    [(Layers, "layers.1:rms_norm_1", 1e-5), (Channels, "norm", 1e-6), (Modulated, ":rms_norm_0", 1e-5)],
)
def test_a_planted_epsilon_is_named(
    kind: type[nn.Module], path: str, eps: float, target: str, exports: Exports, tmp_path: Path
) -> None:
    model, inputs, folder = exports[kind]
    shutil.copytree(folder / target, tmp_path / "out")
    _, name = _node_of(tmp_path / "out" / "model.onnx", path)
    _set_epsilon(tmp_path / "out" / "model.onnx", name, 0.05)
    report = bisect(tmp_path / "out" / "model.onnx", model, cases=[inputs])
    assert report.verdict == "fail"
    assert (report.culprits[0].kind, report.culprits[0].name) == ("norm", path)
    assert report.culprits[0].reason.endswith(f"; epsilon is 0.05 in the file and {eps:g} in the module")
    assert [check.norm.key[0] for check in report.norms if not check.passed] == [path]


def _node_of(file: Path, path: str, call: int = 0) -> tuple[Any, str]:
    """The main node of a norm and its name."""
    nodes = [
        node
        for node in onnx.load(file, load_external_data=False).graph.node
        if {"rmsnorm_deploy.path": path}.items() <= {p.key: p.value for p in node.metadata_props}.items()
        and any(p.key == "rmsnorm_deploy.values" for p in node.metadata_props)
    ]
    return nodes[call], nodes[call].name


def test_the_right_call_of_a_norm_is_named(exports: Exports, tmp_path: Path) -> None:
    model, inputs, folder = exports[Residual]
    shutil.copytree(folder / "plugin", tmp_path / "out")
    _, name = _node_of(tmp_path / "out" / "model.onnx", "norm", 1)
    _set_epsilon(tmp_path / "out" / "model.onnx", name, 0.05)
    report = bisect(tmp_path / "out", model, cases=[inputs])
    assert [(c.kind, c.name) for c in report.culprits] == [("norm", "norm (call 2)")]


def test_a_weight_of_the_file_is_compared_with_that_of_the_model(exports: Exports, tmp_path: Path) -> None:
    model, inputs, folder = exports[Layers]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.get_parameter("layers.0.q_weight")[3] *= 1.5
    try:
        report = bisect(folder / "ort", model, cases=[inputs])
    finally:
        model.load_state_dict(state)
    assert (report.culprits[0].kind, report.culprits[0].name) == ("norm", "layers.0:rms_norm_0")
    assert "the weight differs in 1 of 16 channels, at 3" in report.culprits[0].reason


def test_a_norm_without_metadata_is_in_the_notes(exports: Exports, tmp_path: Path) -> None:
    model, inputs, folder = exports[Layers]
    shutil.copytree(folder / "ort", tmp_path / "out")
    proto = onnx.load(tmp_path / "out" / "model.onnx")
    (node,) = [node for node in proto.graph.node if node.name.startswith("layers.0:rms_norm_2/Simplified")]
    del node.metadata_props[:]
    onnx.save(proto, tmp_path / "out" / "model.onnx")
    report = validate(tmp_path / "out", model, cases=[inputs])
    assert report.notes == [
        "layers.0:rms_norm_2 could not be checked alone: no node of the candidate names this norm in its metadata"
    ]
    assert len(report.norms) == CALLS[Layers] - 1


@pytest.mark.parametrize("target", ["ort", "primitives"])
def test_half_types_pass(target: str, tmp_path: Path) -> None:
    model, inputs = inline_model(Layers, torch.float16)
    export_model(model, tmp_path / "out", target=target, inputs=inputs, dynamic=False)
    report = validate(tmp_path / "out", model, cases=[inputs])
    assert (report.verdict, report.notes) == ("pass", [])
    assert len(report.norms) == CALLS[Layers]
