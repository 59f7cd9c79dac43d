"""The Python interface: what users pass in, what they get back, and how results show themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import rmsnorm_deploy as rd
from rmsnorm_deploy.models import companions
from tests.helpers.models.families import build
from tests.helpers.models.small_models import Residual, residual_inputs

FACTORY = """
from tests.helpers.models.small_models import Residual, residual_inputs

def residual():
    return Residual(), residual_inputs()
"""


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("user") / "user_models.py"
    path.write_text(FACTORY)
    return f"{path}:residual"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Residual().eval()


@pytest.fixture(scope="module")
def folder(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rd.export_model(model, tmp_path_factory.mktemp("out") / "out", inputs=residual_inputs()).folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of transformers with a tokenizer, as `save_pretrained` leaves them."""
    path = tmp_path_factory.mktemp("checkpoint")
    build("llama").save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


# ----------------------------------------------------------------------------------------------------------- export


def test_one_target_returns_one_result_and_several_a_list(model: nn.Module, tmp_path: Path) -> None:
    one = rd.export_model(model, tmp_path / "one", target="ort", inputs=residual_inputs())
    assert isinstance(one, rd.ExportResult)
    assert (one.target, one.folder) == ("ort", tmp_path / "one")
    several = rd.export_model(model, tmp_path / "several", target=["ort"], inputs=residual_inputs())
    assert [result.target for result in several] == ["ort"]
    with pytest.raises(rd.UsageError, match="target is empty; expected one or several of primitives"):
        rd.export_model(model, tmp_path / "none", target=[], inputs=residual_inputs())


def test_a_model_is_exported_and_validated_by_its_name(factory: str, tmp_path: Path) -> None:
    result = rd.export_model(factory, tmp_path / "out", dtype="float16")
    assert (result.manifest["source"], result.manifest["dtype"]) == (factory, "float16")
    report = rd.validate(tmp_path / "out", factory, outputs_only=True)
    assert report.verdict == "pass"
    assert (report.settings["candidate"], report.settings["against"]) == (str(tmp_path / "out"), factory)
    small = rd.export_model("builtin:small", str(tmp_path / "small"))
    assert rd.validate(str(small.folder), Path("builtin:small"), shapes=[(1, 2)]).verdict == "pass"


def test_a_folder_brings_its_config_and_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    for number, source in enumerate((checkpoint, str(checkpoint))):
        result = rd.export_model(source, tmp_path / str(number))
        assert {"config.json", "tokenizer.json"} <= set(result.files)
        assert result.manifest["source"] == str(checkpoint)


def test_a_module_of_from_pretrained_brings_its_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    result = rd.export_model(loaded, tmp_path / "out")
    assert {"config.json", "tokenizer.json"} <= set(result.files)
    assert result.manifest["notes"] == []
    own = rd.export_model(loaded, tmp_path / "own", companions=tmp_path)
    assert "tokenizer.json" not in own.files


