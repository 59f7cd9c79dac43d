"""An engine's three files: in place together, and never over what is not ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rmsnorm_deploy.export.onnx_io.owned_files import sha256
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.engines.engine_file import SCHEMA, read_record, record_of
from rmsnorm_deploy.runtime.tensorrt import worker
from rmsnorm_deploy.runtime.tensorrt.engine_files import (
    check_not_input,
    check_place,
    keep_log,
    log_of,
    move_into_place,
    partial_folder,
)
from rmsnorm_deploy.runtime.tensorrt.process import LOG_HEADER


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "model.engine"


def built(place: Path, content: bytes = b"an engine", **changes: Any) -> dict[str, Any]:
    """An engine as a build leaves it; its record."""
    with partial_folder(place) as folder:
        (folder / worker.ENGINE).write_bytes(content)
        (folder / worker.LOG).write_text(f"{LOG_HEADER} model.onnx\nall is well\n")
        digest = sha256(folder / worker.ENGINE)
        record = {"schema": SCHEMA, "engine": place.name, "bytes": len(content), "sha256": digest, **changes}
        move_into_place(folder, place, record)
    return record


def listing(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_three_files_are_in_place_and_nothing_else(place: Path) -> None:
    record = built(place)
    assert listing(place.parent) == {"model.engine", "model.engine.json", "model.engine.log"}
    assert place.read_bytes() == b"an engine"
    assert log_of(place).read_text().startswith(LOG_HEADER)
    assert json.loads(record_of(place).read_text()) == record == read_record(place)
    check_place(place)


def test_an_earlier_build_is_replaced(place: Path) -> None:
    built(place)
    built(place, b"another")
    check_place(place)
    assert place.read_bytes() == b"another"


def test_what_cannot_be_moved_is_said(tmp_path: Path) -> None:
    with partial_folder(tmp_path / "model.engine") as folder, pytest.raises(UsageError, match=r"model\.engine"):
        move_into_place(folder, tmp_path / "model.engine", {})
    assert listing(tmp_path) == set()


# ----------------------------------------------------------------------------------------------------- check_place


def test_an_empty_place_is_free(place: Path) -> None:
    check_place(place)
    check_place(place.parent / "not there yet" / "model.engine")


@pytest.mark.parametrize("name", [".", "..", "folder"])
def test_a_folder_is_no_engine(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="directory"):
        check_place(tmp_path / name)


@pytest.mark.parametrize("suffix", ["", ".json", ".log"])
def test_somebody_elses_files_are_kept(place: Path, suffix: str) -> None:
    file = place.with_name(place.name + suffix)
    file.write_text("somebody's")
    with pytest.raises(UsageError, match="model.engine" + suffix.replace(".", r"\.")):
        check_place(place)


@pytest.mark.parametrize("content", [b"an enginE", b"an engine and more"])
def test_an_engine_that_the_record_does_not_describe_is_kept(place: Path, content: bytes) -> None:
    built(place)
    place.write_bytes(content)
    with pytest.raises(UsageError, match=r"model\.engine"):
        check_place(place)


@pytest.mark.parametrize("suffix", ["", ".json", ".log"])
def test_links_are_not_followed(place: Path, suffix: str) -> None:
    built(place)
    file = place.with_name(place.name + suffix)
    target = place.parent / "target"
    file.rename(target)
    file.symlink_to(target)
    with pytest.raises(UsageError, match="model.engine" + suffix.replace(".", r"\.")):
        check_place(place)


def test_a_link_that_leads_nowhere_is_something_too(place: Path) -> None:
    log_of(place).symlink_to(place.parent / "gone")
    with pytest.raises(UsageError, match="log"):
        check_place(place)


def test_a_record_without_its_engine_may_be_built_again(place: Path) -> None:
    built(place)
    place.unlink()
    check_place(place)


@pytest.mark.parametrize(
    "change", [{"schema": "rmsnorm_deploy.engine/0"}, {"engine": "another.engine"}, {"engine": None}]
)
def test_records_that_are_not_of_this_engine(place: Path, change: dict[str, Any]) -> None:
    built(place, **change)
    assert read_record(place) is None
    with pytest.raises(UsageError):
        check_place(place)


@pytest.mark.parametrize("text", ["", "[]", "null", "\x00"])
def test_a_record_that_cannot_be_read_is_none(place: Path, text: str) -> None:
    record_of(place).write_text(text)
    assert read_record(place) is None


def test_no_file_of_an_engine_may_be_one_of_the_model(tmp_path: Path) -> None:
    place = tmp_path / "model.engine"
    check_not_input(place, [tmp_path / "model.onnx", tmp_path / "model.json"])
    for file in (place, record_of(place), log_of(place)):
        with pytest.raises(UsageError, match=file.name.replace(".", r"\.")):
            check_not_input(place, [tmp_path / "model.onnx", tmp_path / "sub" / ".." / file.name])


# ------------------------------------------------------------------------------------- logs and partial folders


def test_a_failed_builds_log_is_kept(place: Path) -> None:
    (place.parent / "log").write_text("why")
    keep_log(place.parent / "log", place)
    assert log_of(place).read_text() == "why"
    keep_log(place.parent / "gone", place)  # without a log there is nothing to keep
    assert listing(place.parent) == {"model.engine.log"}


def test_a_partial_folder_vanishes_with_or_without_an_error(tmp_path: Path) -> None:
    place = tmp_path / "new" / "model.engine"
    with partial_folder(place) as folder:
        assert folder.parent == place.parent
        (folder / "file").write_text("")
    with pytest.raises(ArithmeticError), partial_folder(place):
        raise ArithmeticError
    assert listing(place.parent) == set()


def left(place: Path, parent: object, extra: str | None = None) -> Path:
    """A folder as a build leaves it that was killed."""
    folder = place.parent / f".{place.name}.partial-abc"
    folder.mkdir()
    (folder / worker.REQUEST).write_text(json.dumps({"parent": parent}))
    if extra is not None:
        (folder / extra).write_text("")
    return folder


def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_build_left_is_removed(place: Path) -> None:
    folder = left(place, gone(), worker.ENGINE)
    with partial_folder(place):
        assert not folder.exists()


@pytest.mark.parametrize("case", ["running", "other file", "no number", "no request"])
def test_anything_else_that_looks_like_it_is_kept(place: Path, case: str) -> None:
    parent: object = os.getpid() if case == "running" else "x" if case == "no number" else gone()
    folder = left(place, parent, "holiday.jpg" if case == "other file" else None)
    if case == "no request":
        (folder / worker.REQUEST).unlink()
    with partial_folder(place):
        assert folder.is_dir()


def test_builds_of_other_engines_are_left_alone(place: Path) -> None:
    folder = left(place.with_name("other.engine"), gone())
    with partial_folder(place):
        assert folder.is_dir()


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file"), partial_folder(tmp_path / "file" / "model.engine"):
        pass
