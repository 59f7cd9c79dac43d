"""A folder or a file is there whole or not at all, and nothing that others wrote is touched."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest

from rmsnorm_deploy.export.onnx_io import atomic_files
from rmsnorm_deploy.export.onnx_io.atomic_files import (
    MANIFEST,
    check_destination,
    copy_companions,
    new_file,
    new_folder,
    sha256,
)
from rmsnorm_deploy.models.errors import UsageError


def tree(folder: Path) -> dict[str, str]:
    """Every file under a folder, hidden ones too, with its text."""
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def fill(out: Path, error: BaseException | None = None) -> None:
    """Make a folder with one file in it, or fail after that."""
    with new_folder(out) as partial:
        (partial / "f").write_text("1")
        if error is not None:
            raise error


def fill_file(path: Path, error: BaseException | None = None) -> None:
    """Make a file, or fail after that."""
    with new_file(path) as partial:
        partial.write_text("new")
        if error is not None:
            raise error


def enter(check: bool, out: Path) -> None:
    """Ask whether a folder could be made, or begin to make it."""
    if check:
        check_destination(out)
        return
    with new_folder(out):
        raise AssertionError("the block must not run")


# Folders --------------------------------------------------------------------------------------------------------------


def test_a_folder_takes_its_name_when_the_block_ends(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as partial:
        assert partial.parent == tmp_path
        assert partial.name.startswith(".out.partial-")
        (partial / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert tree(tmp_path) == {"out/a": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_missing_parents_are_made_and_a_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with new_folder("~/a/b/out") as partial:
        (partial / "f").write_text("1")
    assert tree(tmp_path) == {"a/b/out/f": "1"}


def test_a_folder_vanishes_when_the_block_fails_and_so_do_its_parents(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fill(tmp_path / "a" / "b" / "out", ZeroDivisionError())
    assert list(tmp_path.iterdir()) == []


def test_parents_with_something_else_in_them_stay(tmp_path: Path) -> None:
    def fails() -> None:
        with new_folder(tmp_path / "a" / "out"):
            (tmp_path / "a" / "other").write_text("1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert tree(tmp_path) == {"a/other": "1"}


def test_the_folder_has_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "out"):
            pass
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


def test_an_earlier_export_of_ours_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST).write_text("{}")
    (out / "old").write_text("1")
    with new_folder(out) as partial:
        (partial / "new").write_text("2")
        assert tree(out) == {MANIFEST: "{}", "old": "1"}
    assert tree(tmp_path) == {"out/new": "2"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_earlier_export_stays_when_the_block_fails(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST).write_text("{}")
    with pytest.raises(ZeroDivisionError), new_folder(out):
        raise ZeroDivisionError
    assert tree(tmp_path) == {f"out/{MANIFEST}": "{}"}


def test_an_earlier_export_comes_back_when_the_new_one_cannot_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST).write_text("{}")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UsageError, match=r"writing .*out failed: No space left on device\. Nothing was left behind"):
        fill(out)
    assert tree(tmp_path) == {f"out/{MANIFEST}": "{}"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as partial:
        (partial / "f").write_text("1")
    assert tree(tmp_path) == {"out/f": "1"}


@pytest.mark.parametrize("check", [True, False], ids=["check_destination", "new_folder"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: out.write_text("1"), "give another path"),
        (lambda out: out.symlink_to(out.parent / "nowhere"), "give another path"),
        (lambda out: (out.mkdir(), (out / "f").write_text("1")), "holds files that no export wrote"),
    ],
    ids=["file", "link", "folder of others"],
)
def test_what_others_wrote_is_refused_and_stays(check: bool, make: object, message: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)  # type: ignore[operator]
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=message):
        enter(check, out)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("check", [True, False], ids=["check_destination", "new_folder"])
def test_a_place_below_a_file_cannot_be_written_to(check: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    with pytest.raises(UsageError, match=r"cannot (write to|read) "):
        enter(check, tmp_path / "file" / "out")
    assert tree(tmp_path) == {"file": "1"}


def test_a_full_disk_is_a_usage_error_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"writing .*out failed: No space left on device\."):
        fill(tmp_path / "out", OSError(28, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_the_block_does_not_find_is_the_blocks_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out"):
        (tmp_path / "missing").read_text()
    assert list(tmp_path.iterdir()) == []


def test_check_destination_leaves_nothing(tmp_path: Path) -> None:
    check_destination(tmp_path / "a" / "b" / "out")
    assert list(tmp_path.iterdir()) == []


def test_check_destination_tries_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(prefix: str, dir: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(atomic_files.tempfile, "mkdtemp", failing)
    with pytest.raises(UsageError, match=f"cannot write to {tmp_path}: Permission denied"):
        check_destination(tmp_path / "out")


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_file_takes_its_name_when_the_block_ends(tmp_path: Path) -> None:
    with new_file(tmp_path / "m.onnx") as partial:
        assert (partial.parent, partial.suffix) == (tmp_path, ".onnx")
        partial.write_text("1")
        assert not (tmp_path / "m.onnx").exists()
    assert tree(tmp_path) == {"m.onnx": "1"}


def test_a_file_vanishes_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fill_file(tmp_path / "m.onnx", ZeroDivisionError())
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("old")
    with pytest.raises(UsageError, match=r"m\.onnx exists; give a new file name"):
        fill_file(tmp_path / "m.onnx")
    assert tree(tmp_path) == {"m.onnx": "old"}


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"writing .* failed: No such file or directory"):
        fill_file(tmp_path / "none" / "m.onnx")


# Companions and hashes ------------------------------------------------------------------------------------------------


def test_companions_are_configs_and_tokenizers_and_nothing_else(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir()
    folder.mkdir()
    for name in (
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors",
        "README.md",
        "secret.json",
    ):
        (source / name).write_text(name)
    (source / "vocab.json").mkdir()
    copy_companions(source, folder)
    assert tree(folder) == {name: name for name in ("chat_template.jinja", "config.json", "tokenizer.json")}


def test_companions_of_a_place_that_is_missing_are_none(tmp_path: Path) -> None:
    copy_companions(tmp_path / "none", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"", b"abc", b"x" * 1_000_003])
def test_sha256(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(data)
    assert sha256(tmp_path / "f") == hashlib.sha256(data).hexdigest()
