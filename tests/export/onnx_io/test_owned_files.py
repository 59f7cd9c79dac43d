"""What this package wrote is recognized, and nothing else is."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from rmsnorm_deploy.cli.arrays import write_npz
from rmsnorm_deploy.export.onnx_io.manifest import write_manifest
from rmsnorm_deploy.export.onnx_io.owned_files import (
    MANIFEST,
    delete_export,
    foreign_files,
    has_manifest,
    is_own_report,
    sha256,
)
from rmsnorm_deploy.runtime.report import html, junit
from tests.helpers.interface.report_sample import sample_report


def exported(folder: Path) -> Path:
    """An export with a file in a subfolder."""
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "sub" / "b").write_text("2")
    write_manifest(folder, {})
    return folder


def test_an_export_as_it_was_written_has_nothing_foreign(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    assert (foreign_files(folder), has_manifest(folder)) == ([], True)
    delete_export(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_has_lost_files_is_still_ours(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    (folder / "a").unlink()
    assert foreign_files(folder) == []


def test_what_is_not_ours_is_named_and_never_deleted(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    (folder / "sub" / "c").write_text("mine")
    (folder / "a").write_text("changed")
    assert foreign_files(folder) == ["a", "sub/c"]
    delete_export(folder)
    assert (folder / "sub" / "b").read_text() == "2"


@pytest.mark.parametrize(
    "files",
    [None, [], {"a": 1}, {"../secret": {}}, {"/a": {}}, {"": {}}, {"./a": {}}],
    ids=["missing", "list", "row that is a number", "outside", "absolute", "empty", "dot"],
)
def test_a_damaged_manifest_makes_nothing_ours(files: object, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a").write_text("mine")
    (folder / MANIFEST).write_text(json.dumps({"schema": "rmsnorm_deploy.manifest/2", "files": files}))
    assert "a" in foreign_files(folder)
    delete_export(folder)
    assert ((folder / "a").read_text(), (tmp_path / "secret").read_text()) == ("mine", "mine")


def test_reports_and_arrays_are_recognized(tmp_path: Path) -> None:
    report = sample_report(norms=1)
    html.write(report, tmp_path / "r.html")
    junit.write(report, tmp_path / "r.xml")
    (tmp_path / "r.json").write_text(json.dumps(report, indent=2))
    write_npz(tmp_path / "r.npz", {"x": np.zeros(2)})
    assert [is_own_report(file) for file in sorted(tmp_path.iterdir())] == [True] * 4
    # Writing them again replaces them.
    html.write(report, tmp_path / "r.html")
    junit.write(report, tmp_path / "r.xml")
    write_npz(tmp_path / "r.npz", {"x": np.ones(2)})
    assert np.load(tmp_path / "r.npz")["x"].tolist() == [1.0, 1.0]


def test_files_of_others_are_not(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(2))
    (tmp_path / "b.json").write_text('{"schema": "rmsnorm_deploy.manifest/2"}')
    (tmp_path / "c.md").write_text("How we use rmsnorm-deploy: rmsnorm_deploy.validate/7")
    (tmp_path / "d.html").write_text("<!doctype html><title>mine</title>")
    (tmp_path / "e.xml").write_text('<?xml version="1.0"?><testsuites/>')
    (tmp_path / "f.zip").write_bytes(b"PK damaged")
    with zipfile.ZipFile(tmp_path / "g.zip", "w") as archive:
        archive.comment = b"mine"
    (tmp_path / "h").symlink_to("a.npz")
    (tmp_path / "i").mkdir()
    assert [is_own_report(file) for file in sorted(tmp_path.iterdir())] == [False] * 9


@pytest.mark.parametrize("data", [b"", b"abc", b"x" * 1_000_003])
def test_sha256(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(data)
    assert sha256(tmp_path / "f") == hashlib.sha256(data).hexdigest()
