"""Files that are not trusted: only regular files, never more than their size, JSON of limited depth."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.regular_files import DEEPEST_JSON, read_bytes, read_json, regular_size


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    assert regular_size(tmp_path / "f") == 5
    assert read_bytes(tmp_path / "f", 5) == b"12345"
    with pytest.raises(UsageError, match="f: expected at most 4 bytes, got 5"):
        read_bytes(tmp_path / "f", 4)


def test_what_is_not_a_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        with pytest.raises(UsageError, match=f"expected a regular file, got {kind}"):
            read_bytes(path, 10)
        with pytest.raises(UsageError, match=f"expected a regular file, got {kind}"):
            read_json(path, "")


@pytest.mark.skipif(not Path("/proc/kmsg").exists(), reason="no /proc")
def test_a_file_without_an_end_gives_no_more_than_its_size() -> None:
    assert read_bytes(Path("/proc/self/maps"), 1 << 20) == b""


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_name_that_is_no_file_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_bytes(tmp_path / name, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 200_000, "expected JSON of at most 100 levels"),
        (b"[" * 101 + b"]" * 101, "expected JSON of at most 100 levels"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "expected JSON of at most 100 levels"),
        (b"9" * 5000, "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
    ],
)
def test_json_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(UsageError, match=f"f.json:? {message}.* Write it again."):
        read_json(tmp_path / "f.json", "Write it again.")


def test_json_of_the_deepest_nesting(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text("[" * DEEPEST_JSON + "]" * DEEPEST_JSON)
    assert read_json(tmp_path / "f.json", "") is not None
