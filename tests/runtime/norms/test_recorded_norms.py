"""PyTorch's side of norms that are not modules: the recorded formula with the weight of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.export.graph.metadata import FOUND_KEY, PARAMETERS_KEY
from rmsnorm_deploy.runtime.norms.access import NormFeed
from rmsnorm_deploy.runtime.norms.onnx_norms import OnnxNorms
from rmsnorm_deploy.runtime.norms.recorded_norms import RecordedNorms, recorded_call
from tests.helpers.models.inline_norms import WIDTH, Channels, inline_model

KEY = ("norm", 0)
ROWS = np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model, inputs = inline_model(Channels)
    folder = tmp_path_factory.mktemp("recorded") / "out"
    export_model(model, folder, target="ort", inputs=inputs, dynamic=False)
    return model, folder / "model.onnx"


def changed(file: Path, key: str, change: Callable[[str], str]) -> OnnxNorms:
    """The norms of a file beside the given one, with a value of the metadata of its nodes changed."""
    proto = onnx.load(file)
    for node in proto.graph.node:
        for prop in node.metadata_props:
            if prop.key == key:
                prop.value = change(prop.value)
    onnx.save(proto, file.with_name("changed.onnx"))
    return OnnxNorms(file.with_name("changed.onnx"), "cpu")


def test_the_weight_is_that_of_the_model(exported: tuple[nn.Module, Path]) -> None:
    model, file = exported
    access = OnnxNorms(file, "cpu")
    norms = RecordedNorms(model, access, access.recorded)
    assert (norms.keys, norms.problems, norms.notes) == ([KEY], {}, [])
    weight = model.get_parameter("norm.weight").detach()
    assert norms.formula(KEY).spec.eps == 1e-6
    np.testing.assert_array_equal(norms.formula(KEY).weight, weight.numpy())
    with norms.alone([KEY]) as run:
        y = run({KEY: NormFeed(ROWS)})[KEY].y
    wanted = F.rms_norm(torch.from_numpy(ROWS), (WIDTH,), weight, 1e-6)
    np.testing.assert_allclose(y, wanted.numpy(), rtol=1e-6)
    wide = ROWS.astype(np.float64)
    exact = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + 1e-6) * weight.double().numpy()
    np.testing.assert_allclose(norms.exact(KEY, NormFeed(ROWS)), exact, rtol=1e-14)
    call = recorded_call(KEY, access, (2, 4, 5, WIDTH))
    assert (call.x_dtype, call.y_dtype, call.gate_dtype, call.forced) == ("float32", "float32", None, False)


def test_the_weight_of_the_file_replaces_one_that_the_model_does_not_have(exported: tuple[nn.Module, Path]) -> None:
    model, file = exported
    access = changed(file, PARAMETERS_KEY, lambda _: json.dumps(["other"]))
    norms = RecordedNorms(model, access, access.recorded)
    assert norms.notes == ["norm: PyTorch's model has no tensor other, so the norm was checked with the file's weight"]
    np.testing.assert_array_equal(norms.formula(KEY).weight, model.get_parameter("norm.weight").detach().numpy())


def test_too_few_names_are_a_problem(exported: tuple[nn.Module, Path]) -> None:
    access = changed(exported[1], PARAMETERS_KEY, lambda _: "[]")
    norms = RecordedNorms(exported[0], access, access.recorded)
    assert norms.problems == {KEY: "expected the names of 1 parameters in its metadata, got 0"}
    assert norms.keys == []


@pytest.mark.parametrize("text", ["", "{", "[1]", "3"])
def test_metadata_that_cannot_be_read_is_none(text: str, exported: tuple[nn.Module, Path]) -> None:
    assert changed(exported[1], PARAMETERS_KEY, lambda _: text).recorded == {}


def test_a_module_is_not_recorded(exported: tuple[nn.Module, Path]) -> None:
    assert changed(exported[1], FOUND_KEY, lambda _: "elsewhere").recorded == {}
