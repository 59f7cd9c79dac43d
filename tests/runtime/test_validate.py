"""validate: passes what is right, fails what is wrong, and says what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers.families import build
from helpers.small_models import Residual, residual_inputs

from rmsnorm_deploy.export.exporter import prepare, save
from rmsnorm_deploy.models.errors import EnvironmentMissingError, UsageError
from rmsnorm_deploy.models.recognise import recognise
from rmsnorm_deploy.runtime.exported import norm_nodes, open_exported
from rmsnorm_deploy.runtime.truth import truth_model
from rmsnorm_deploy.runtime.validate import validate


@pytest.fixture(scope="module")
def model() -> Residual:
    return Residual().eval()


@pytest.fixture(scope="module")
def folder(model: Residual, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "out"
    save(prepare(model, inputs=residual_inputs()), path, "primitives")
    return path


def test_an_honest_export_passes_and_reports(folder: Path, model: Residual) -> None:
    report = validate(folder, model)
    rows = report.to_dict()
    assert rows["verdict"] == "pass"
    assert [row["case"] for row in rows["outputs"]] == ["1x1", "1x7", "3x33"]
    assert all(0 < row["figures"]["cosine"] <= 1 + 1e-12 for row in rows["outputs"])
    assert rows["provenance"]["candidate"]["providers_used"] == ["CPUExecutionProvider"]
    assert rows["schema"] == "rmsnorm_deploy.validate/1"


def test_a_single_file_is_validated_too(folder: Path, model: Residual) -> None:
    assert validate(folder / "model.onnx", model).verdict == "pass"


@pytest.mark.parametrize("change", ["eps", "weight", "gamma_dropped"])
def test_a_changed_norm_fails(folder: Path, model: Residual, change: str, tmp_path: Path) -> None:
    graph = onnx.load(folder / "model.onnx")
    changed = 0
    for tensor in graph.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor).copy()
        if change == "eps" and array.shape == () and abs(float(array) - 1e-5) < 1e-9:
            array *= 1000
        elif change == "weight" and tensor.name == "norms.1.weight":
            array[3] *= 1.01
        elif change == "gamma_dropped" and tensor.name == "norms.0.weight":
            array[:] = 1
        else:
            continue
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        changed += 1
    assert changed == 1
    onnx.save(graph, tmp_path / "changed.onnx")
    report = validate(tmp_path / "changed.onnx", model)
    assert report.verdict == "fail"


def test_explicit_tolerances_replace_the_yardstick(folder: Path, model: Residual) -> None:
    assert validate(folder, model, atol=1.0).verdict == "pass"
    assert validate(folder, model, atol=0.0, rtol=0.0).verdict == "fail"


def test_given_inputs_are_the_only_case(folder: Path, model: Residual) -> None:
    inputs = {"x": np.ones((2, 2, 16), np.float32)}
    report = validate(folder, model, inputs=inputs)
    assert [case for case, _ in report.rows] == ["given inputs"]


def test_equal_seeds_give_equal_figures(folder: Path, model: Residual) -> None:
    first, second, other = (validate(folder, model, seed=seed).to_dict()["outputs"] for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_what_does_not_fit_is_said(folder: Path, model: Residual, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"exported in float32, but the PyTorch model is in float16"):
        validate(folder, Residual().half())
    with pytest.raises(UsageError, match="there is no"):
        validate(tmp_path / "nothing", model)
    with pytest.raises(UsageError, match=r"manifest\.json"):
        validate(tmp_path, model)
    with pytest.raises(UsageError, match="both must be at least 1"):
        validate(folder, model, shapes=[(0, 4)])
    with pytest.raises(EnvironmentMissingError, match="CUDA"):
        validate(folder, model, provider="cuda")
    with pytest.raises(UsageError, match=r"y.*x|x.*y"):
        validate(folder, model, inputs={"y": np.ones((2, 2, 16), np.float32)})


def test_norm_nodes_are_read_from_the_file(folder: Path) -> None:
    rows = norm_nodes(folder / "model.onnx")
    assert [row["path"] for row in rows] == ["norms.0", "norms.1"]
    assert {row["form"] for row in rows} == {"add"}
    assert open_exported(folder).dtype == "float32"


def test_the_truth_is_float64_throughout() -> None:
    """Widening a model alone leaves its norms in float32; the truth's error must be far below that."""
    model = build("llama")
    ids = torch.arange(3, 12)[None]
    exact = truth_model(model)
    with torch.no_grad():
        truth = exact(input_ids=ids).logits
        widened = build("llama").double()(input_ids=ids).logits
        again = truth_model(model)(input_ids=ids).logits
    assert truth.dtype == torch.float64
    assert torch.equal(truth, again)
    scale = truth.abs().max()
    assert 1e-10 < (truth - widened).abs().max() / scale < 1e-5


def test_the_truth_does_not_change_the_model() -> None:
    model = build("gemma3")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    truth_model(model)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all("forward" not in vars(module) for module in model.modules())
    assert len(recognise(model).sites) == 13
