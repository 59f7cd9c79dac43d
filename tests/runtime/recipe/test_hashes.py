"""Hashes that are kept: a large file is read again only if its size or time changed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.recipe import hashes as module
from rmsnorm_deploy.runtime.recipe.hashes import Hashes

_LARGE = bytes(1 << 20)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read."""
    found: list[str] = []
    real = module.sha256

    def counted(path: Path) -> str:
        found.append(path.name)
        return real(path)

    monkeypatch.setattr(module, "sha256", counted)
    return found


def test_a_large_file_is_read_once(tmp_path: Path, read: list[str]) -> None:
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(_LARGE)
    small.write_bytes(b"1")
    first = Hashes(tmp_path / "dist")
    assert first.of(large) == hashlib.sha256(_LARGE).hexdigest()
    assert first.of(small) == hashlib.sha256(b"1").hexdigest()
    (tmp_path / "dist").mkdir()
    first.save()
    second = Hashes(tmp_path / "dist")
    assert second.of(large) == first.of(large)
    second.of(small)
    assert read == ["large", "small", "small"]
    # The time is another after a checkout, and the content the same.
    os.utime(large, ns=(1, 1))
    assert second.of(large) == hashlib.sha256(_LARGE).hexdigest()
    assert read[3:] == ["large"]
    second.save()
    large.write_bytes(_LARGE + b"1")
    assert Hashes(tmp_path / "dist").of(large) == hashlib.sha256(_LARGE + b"1").hexdigest()


def test_without_large_files_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"1")
    hashes = Hashes(tmp_path)
    hashes.of(tmp_path / "small")
    hashes.save()
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"schema": "rmsnorm_deploy.hashes/1"}', '{"schema": "rmsnorm_deploy.hashes/1", "files": [1]}']
)
def test_a_damaged_file_is_made_anew(text: str, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(_LARGE)
    (tmp_path / "hashes.json").write_text(text)
    hashes = Hashes(tmp_path)
    assert hashes.of(tmp_path / "large") == hashlib.sha256(_LARGE).hexdigest()
    if "schema" not in text:
        with pytest.raises(UsageError, match="rmsnorm did not write it"):
            hashes.save()
        return
    hashes.save()
    assert list(json.loads((tmp_path / "hashes.json").read_text())["files"]) == [str(tmp_path / "large")]
