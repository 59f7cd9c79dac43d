"""A package for Triton's Python backend, loaded and called as Triton does, with a stand-in of Triton's module."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from rmsnorm_deploy import export_model, package_model
from rmsnorm_deploy.models.loading import load_model
from tests.helpers.models.factory_file import small_model


@dataclass
class _Tensor:
    label: str
    value: Any

    def name(self) -> str:
        return self.label

    def as_numpy(self) -> Any:
        return self.value


@dataclass
class _Request:
    tensors: list[_Tensor]
    wanted: list[str]

    def inputs(self) -> list[_Tensor]:
        return self.tensors

    def requested_output_names(self) -> list[str]:
        return self.wanted


@dataclass
class _Response:
    output_tensors: list[_Tensor] = field(default_factory=list)
    error: str | None = None


def test_requests_of_a_batch_and_one_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small_model(tmp_path, "python_backend_models")
    export_model(source, tmp_path / "exported", target="ort")
    package_model(tmp_path / "exported", "triton", tmp_path / "repository", name="served", backend="python")
    place = tmp_path / "repository" / "served"
    config = (place / "config.pbtxt").read_text()
    assert 'backend: "python"\ndefault_model_filename: "model.py"\n' in config
    assert 'parameters { key: "model" value { string_value: "model.onnx" } }' in config
    utilities = ModuleType("triton_python_backend_utils")
    for name, value in {"Tensor": _Tensor, "InferenceResponse": _Response, "TritonError": str}.items():
        setattr(utilities, name, value)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utilities)
    spec = importlib.util.spec_from_file_location("served_model", place / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    output = json.loads((tmp_path / "exported" / "manifest.json").read_text())["outputs"][0]["name"]
    model = module.TritonPythonModel()
    model.initialize(
        {
            "model_repository": str(place), "model_version": "1", "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
            "model_config": json.dumps(
                {"output": [{"name": output}], "parameters": {"model": {"string_value": "model.onnx"}}}
            ),
        }
    )  # fmt: skip
    tokens = [np.array([[1, 2, 3]]), np.array([[4, 5], [6, 7]])]
    requests = [_Request([_Tensor("input_ids", value)], [output]) for value in tokens]
    wrong = _Request([_Tensor("tokens", tokens[0])], [output])
    answers = model.execute([requests[0], wrong, requests[1]])
    assert "missing: input_ids" in answers[1].error
    net = load_model(source).model
    for answer, value in zip((answers[0], answers[2]), tokens, strict=True):
        (tensor,) = answer.output_tensors
        assert (tensor.label, answer.error) == (output, None)
        np.testing.assert_allclose(tensor.value, net(torch.tensor(value)).detach().numpy(), rtol=0, atol=2e-6)
    model.finalize()
