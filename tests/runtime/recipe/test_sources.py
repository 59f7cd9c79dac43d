"""What a source names, and when its fingerprint changes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rmsnorm_deploy.runtime.recipe.hashes import Hashes
from rmsnorm_deploy.runtime.recipe.sources import fingerprint, located, source_kind


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "models.py").write_text("def net(): ...")
    (tmp_path / "owner" / "model").mkdir(parents=True)
    (tmp_path / "owner" / "model" / "config.json").write_text("{}")
    for name in ("weights.bin", "optimizer.pt"):
        with (tmp_path / "owner" / "model" / name).open("wb") as file:
            file.truncate((1 << 20) + 1)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("builtin:small", "builtin"), ("models.py:net", "file"), ("./models.py:net", "file"), ("no.py:net", "missing"),
        ("package.module:net", "module"), ("owner/model", "folder"), ("./owner", "folder"), ("./no", "missing"),
        ("a/b/c", "missing"), ("other/model", "hub"), ("gpt2", "hub"), ("models.py", "missing"), ("", "missing"),
    ],
)  # fmt: skip
def test_what_a_source_names(source: str, kind: str, base: Path) -> None:
    assert source_kind(source, base) == kind


def test_paths_become_absolute(base: Path) -> None:
    assert located("./owner/model", base) == f"{base}/owner/model"
    assert located("models.py:net", base) == f"{base}/models.py:net"
    assert located("other/model", base) == "other/model"


def _print(source: str, base: Path) -> Any:
    return fingerprint(source, base, Hashes(base / "dist"))


def test_files_are_compared_by_their_bytes_and_not_by_their_times(base: Path) -> None:
    folder = base / "owner" / "model"
    before = _print("owner/model", base)
    assert sorted(before) == ["config.json", "optimizer.pt", "weights.bin"]
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))
    assert _print("owner/model", base) == before
    (folder / "config.json").write_text("[]")
    other = _print("owner/model", base)
    assert [name for name in before if before[name] != other[name]] == ["config.json"]
    _change(folder / "weights.bin")
    last = _print("owner/model", base)
    assert [name for name in before if other[name] != last[name]] == ["weights.bin"]


def test_large_files_that_no_model_is_loaded_from_count_by_their_size(base: Path) -> None:
    folder = base / "owner" / "model"
    before = _print("owner/model", base)
    _change(folder / "optimizer.pt")
    assert _print("owner/model", base) == before
    with (folder / "optimizer.pt").open("ab") as file:
        file.write(b"x")
    assert _print("owner/model", base) != before


def _change(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"other")


def test_python_files_and_names(base: Path) -> None:
    before = _print("models.py:net", base)
    (base / "models.py").touch()
    assert _print("models.py:net", base) == before
    (base / "models.py").write_text("def net(): pass")
    assert _print("models.py:net", base) != before
    assert _print("other/model", base) == "other/model"


def test_the_kinds_of_files(base: Path) -> None:
    for name, kind in (("a.onnx", "onnx"), ("a.npz", "arrays"), ("b.onnx", "missing"), ("b.safetensors", "missing")):
        if kind != "missing":
            (base / name).write_bytes(b"1")
        assert source_kind(name, base) == kind
    before = [_print(name, base) for name in ("a.onnx", "a.npz")]
    assert located("a.onnx", base) == str(base / "a.onnx")
    for name in ("a.onnx", "a.npz"):
        (base / name).write_bytes(b"2")
    assert all(one != other for one, other in zip(before, (_print("a.onnx", base), _print("a.npz", base)), strict=True))
