"""Engines on disk: which product runs them, and whether they are what was built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rmsnorm_deploy.export.onnx_io.owned_files import sha256
from rmsnorm_deploy.models.errors import EnvironmentMissingError, UsageError
from rmsnorm_deploy.runtime.engines import engine_file
from rmsnorm_deploy.runtime.engines.engine_file import SCHEMA, EngineFile, is_engine, open_engine_file, record_of
from rmsnorm_deploy.runtime.inputs.exported import open_exported


def engine(folder: Path, name: str = "m.engine", **changes: Any) -> Path:
    """A file with a record as `rmsnorm build` writes it, as far as it is read here."""
    place = folder / name
    place.write_bytes(b"an engine")
    record = {
        "schema": SCHEMA, "engine": name, "bytes": 9, "sha256": sha256(place), "runtime": {"name": "rtx"},
        "model": {"path": str(folder / "model.onnx"), "folder": None, "manifest": {}}, **changes,
    }  # fmt: skip
    record_of(place).write_text(json.dumps(record), encoding="utf-8")
    return place


def test_an_engine_is_known_by_its_record_or_its_suffix(tmp_path: Path) -> None:
    assert is_engine(engine(tmp_path, "any.name"))
    for name, expected in (("a.engine", True), ("a.PLAN", True), ("a.trt", True), ("a.onnx", False), ("a", False)):
        (tmp_path / name).write_bytes(b"x")
        assert is_engine(tmp_path / name) is expected
    (tmp_path / "b.engine").mkdir()
    assert not is_engine(tmp_path / "b.engine")


def test_the_record_names_product_model_and_dims(tmp_path: Path) -> None:
    file = open_engine_file(engine(tmp_path, inputs=[{"name": "x", "dims": ["rows", 8]}]))
    assert (file.runtime, file.model, file.manifest) == ("rtx", tmp_path / "model.onnx", {})
    assert file.dims() == {"x": ["rows", 8]}
    assert file.read() == b"an engine"


def test_an_engine_that_was_changed_is_refused(tmp_path: Path) -> None:
    place = engine(tmp_path)
    place.write_bytes(b"a longer engine")
    with pytest.raises(UsageError, match=r"is not the engine that m.engine.json describes: expected 9 bytes, got 15"):
        open_engine_file(place).read()
    place.write_bytes(b"an Engine")
    with pytest.raises(UsageError, match=r"its SHA-256 is another one. .*Build it again: rmsnorm build"):
        open_engine_file(place).read()


def test_files_that_are_no_engines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none.engine does not exist"):
        open_engine_file(tmp_path / "none.engine")
    (tmp_path / "empty.engine").write_bytes(b"")
    with pytest.raises(UsageError, match=r"empty.engine is empty"):
        open_engine_file(tmp_path / "empty.engine")
    with pytest.raises(UsageError, match=r"was built by TensorRT-RTX, so TensorRT cannot run it"):
        open_engine_file(engine(tmp_path), "tensorrt")
    with pytest.raises(UsageError, match=r"runtime: expected tensorrt or rtx, got 'ort'"):
        open_engine_file(engine(tmp_path), "ort")


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        (("rtx",), "rtx"),
        (("tensorrt",), "tensorrt"),
        ((), "neither TensorRT nor TensorRT-RTX is installed. Give --runner tensorrt or --runner rtx"),
        (("tensorrt", "rtx"), "TensorRT and TensorRT-RTX are both installed. Give --runner tensorrt or --runner rtx"),
    ],
)
def test_an_engine_without_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], expected: str
) -> None:
    """Such as trtexec builds."""
    monkeypatch.setattr(engine_file, "is_installed", lambda name: name in installed)
    place = tmp_path / "other.plan"
    place.write_bytes(b"x")
    if expected in ("rtx", "tensorrt"):
        assert open_engine_file(place) == EngineFile(place, expected)  # type: ignore[arg-type]
    else:
        with pytest.raises(EnvironmentMissingError, match=expected):
            open_engine_file(place)
    assert open_engine_file(place, "tensorrt").runtime == "tensorrt"
    assert open_engine_file(place, "rtx").read() == b"x"  # nothing to compare with


def test_an_engine_is_opened_as_an_exported_model(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    model = {"path": "", "folder": str(folder), "manifest": {"dtype": "float16"}, "end_tokens": [2, 5]}
    found = open_exported(engine(tmp_path, model=model))
    assert (found.is_engine, found.folder, found.dtype, found.end_tokens) == (True, folder, "float16", (2, 5))
    folder.rmdir()
    assert open_exported(engine(tmp_path, model=model)).folder is None
    (tmp_path / "plain.plan").write_bytes(b"x")
    assert open_exported(tmp_path / "plain.plan").manifest == {}
