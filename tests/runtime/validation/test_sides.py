"""Both sides of a validation from what a user names, and the inputs that they run on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from rmsnorm_deploy.export.onnx_io.manifest import SCHEMA, write_manifest
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.runtime.inputs.exported import open_exported
from rmsnorm_deploy.runtime.norms.norm_model import norm_model
from rmsnorm_deploy.runtime.runners.base import TensorInfo
from rmsnorm_deploy.runtime.validation.options import ValidationOptions
from rmsnorm_deploy.runtime.validation.sides import (
    Sides,
    cases_for,
    dtype_of,
    is_model_source,
    load_against,
    open_sides,
)
from tests.helpers.runtime.stand_ins import FunctionRunner

OPTIONS = ValidationOptions()
X = TensorInfo("x", "float32", ("rows", 8))
FACTORY = """
import torch
from torch import nn

calls = []

def make():
    calls.append(1)
    torch.manual_seed(0)
    return nn.Sequential(nn.RMSNorm(8, eps=1e-6)), {"input": torch.ones(2, 8)}
"""


@pytest.fixture
def code(tmp_path: Path) -> str:
    (tmp_path / "sides_factory.py").write_text(FACTORY)
    return f"{tmp_path / 'sides_factory.py'}:make"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported folder whose manifest says float16."""
    place = tmp_path / "exported"
    place.mkdir()
    model, _ = norm_model(NormSpec(eps=1e-6), [8], "float32", "standard", np.ones(8, np.float32))
    ir.save(model, place / "model.onnx")
    write_manifest(place, {"model": "model.onnx", "dtype": "float16"})
    return place


def opened(candidate: Any, model: Any, options: ValidationOptions = OPTIONS) -> tuple[Sides, list[str]]:
    texts: list[str] = []
    return open_sides(candidate, model, options, False, texts.append), texts


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.RMSNorm(8, eps=1e-6)).to(dtype).eval()


# ----------------------------------------------------------------------------------------------- is_model_source


def test_what_names_a_model(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    assert not is_model_source(str(hub))
    (hub / "config.json").write_text("{}")
    assert is_model_source(str(hub))
    (folder / "config.json").write_text("{}")
    assert not is_model_source(str(folder))  # an export copies the config
    assert is_model_source("builtin:addition")
    assert is_model_source("package.module:function")
    assert not is_model_source("model.onnx")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:name.onnx").write_text("")
    assert not is_model_source("odd:name.onnx")


# ---------------------------------------------------------------------------------------------------- open_sides


def test_two_modules(code: str) -> None:
    model, candidate = small(), small()
    sides, texts = opened(candidate, model)
    assert sides.model is model
    assert (sides.against, sides.loaded, sides.folder, sides.named) == (None, None, None, False)
    assert sides.candidate.name == "Sequential"
    assert texts == []


def test_two_names_can_be_run_again(code: str) -> None:
    sides, texts = opened(code, code)
    assert (sides.against, sides.folder, sides.named) == (code, None, True)
    assert sides.loaded is not None
    assert sides.loaded.model is not sides.model
    assert len(texts) == 2
    assert all(code in text for text in texts)


def test_a_name_and_a_module_cannot_be_run_again(code: str) -> None:
    sides, _ = opened(code, small())
    assert (sides.against, sides.named) == (None, False)
    sides, _ = opened(small(), code)
    assert (sides.against, sides.loaded, sides.named) == (code, None, False)


def test_a_runner_against_a_module() -> None:
    runner = FunctionRunner(lambda feeds: {})
    sides, _ = opened(runner, small())
    assert sides.candidate.name == "FunctionRunner"


def test_an_exported_folder_against_a_name_takes_its_dtype(folder: Path, code: str) -> None:
    sides, _ = opened(folder, code)
    assert (sides.folder, sides.named, sides.against) == (folder, True, code)
    assert {p.dtype for p in sides.model.parameters()} == {torch.float16}
    assert sides.candidate.manifest["dtype"] == "float16"


def test_a_module_of_another_dtype_than_the_export_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError) as error:
        opened(folder, small())
    assert "float16" in str(error.value)
    assert "float32" in str(error.value)
    assert opened(folder, small(torch.float16))[0].folder == folder


