"""TensorRT's registry and the plugin's library, asked in a process that may end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rmsnorm_deploy.plugins import contract
from rmsnorm_deploy.plugins.tensorrt.library import LIBRARY_VARIABLE
from rmsnorm_deploy.runtime import doctor_looks, doctor_registry
from rmsnorm_deploy.runtime.doctor_registry import ask
from tests.helpers.plugins.plugin_library import BuiltLibrary
from tests.helpers.tensorrt.engines import require_rtx


def _names(creators: list[dict[str, str]]) -> set[tuple[str, str, str]]:
    return {(each["name"], each["version"], each["namespace"]) for each in creators}


OURS = {(name, contract.PLUGIN_VERSION, contract.PLUGIN_NAMESPACE) for name in contract.INPUTS}


def test_a_library_tells_about_itself(built_library: BuiltLibrary) -> None:
    told = ask("", str(built_library.path))
    assert told["problem"] == ""
    assert _names(told["creators"]) == OURS
    assert told["info"]["is_current"] is True


def test_what_the_library_registers(built_library: BuiltLibrary) -> None:
    require_rtx()
    assert ask("tensorrt_rtx", None) == {"creators": [], "problem": ""}
    found = ask("tensorrt_rtx", str(built_library.path))
    assert found["problem"] == ""
    assert _names(found["creators"]) == OURS


def test_a_library_that_the_registry_refuses(tmp_path: Path) -> None:
    require_rtx()
    place = tmp_path / "lib.so"
    place.write_bytes(b"not a library")
    found = ask("tensorrt_rtx", str(place))
    assert found["creators"] == []
    assert str(place) in found["problem"]


def test_a_missing_module() -> None:
    assert ask("no_such_module", None) == {"creators": [], "problem": "No module named 'no_such_module'"}


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("#!/bin/sh\necho lost >&2\nkill -SEGV $$\n", "the process ended with code -11: lost"),
        ("#!/bin/sh\nexit 3\n", "the process ended with code 3"),
        ("#!/bin/sh\nexec sleep 30\n", "timed out after"),
    ],
)
def test_a_process_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, problem: str) -> None:
    place = tmp_path / "python"
    place.write_text(program)
    place.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(place))
    monkeypatch.setattr(doctor_registry, "_SECONDS", 1.0)
    assert problem in ask("tensorrt_rtx", None)["problem"]


def test_the_doctor_sees_library_and_registry(built_library: BuiltLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    require_rtx()
    monkeypatch.setenv(LIBRARY_VARIABLE, str(built_library.path))
    found = doctor_looks.look()
    assert found.plugin.is_usable
    assert found.plugin.registering == str(built_library.registering)
    assert _names(list(found.plugin.creators)) == OURS
    rtx = found.products["rtx"]
    assert rtx.kind == "full"
    assert rtx.registry_problem == ""
    assert _names(list(rtx.creators)) == OURS
