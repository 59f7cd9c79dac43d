"""A validation run again: what its report keeps, and reports that cannot be run again; and what both sides are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rmsnorm_deploy.export.from_torch.export_model import prepare
from rmsnorm_deploy.export.from_torch.save import save
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.loading import LoadedModel
from rmsnorm_deploy.runtime.accuracy.tolerances import Limits
from rmsnorm_deploy.runtime.inputs.exported import Exported, open_exported
from rmsnorm_deploy.runtime.report.report_file import BISECT_SCHEMA, VALIDATE_SCHEMA
from rmsnorm_deploy.runtime.validation import sides
from rmsnorm_deploy.runtime.validation.api import validate
from rmsnorm_deploy.runtime.validation.options import ValidationOptions
from rmsnorm_deploy.runtime.validation.replay import Replay, read_replay
from rmsnorm_deploy.runtime.validation.result import ValidationReport, differences
from rmsnorm_deploy.runtime.validation.sides import is_model_source, load_against
from tests.helpers.models.small_models import Residual, residual_inputs

SOURCE = """
import torch
from tests.helpers.models.small_models import Residual, residual_inputs

def residual():
    return Residual(), residual_inputs()

def mixed():
    model = Residual().half()
    model.norms.float()
    return model
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "requested.py"
    path.write_text(SOURCE)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "out"
    return save(prepare(Residual().eval(), inputs=residual_inputs()), path, "primitives").folder


def again(replay: Replay) -> ValidationReport:
    return validate(replay.candidate, replay.against, replay.options)


# ----------------------------------------------------------------------------------------------------- run and kept


def test_the_report_contains_every_setting(folder: Path, source: str, tmp_path: Path) -> None:
    name = f"{source}:residual"
    options = ValidationOptions(seed=3, shapes=((2, 5),), limits={"*": Limits(atol=1.0)}, window=1, depth=True)
    report = validate(folder, name, options).to_dict()
    assert (report["schema"], report["verdict"]) == (VALIDATE_SCHEMA, "pass")
    assert report["settings"] == {"candidate": str(folder), "against": name, **options.to_dict()}
    assert [row["case"] for row in report["outputs"]] == ["2x5"]
    assert len(report["depth"]) == 4
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    replay = read_replay(path)
    assert (replay.candidate, replay.against, replay.options) == (str(folder), name, options)
    assert differences(replay.report, json.loads(json.dumps(again(replay).to_dict()))) == []
    other = validate(folder, name, options, seed=4, limits={})
    assert {"settings", "outputs", "norms"} <= set(differences(replay.report, other.to_dict()))


def test_every_option_goes_through_a_report(tmp_path: Path) -> None:
    """Each field with a value that is not its default, so that none is lost on the way."""
    given: dict[str, Any] = {
        "dtype": "float16", "provider": "cuda", "seed": 5, "shapes": ((1, 2), (3, 4)), "prompts": ("a", "b"),
        "tokenizer": "t", "limits": {"y": Limits(rtol=0.5, min_top1=0.5)}, "outputs_only": True, "depth": True,
        "window": 3, "lossy": "int4", "runners": ("ort", "rtx"),
    }  # fmt: skip
    path = tmp_path / "report.json"
    for values in (given, {"inputs": "x.npz", "bisect": True}, {"thorough": True, "deep": True}):
        options = ValidationOptions(**values)
        settings = {"candidate": "out", "against": "builtin:small", **options.to_dict()}
        path.write_text(json.dumps({"schema": VALIDATE_SCHEMA, "settings": settings}))
        assert read_replay(path).options == options
    fields = {field.name for field in dataclasses.fields(ValidationOptions)}
    assert fields == {*given, "inputs", "bisect", "thorough", "deep"}


def test_a_bisection_is_kept_as_one(folder: Path, source: str, tmp_path: Path) -> None:
    report = validate(folder, f"{source}:residual", shapes=((1, 2),), bisect=True)
    assert (report.schema, len(report.depth)) == (BISECT_SCHEMA, 4)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report.to_dict()))
    assert read_replay(path).options.bisect


def test_a_pytorch_candidate_is_loaded_and_run_on_its_own_example_inputs(source: str) -> None:
    name = f"{source}:residual"
    report = validate(name, name, shapes=((2, 4),))
    assert (report.verdict, len(report.norms)) == ("pass", 2)
    assert [row.figures.differing for _, row in report.rows if row.figures] == [0]


def test_progress_is_reported_step_by_step(folder: Path, source: str) -> None:
    lines: list[str] = []
    validate(folder, f"{source}:residual", shapes=((1, 2),), progress=lines.append)
    assert lines[0] == f"loading {source}:residual"
    assert f"{folder / 'model.onnx'}: 1x2 (1 of 1)" in lines
    assert "PyTorch in float64: 1x2 (1 of 1)" in lines


def test_a_report_on_objects_cannot_be_run_again(folder: Path, source: str, tmp_path: Path) -> None:
    cases = [{"x": np.ones((1, 2, 16), np.float32)}]
    for against, given in ((Residual().eval(), None), (f"{source}:residual", cases)):
        report = validate(folder, against, cases=given, shapes=((1, 2),), outputs_only=True)
        path = tmp_path / "report.json"
        path.write_text(json.dumps(report.to_dict()))
        with pytest.raises(UsageError, match="does not name both sides"):
            read_replay(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inputs": "x.npz", "prompts": ("hi",)}, "inputs and prompts are both given"),
        ({"shapes": ((0, 4),)}, "shape 0x4: expected a batch and a length of at least 1"),
        ({"window": 0}, "window: expected at least 1 norm, or None for all, got 0"),
        ({"seed": -1}, "seed: expected a number of at least 0, got -1"),
        ({"bisect": True, "outputs_only": True}, "bisect checks norms and segments"),
    ],
)
def test_options_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ValidationOptions(**values)


