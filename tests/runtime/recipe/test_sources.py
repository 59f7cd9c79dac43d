"""What a source names, and when its fingerprint changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rmsnorm_deploy.runtime.recipe.sources import fingerprint, located, source_kind


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "models.py").write_text("def net(): ...")
    (tmp_path / "owner" / "model").mkdir(parents=True)
    (tmp_path / "owner" / "model" / "config.json").write_text("{}")
    with (tmp_path / "owner" / "model" / "weights.bin").open("wb") as file:
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


def test_small_files_are_compared_by_their_bytes_and_large_ones_by_their_time(base: Path) -> None:
    folder = base / "owner" / "model"
    before = fingerprint("owner/model", base)
    assert before == fingerprint("owner/model", base)
    assert sorted(before) == ["config.json", "weights.bin"]
    status = (folder / "config.json").stat()
    (folder / "config.json").write_text("[]")
    os.utime(folder / "config.json", ns=(status.st_atime_ns, status.st_mtime_ns))
    other = fingerprint("owner/model", base)
    assert [name for name in before if before[name] != other[name]] == ["config.json"]
    os.utime(folder / "weights.bin", ns=(1, 1))
    last = fingerprint("owner/model", base)
    assert [name for name in before if other[name] != last[name]] == ["weights.bin"]


def test_python_files_and_names(base: Path) -> None:
    before = fingerprint("models.py:net", base)
    (base / "models.py").touch()
    assert fingerprint("models.py:net", base) == before
    (base / "models.py").write_text("def net(): pass")
    assert fingerprint("models.py:net", base) != before
    assert fingerprint("other/model", base) == "other/model"