def test_a_module_of_the_hub_brings_what_the_hub_has(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no hub here: its client is replaced, first by one that has the files, then by one that fails."""
    asked: list[tuple[str, Any]] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(checkpoint)

    loaded = build("llama")
    loaded.name_or_path = "owner/model"
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert "tokenizer.json" in rd.export_model(loaded, tmp_path / "out").files
    assert asked == [("owner/model", list(companions.COMPANIONS))]

    def offline(name: str, *, allow_patterns: list[str]) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    result = rd.export_model(loaded, tmp_path / "offline")
    assert "tokenizer.json" not in result.files
    assert result.manifest["notes"] == [
        "config and tokenizer files of owner/model could not be downloaded: ConnectionError: no network"
    ]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_inputs_may_be_numpy_arrays(dtype: str, tmp_path: Path) -> None:
    tensor = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    array = rd.models.tensors.to_numpy(tensor)
    files = []
    for number, given in enumerate((tensor, array)):
        result = rd.export_model(
            Residual().to(tensor.dtype), tmp_path / str(number), target="plugin", inputs={"x": given}
        )
        files.append((result.folder / "model.onnx").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "expected a PyTorch module, or the name or folder of a model, got int"),
        ({"model": torch.ones(2)}, "expected a PyTorch module, or the name or folder of a model, got Tensor"),
        ({"model": "no/such/model"}, "no/such/model"),
        ({"target": "tensorflow"}, "target: expected one of primitives, .* got 'tensorflow'"),
    ],
)
def test_what_export_cannot_use_is_refused(
    arguments: dict[str, Any], message: str, model: nn.Module, tmp_path: Path
) -> None:
    given = {"model": model, "path": tmp_path / "out", "inputs": residual_inputs(), **arguments}
    with pytest.raises(rd.UsageError, match=message):
        rd.export_model(given.pop("model"), given.pop("path"), **given)
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------- validate


@pytest.mark.parametrize(
    ("candidate", "against", "message"),
    [
        (None, 3, "expected a PyTorch module, or the name or folder of one, to compare with; got int"),
        (3, None, "expected a path, a PyTorch module or a runner to validate, got int"),
        ("nosuch.onnx", None, "nosuch.onnx"),
        (None, "builtin:nosuch", "unknown built-in model 'nosuch'"),
    ],
)
def test_what_validate_cannot_use_is_refused(
    candidate: Any, against: Any, message: str, folder: Path, model: nn.Module
) -> None:
    with pytest.raises(rd.UsageError, match=message):
        rd.validate(folder if candidate is None else candidate, model if against is None else against)


def test_options_come_as_an_object_or_by_name(folder: Path, model: nn.Module) -> None:
    options = rd.ValidationOptions(shapes=((2, 3),), outputs_only=True, limits={"*": rd.Limits(atol=1.0)})
    reports = [
        rd.validate(folder, model, options),
        rd.validate(folder, model, rd.ValidationOptions(seed=0), shapes=[(2, 3)], outputs_only=True,
                    limits={"*": rd.Limits(atol=1.0)}),
    ]  # fmt: skip
    first, second = (report.to_dict() for report in reports)
    assert first.pop("created")
    assert second.pop("created")
    assert first == second
    with pytest.raises(TypeError, match="nosuch"):
        rd.validate(folder, model, nosuch=1)


# ------------------------------------------------------------------------------------------------------- reports


@pytest.fixture(scope="module")
def report(folder: Path, model: nn.Module) -> rd.ValidationReport:
    case = rd.Case("<one>", {"x": np.ones((2, 3, 16), np.float32)})
    return rd.validate(folder, model, cases=[case])


def test_a_report_prints_as_a_short_table(report: rd.ValidationReport) -> None:
    lines = str(report).splitlines()
    assert lines[0].split()[:3] == ["case", "output", "verdict"]
    assert lines[1].split()[:3] == ["<one>", "output", "pass"]
    assert lines[-2] == "1 of 1 output, 2 of 2 norms, 3 of 3 segments as accurate as PyTorch."
    assert lines[-1] == "verdict: pass"
    assert len(lines) < 10


def test_a_report_shows_in_a_notebook(report: rd.ValidationReport) -> None:
    shown = report._repr_html_()
    root = ElementTree.fromstring(f"<div>{shown}</div>")
    assert [cell.text for cell in root.findall("table/tbody/tr/td")][:3] == ["<one>", "output", "pass"]
    assert "&lt;one&gt;" in shown
    assert root.findall("div")[-1].text == "verdict: pass"


def test_a_report_is_written_in_three_forms(report: rd.ValidationReport, tmp_path: Path) -> None:
    report.save(tmp_path / "report.json")
    report.to_html(tmp_path / "report.html")
    report.to_junit(tmp_path / "report.xml")
    content = json.loads((tmp_path / "report.json").read_text())
    assert (content["schema"], content["verdict"]) == ("rmsnorm_deploy.validate/7", "pass")
    assert "<html" in (tmp_path / "report.html").read_text()
    suites = ElementTree.parse(tmp_path / "report.xml").getroot().findall("testsuite")
    assert {suite.get("failures") for suite in suites} == {"0"}
    with pytest.raises(rd.UsageError, match="nosuch"):
        report.save(tmp_path / "nosuch" / "report.json")


def test_comparisons_and_risk_reports_print_too(report: rd.ValidationReport, tmp_path: Path) -> None:
    for name, factor in (("a", 1.0), ("b", 1.5)):
        np.savez(tmp_path / f"{name}.npz", y=np.full((2, 8), factor, np.float32))
    compared = rd.compare(tmp_path / "a.npz", tmp_path / "b.npz")
    assert str(compared).splitlines()[-1] == "verdict: fail"
    found = rd.risk(Residual().eval(), [{"x": np.ones((2, 3, 16), np.float32)}], targets=("ort",))
    assert isinstance(found, rd.RiskReport)
    assert str(found).splitlines()[-3].startswith("float32: ")
    found.save(tmp_path / "risk.json")
    assert json.loads((tmp_path / "risk.json").read_text())["schema"] == "rmsnorm_deploy.risk/1"
    assert "<table>" in found._repr_html_()