def test_a_dtype_that_was_asked_for_and_is_not_the_exports_is_refused(folder: Path, code: str) -> None:
    with pytest.raises(UsageError, match="float16"):
        opened(folder, code, ValidationOptions(dtype="float32"))


@pytest.mark.parametrize("model", [3, FunctionRunner(lambda feeds: {})])
def test_anything_else_as_the_model_is_refused(model: Any) -> None:
    with pytest.raises(UsageError, match=type(model).__name__):
        opened(small(), model)


@pytest.mark.parametrize("candidate", [3, None])
def test_anything_else_as_the_candidate_is_refused(candidate: Any) -> None:
    with pytest.raises(UsageError, match=type(candidate).__name__):
        opened(candidate, small())


def test_a_candidate_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.onnx"):
        opened(str(tmp_path / "gone.onnx"), small())


# -------------------------------------------------------------------------------------------------- load_against


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_model_is_loaded_in_the_dtype_asked_for(code: str, dtype: str | None, expected: torch.dtype) -> None:
    model = load_against(code, dtype, None, False).model
    assert {p.dtype for p in model.parameters()} == {expected}


def test_the_dtype_asked_for_comes_before_the_exports(code: str, folder: Path) -> None:
    model = load_against(code, "bfloat16", open_exported(folder), False).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_model_that_is_of_the_exports_dtype_is_loaded_once(
    folder: Path, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rmsnorm_deploy.runtime.validation import sides

    asked: list[Any] = []
    load = sides.load_model
    monkeypatch.setattr(sides, "load_model", lambda s, **k: asked.append(k.get("dtype")) or load(s, **k))
    load_against(code, None, open_exported(folder), False)
    assert asked == [None, "float16"]
    asked.clear()
    load_against(code, None, open_exported(folder / "model.onnx"), False)
    assert asked == [None]


def test_a_lossy_candidate_is_compared_with_the_model_in_its_own_dtype(code: str, folder: Path) -> None:
    opened_sides, _ = opened(folder, code, ValidationOptions(lossy="fp16"))
    assert dtype_of(opened_sides.model) == "float32"
    with pytest.raises(UsageError, match=r"exported in float16.*float32.*give a profile \(--lossy\)"):
        opened(folder, small())
    assert opened(folder, small(), ValidationOptions(lossy="fp16"))[0].named is False


# ----------------------------------------------------------------------------------------------------- cases_for


def cases(options: ValidationOptions, candidate: Any = None, model: nn.Module | None = None) -> Any:
    sides, _ = opened(candidate or FunctionRunner(lambda feeds: {}), model or small())
    return cases_for(sides, [X], options, False).cases


def test_inputs_come_first(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", x=np.ones((3, 8), np.float32))
    (case,) = cases(ValidationOptions(inputs=str(tmp_path / "rows.npz"), shapes=((2, 2),)))
    assert case.name == "rows.npz"
    assert np.array_equal(case.feeds["x"], np.ones((3, 8)))


def test_made_up_inputs_else() -> None:
    found = cases(ValidationOptions(shapes=((2, 2), (5, 1)), seed=1))
    assert [case.feeds["x"].shape for case in found] == [(2, 8), (5, 8)]
    other = cases(ValidationOptions(shapes=((2, 2), (5, 1)), seed=2))
    assert not np.array_equal(found[0].feeds["x"], other[0].feeds["x"])


def test_planned_inputs_if_nothing_is_asked_for() -> None:
    assert [case.feeds["x"].shape for case in cases(OPTIONS)] == [(1, 8), (2, 8), (1, 8), (5, 8)]


@pytest.mark.parametrize("options", [{"shapes": ((2, 2),)}, {"inputs": "rows.npz"}], ids=["shapes", "inputs"])
def test_what_is_not_tried_is_said(options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("rows.npz", x=np.ones((3, 8), np.float32))
    sides, _ = opened(FunctionRunner(lambda feeds: {}), small())
    (untried,) = cases_for(sides, [X], ValidationOptions(**options), False).untried
    assert "generated inputs: omit" in untried


def test_a_model_that_was_named_brings_its_own_inputs(code: str) -> None:
    (case,) = cases(OPTIONS, code)
    assert {name: value.shape for name, value in case.feeds.items()} == {"input": (2, 8)}


def ids_of(sides: Sides, options: ValidationOptions) -> list[list[int]]:
    infos = [TensorInfo("input_ids", "int64", ("batch", "sequence"))]
    return [case.feeds["input_ids"][0].tolist() for case in cases_for(sides, infos, options, False).cases]


def test_prompts_are_read_with_the_tokenizer_that_was_named() -> None:
    sides, _ = opened(FunctionRunner(lambda feeds: {}), small())
    options = ValidationOptions(prompts=("12+34=", "1+1="), tokenizer="builtin:addition")
    found = ids_of(sides, options)
    assert [len(ids) for ids in found] == [6, 4]
    assert found[0][-1] == found[1][-1]


def test_the_tokenizer_is_looked_for_beside_the_candidate(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "tokenizer": "rmsnorm_deploy.addition"}))
    sides, _ = opened(folder, small(torch.float16))
    assert len(ids_of(sides, ValidationOptions(prompts=("1+1=",)))[0]) == 4


def test_without_a_tokenizer_prompts_are_refused() -> None:
    sides, _ = opened(FunctionRunner(lambda feeds: {}), small())
    with pytest.raises(UsageError, match="tokenizer"):
        ids_of(sides, ValidationOptions(prompts=("1+1=",)))


# ------------------------------------------------------------------------------------------- the manifest's source


def exported_from(folder: Path, source: str | None) -> Path:
    content = {"schema": SCHEMA, "model": "model.onnx", "dtype": "float32", "source": source}
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return folder


def test_the_manifest_names_the_model(folder: Path, code: str) -> None:
    exported_from(folder, code)
    sides = open_sides(folder, None, OPTIONS, False, lambda _: None, allow_code=True)
    assert (sides.against, sides.named, sides.hint) == (code, True, "")


def test_code_that_the_manifest_names_is_run_only_if_that_is_allowed(folder: Path, code: str) -> None:
    with pytest.raises(UsageError, match=r"its manifest names Python code .*sides_factory\.py:make.*--allow-code"):
        opened(exported_from(folder, code), None)


def test_a_model_that_is_gone_is_said(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"exported from \./nosuch, which cannot be loaded: .*--against MODEL"):
        opened(exported_from(folder, "./nosuch"), None)


@pytest.mark.parametrize("source", [None, "/somewhere/model.onnx"])
def test_without_a_source_the_model_is_required(folder: Path, source: str | None) -> None:
    exported_from(folder, source)
    with pytest.raises(UsageError, match=r"--against MODEL is missing, and .* has no manifest that names"):
        opened(folder, None)


def test_another_model_than_the_exported_one_is_a_hint(
    folder: Path, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported_from(folder, "builtin:small")
    sides, _ = opened(folder, code)
    assert sides.hint == f"this export came from builtin:small, and --against names {code}"
    with pytest.raises(UsageError, match=r"exported in float32, but .* float16.* Note that this export came from"):
        opened(folder, code, ValidationOptions(dtype="float16"))
    monkeypatch.chdir(tmp_path)
    exported_from(folder, "sides_factory.py:make")
    assert opened(folder, code)[0].hint == ""
    assert opened(folder, small())[0].hint == ""
