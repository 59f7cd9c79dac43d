"""Packages for trtexec: the script, its shapes and the plugin's library."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from rmsnorm_deploy import export_model, package_model, verify_folder
from rmsnorm_deploy.models.errors import UnsupportedError
from rmsnorm_deploy.plugins.tensorrt import library
from tests.helpers.models.factory_file import small_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory.mktemp("packages"), "built_models")


def words_of(folder: Path, tmp_path: Path, *more: str) -> list[str]:
    """The arguments that the script gives to trtexec, and the folder in which it runs."""
    tool = tmp_path / "bin" / "trtexec"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text('#!/bin/sh\npwd\nfor word in "$@"; do echo "$word"; done\n')
    tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}"}
    done = subprocess.run([folder / "build.sh", *more], capture_output=True, text=True, check=True, env=environment)
    return done.stdout.splitlines()


def test_the_script_builds_the_model_beside_it(source: str, tmp_path: Path) -> None:
    export_model(source, tmp_path / "out", target="standard")
    made = package_model(tmp_path / "out", "trtexec", tmp_path / "package")
    place, *words = words_of(tmp_path / "package", tmp_path, "--verbose")
    assert place == str(tmp_path / "package")
    assert {"--onnx=model.onnx", "--saveEngine=model.engine", "--stronglyTyped", "--verbose"} <= set(words)
    (least,) = [word for word in words if word.startswith("--minShapes=")][:1]
    assert least == "--minShapes=input_ids:1x1"
    assert not [word for word in words if "Plugins" in word]
    assert made.notes == ["no validation report is in it; add one with --report, from rmsnorm validate --json"]
    assert {file.problem for file in verify_folder(tmp_path / "package")} == {None}


@pytest.mark.parametrize("is_built", [True, False])
def test_plugin_nodes_come_with_their_library(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_built: bool
) -> None:
    export_model(source, tmp_path / "out", target="plugin")
    place = tmp_path / "built" / library.LIBRARY_NAME
    if is_built:
        place.parent.mkdir()
        place.write_bytes(b"a library")
    monkeypatch.setattr(library, "find_library", lambda: place if is_built else None)
    made = package_model(tmp_path / "out", "trtexec", tmp_path / "package")
    script = (tmp_path / "package" / "build.sh").read_text()
    if is_built:
        assert f"--dynamicPlugins=./{library.LIBRARY_NAME}" in shlex.split(script.splitlines()[-1])
        assert (tmp_path / "package" / library.LIBRARY_NAME).read_bytes() == b"a library"
        assert library.LIBRARY_NAME in made.files
    else:
        assert '--dynamicPlugins="$(rmsnorm plugin path)"' in script
        assert made.notes[0] == (
            "the plugin's library is not built yet: build.sh asks for it with $(rmsnorm plugin path)"
        )


def test_operators_that_trtexec_does_not_parse(source: str, tmp_path: Path) -> None:
    export_model(source, tmp_path / "out", target="ort")
    with pytest.raises(UnsupportedError, match=r"expected a file for one of standard, primitives, plugin, .* for ort"):
        package_model(tmp_path / "out", "trtexec", tmp_path / "package")
