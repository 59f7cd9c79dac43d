"""What was exported, opened: a folder with a manifest, or a single file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rmsnorm_deploy.export.onnx_io.manifest import write_manifest
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.inputs.exported import Exported, open_exported


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "exported"
    place.mkdir()
    (place / "decoder.onnx").write_bytes(b"a graph")
    write_manifest(place, {"model": "decoder.onnx", "dtype": "float16"})
    return place


def test_a_folder_is_its_manifests_model(folder: Path) -> None:
    found = open_exported(folder)
    assert (found.model, found.folder, found.dtype) == (folder / "decoder.onnx", folder, "float16")
    assert found.manifest == json.loads((folder / "manifest.json").read_text())
    assert open_exported(str(folder)) == found


def test_a_manifest_that_names_no_model_means_model_onnx(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"a graph")
    write_manifest(tmp_path, {})
    found = open_exported(tmp_path)
    assert found.model == tmp_path / "model.onnx"
    assert found.dtype is None


def test_a_single_file_has_no_manifest(folder: Path) -> None:
    found = open_exported(folder / "decoder.onnx")
    assert found == Exported(folder / "decoder.onnx")
    assert (found.folder, found.manifest, found.dtype) == (None, {}, None)


def test_the_home_folder_may_be_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert open_exported("~/decoder.onnx").model == folder / "decoder.onnx"
    assert open_exported("~").folder == folder


def test_a_folder_whose_model_is_gone(folder: Path) -> None:
    (folder / "decoder.onnx").unlink()
    with pytest.raises(UsageError, match=r"decoder\.onnx"):
        open_exported(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"schema": "somebody else"}', "{}"])
def test_a_manifest_that_is_not_ours(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UsageError, match="manifest"):
        open_exported(folder)


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"a graph")
    with pytest.raises(UsageError, match="manifest"):
        open_exported(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.onnx"):
        open_exported(tmp_path / "gone.onnx")
