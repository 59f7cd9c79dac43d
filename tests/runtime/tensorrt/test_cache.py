"""The engine cache: what is an equal engine, what is not, and what happens to a damaged entry."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.tensorrt.build import build_engine
from rmsnorm_deploy.runtime.tensorrt.cache import engine_key
from rmsnorm_deploy.runtime.tensorrt.options import BuildOptions
from rmsnorm_deploy.runtime.tensorrt.plan import plan_build
from tests.helpers.tensorrt.tensorrt_models import rms_norm_model

pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install 'rmsnorm-deploy[rtx]'")
OPTIONS = BuildOptions(architectures=(89,))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return rms_norm_model(tmp_path / "model.onnx")


def key_of(model: Path, options: BuildOptions = OPTIONS) -> str:
    with plan_build(model, options) as plan:
        return engine_key(plan)


def test_an_equal_engine_is_not_built_again(model: Path, tmp_path: Path) -> None:
    first = build_engine(model, tmp_path / "a.engine", OPTIONS, cache=tmp_path / "cache")
    second = build_engine(model, tmp_path / "b" / "b.engine", OPTIONS, cache=tmp_path / "cache")
    assert (first.from_cache, second.from_cache) == (False, True)
    assert first.path.read_bytes() == second.path.read_bytes()
    assert second.record == {**first.record, "engine": "b.engine", "log": "b.engine.log"}
    assert second.log.read_text() == first.log.read_text()


def test_whatever_changes_the_engine_changes_the_key(model: Path, tmp_path: Path) -> None:
    key = key_of(model)
    assert key_of(model) == key
    moved = tmp_path / "elsewhere" / "other.onnx"
    moved.parent.mkdir()
    shutil.copy(model, moved)
    assert key_of(moved) == key
    assert key_of(model, dataclasses.replace(OPTIONS, memory_limit=10_000, verbose=True)) == key
    changes = [
        {"architectures": (86,)}, {"profiles": ("x:1x64,2x64,3x64",)}, {"workspace": 64}, {"norm": "plugin"},
        {"refit": True}, {"version_compatible": True}, {"float64_as_float32": True},
    ]  # fmt: skip
    keys = [key_of(model, dataclasses.replace(OPTIONS, **change)) for change in changes]  # type: ignore[arg-type]
    assert len({key, *keys}) == 1 + len(changes)
    assert key_of(rms_norm_model(tmp_path / "other.onnx", epsilon=1e-5)) not in {key, *keys}


def test_weights_outside_the_file_count(tmp_path: Path) -> None:
    path = rms_norm_model(tmp_path / "model.onnx")
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="weights", size_threshold=0)
    key = key_of(path)
    weights = np.fromfile(tmp_path / "weights", np.float16)
    weights[0] += 1
    weights.tofile(tmp_path / "weights")
    assert key_of(path) != key


@pytest.mark.parametrize("damage", ["cut", "changed", "no record", "bad record", "no log"])
def test_a_damaged_entry_is_built_again(model: Path, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    build_engine(model, tmp_path / "a.engine", OPTIONS, cache=cache)
    (entry,) = (folder for folder in cache.iterdir() if folder.is_dir())
    engine, record = entry / "engine", entry / "record.json"
    if damage == "cut":
        engine.write_bytes(engine.read_bytes()[:-1])
    elif damage == "changed":
        content = bytearray(engine.read_bytes())
        content[len(content) // 2] ^= 1
        engine.write_bytes(content)
    elif damage == "no record":
        record.unlink()
    elif damage == "bad record":
        record.write_text(json.dumps([1]))
    else:
        (entry / "build.log").unlink()
    again = build_engine(model, tmp_path / "b.engine", OPTIONS, cache=cache)
    assert not again.from_cache
    assert build_engine(model, tmp_path / "c.engine", OPTIONS, cache=cache).from_cache


def test_two_builds_at_once_are_one(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rmsnorm_deploy", "build", str(model), "--cache", str(tmp_path / "cache"),
               "--arch", "89", "--json", "-o"]  # fmt: skip
    both = [
        subprocess.Popen([*command, str(tmp_path / f"{n}.engine")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for n in range(2)
    ]
    answers = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert sorted(json.loads(out)["from_cache"] for out, _ in answers) == [False, True]
    assert (tmp_path / "0.engine").read_bytes() == (tmp_path / "1.engine").read_bytes()


def test_a_cache_that_cannot_be_made_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--cache: cannot create"):
        build_engine(model, tmp_path / "a.engine", OPTIONS, cache=model / "cache")