def test_remote_code_is_trusted_by_who_runs_it_and_never_by_a_report(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted: list[bool] = []

    def load(source: str, *, trust_remote_code: bool = False, **options: Any) -> LoadedModel:
        trusted.append(trust_remote_code)
        return LoadedModel(Residual().eval(), source, "python")

    monkeypatch.setattr(sides, "load_model", load)
    options = ValidationOptions(shapes=((1, 2),), outputs_only=True)
    report = validate(folder, "owner/model", options, trust_remote_code=True).to_dict()
    assert "trust_remote_code" not in json.dumps(report)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    again(read_replay(path))
    assert trusted == [True, False]
    report["settings"]["trust_remote_code"] = True
    path.write_text(json.dumps(report))
    with pytest.raises(UsageError, match=r"its settings cannot be run again: trust_remote_code"):
        read_replay(path)


# --------------------------------------------------------------------------------------------------- broken reports


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("\udcff", "cannot be read as JSON"),
        ("[]", "expected the schema rmsnorm_deploy.validate/7 or rmsnorm_deploy.bisect/6, got None"),
        ("{}", "rmsnorm_deploy.bisect/6, got None"),
        ('{"schema": "rmsnorm_deploy.validate/1"}', "rmsnorm_deploy.bisect/6, got 'rmsnorm_deploy.validate/1'"),
        ('{"schema": "rmsnorm_deploy.validate/3"}', "rmsnorm_deploy.bisect/6, got 'rmsnorm_deploy.validate/3'"),
        (json.dumps({"schema": VALIDATE_SCHEMA}), "expected settings, got None"),
        (json.dumps({"schema": VALIDATE_SCHEMA, "settings": {"seed": 0}}), "it does not name both sides"),
    ],
)
def test_a_file_that_is_not_a_report_of_this_version_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=message) as caught:
        read_replay(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("candidate", 3), ("against", None), ("seed", "x"), ("shapes", "abc"), ("shapes", [[1]]), ("window", "x"),
     ("prompts", "hi"), ("limits", 1.0), ("outputs_only", "no"), ("limits", {"y": {"atol": "x"}})],
)  # fmt: skip
def test_settings_of_the_wrong_type_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    settings = {"candidate": "out", "against": "builtin:small", **ValidationOptions().to_dict(), name: value}
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"schema": VALIDATE_SCHEMA, "settings": settings}))
    with pytest.raises(UsageError, match=rf"(its settings cannot be run again|it does not name both sides).*{name}"):
        read_replay(path)


def test_a_report_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nosuch\.json: cannot be read: No such file"):
        read_replay(tmp_path / "nosuch.json")
    with pytest.raises(UsageError, match="expected a regular file, got a folder"):
        read_replay(tmp_path)


# ------------------------------------------------------------------------------------------------------ both sides


def test_what_names_a_pytorch_model(folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    (tmp_path / "a:b.onnx").touch()
    names = {
        "builtin:small": True, "models.py:make": True, "package.module:make": True, str(checkpoint): True,
        str(folder): False, str(folder / "model.onnx"): False, "nosuch.onnx": False, str(tmp_path / "a:b.onnx"): False,
    }  # fmt: skip
    assert {name: is_model_source(name) for name in names} == names
    (folder / "config.json").write_text("{}")  # copied beside an export by the exporter
    assert not is_model_source(str(folder))


def dtypes(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


def test_the_model_is_loaded_in_the_exported_dtype_by_default(folder: Path, source: str) -> None:
    exported = open_exported(folder)
    half = Exported(exported.model, exported.folder, {**exported.manifest, "dtype": "float16"})
    name = f"{source}:residual"
    assert dtypes(load_against(name, None, exported, False).model) == {torch.float32}
    assert dtypes(load_against(name, None, half, False).model) == {torch.float16}
    assert dtypes(load_against(name, "bfloat16", half, False).model) == {torch.bfloat16}
    assert dtypes(load_against(name, None, None, False).model) == {torch.float32}
    # A model that mixes dtypes stays mixed where its first one is the exported one.
    assert dtypes(load_against(f"{source}:mixed", None, half, False).model) == {torch.float16, torch.float32}


def test_outliers_of_the_export_are_applied(folder: Path) -> None:
    record = {"channels": 2, "factor": 50.0, "seed": 0}
    exported = Exported(folder / "model.onnx", folder, {"outliers": record})
    plain, changed = (load_against("builtin:small", None, e, False).model for e in (None, exported))
    found = {
        name: set(np.flatnonzero((new != old).reshape(-1, old.shape[-1]).any(dim=0)).tolist())
        for (name, new), old in zip(changed.named_parameters(), plain.parameters(), strict=True)
    }
    channels = {name: indices for name, indices in found.items() if indices}
    (indices,) = {frozenset(value) for value in channels.values()}
    assert len(indices) == 2
    embedding = next(name for name in channels if "embed" in name)
    ratio = changed.get_parameter(embedding)[:, list(indices)] / plain.get_parameter(embedding)[:, list(indices)]
    np.testing.assert_allclose(ratio.detach().numpy(), 50.0, rtol=1e-6)
