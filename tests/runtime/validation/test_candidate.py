"""What can be held against PyTorch: files, modules and runners, each opened as often as it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from rmsnorm_deploy.models.errors import EnvironmentMissingError, UsageError
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.runtime.inputs.exported import Exported
from rmsnorm_deploy.runtime.norms.norm_model import norm_model
from rmsnorm_deploy.runtime.norms.onnx_norms import OnnxNorms
from rmsnorm_deploy.runtime.validation.candidate import candidate_of
from rmsnorm_deploy.runtime.validation.options import ValidationOptions
from tests.helpers.runtime.stand_ins import FunctionRunner

OPTIONS = ValidationOptions()
FEEDS = {"input": np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _ = norm_model(NormSpec(eps=1e-6), [8], "float32", "standard", np.ones(8, np.float32))
    path = tmp_path_factory.mktemp("file") / "norm.onnx"
    ir.save(model, path)
    return path


@pytest.mark.parametrize("kind", [str, Path, Exported])
def test_a_file_is_run_in_onnx_runtime_and_opened_at_its_norms(file: Path, kind: type) -> None:
    candidate = candidate_of(kind(file), OPTIONS)
    assert candidate.name == str(file)
    assert candidate.manifest == {}
    for _ in range(2):
        with candidate.opened() as runner:
            assert runner.provenance()["providers_used"] == ["CPUExecutionProvider"]
            y = runner.run({"x": FEEDS["input"]})["y"]
    x = FEEDS["input"].astype(np.float64)
    np.testing.assert_allclose(y, x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6), rtol=1e-6)
    assert candidate.norms is not None
    access = candidate.norms({})
    assert isinstance(access, OnnxNorms)
    assert access.keys == [("norm", 0)]


def test_the_manifest_and_the_provider_are_handed_on(file: Path) -> None:
    exported = Exported(file, file.parent, {"dtype": "float16"})
    assert candidate_of(exported, OPTIONS).manifest == {"dtype": "float16"}
    elsewhere = candidate_of(exported, ValidationOptions(provider="tensorrt"))
    with pytest.raises(EnvironmentMissingError, match="Tensorrt"), elsewhere.opened():
        pass


def test_the_window_is_handed_on(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("rmsnorm_deploy.runtime.validation.candidate.OnnxNorms", lambda *given: seen.append(given))
    norms = candidate_of(file, ValidationOptions(window=3)).norms
    assert norms is not None
    norms({})
    assert seen == [(file, "cpu", 3)]


def test_a_module_is_run_in_pytorch_and_opened_at_its_norms() -> None:
    model = nn.Sequential(nn.RMSNorm(8, eps=1e-6), nn.Linear(8, 8), nn.RMSNorm(8, eps=1e-6)).eval()
    candidate = candidate_of(model, OPTIONS)
    assert candidate.name == "Sequential"
    with candidate.opened() as runner:
        found = runner.run(FEEDS)["output"]
    with torch.no_grad():
        assert np.array_equal(found, model(torch.from_numpy(FEEDS["input"])).numpy())
    assert candidate.norms is not None
    assert candidate.norms(FEEDS).keys == [("0", 0), ("2", 0)]


def test_a_runner_stays_open_and_shows_no_norms() -> None:
    runner = FunctionRunner(lambda feeds: {"y": feeds["input"]})
    candidate = candidate_of(runner, OPTIONS)
    assert (candidate.name, candidate.norms) == ("FunctionRunner", None)
    with candidate.opened() as opened:
        assert opened is runner
    assert not runner.closed


@pytest.mark.parametrize("thing", [3, None, b"bytes", object()])
def test_anything_else_is_refused(thing: Any) -> None:
    with pytest.raises(UsageError, match=type(thing).__name__):
        candidate_of(thing, OPTIONS)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.onnx"):
        candidate_of(tmp_path / "nothing.onnx", OPTIONS)
