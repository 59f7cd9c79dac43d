"""What the doctor sees of this machine: nvidia-smi, the driver's library, the products, the plugin's library."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rmsnorm_deploy.plugins.tensorrt.library import LIBRARY_NAME, LIBRARY_VARIABLE
from rmsnorm_deploy.runtime import doctor_looks
from rmsnorm_deploy.runtime.doctor_looks import look
from rmsnorm_deploy.runtime.doctor_records import Driver


class FakeDriver:
    """The driver's library with two GPUs, the second of which cannot be asked.

    Args:
        fails: the function that reports an error.
    """

    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == self.fails:
                return 100
            return self.answer(name, arguments)

        return call

    def answer(self, name: str, arguments: tuple[Any, ...]) -> int:
        if name == "cuDeviceGetName":
            arguments[0].value = b"a GPU"
            return 0
        if name == "cuDeviceGet":
            return 101 if arguments[1] else 0
        numbers = {"cuDriverGetVersion": 12080, "cuDeviceGetCount": 2}
        if name == "cuDeviceGetAttribute":
            numbers[name] = {75: 8, 76: 9}[arguments[1]]
        if name in numbers:
            ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_int))[0] = numbers[name]
        return 0


@pytest.mark.parametrize(
    ("fails", "driver"),
    [
        ("", Driver("580.1", (12, 8), (("a GPU", 89),))),
        ("cuInit", Driver("580.1", (12, 8))),
        ("cuDeviceGetCount", Driver("580.1", (12, 8))),
        ("cuDeviceGetAttribute", Driver("580.1", (12, 8))),
        ("cuDriverGetVersion", Driver("580.1")),
    ],
)
def test_the_driver(monkeypatch: pytest.MonkeyPatch, fails: str, driver: Driver) -> None:
    monkeypatch.setattr(doctor_looks, "_driver_library", lambda: FakeDriver(fails))
    assert doctor_looks._driver(["NVIDIA H200, 143771 MiB, 580.1"]) == driver


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(doctor_looks, "_driver_library", missing)
    assert doctor_looks._driver([]) == Driver()


@pytest.mark.parametrize(("status", "wanted"), [(0, ["NVIDIA H200, 143771 MiB, 580.1"]), (9, [])])
def test_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, wanted: list[str]) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 580.1'\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(doctor_looks, "_driver_library", lambda: FakeDriver("cuInit"))
    found = look()
    assert found.gpus == wanted
    assert found.driver.version == ("580.1" if wanted else None)


def test_gpus_of_the_driver_where_nvidia_smi_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_looks, "_smi_devices", list)
    monkeypatch.setattr(doctor_looks, "_driver_library", FakeDriver)
    assert look().gpus == ["a GPU"]


def test_a_product_without_builder_and_its_lean_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module and the lean runtime's are stand-ins; the process that reads the registry has neither."""
    module = ModuleType("tensorrt")
    module.__version__ = "11.4.0"  # type: ignore[attr-defined]
    module.OnnxParser = object  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", module)
    found = doctor_looks._product("tensorrt", doctor_looks.PluginState())
    assert (found.version, found.kind, found.has_parser) == ("11.4.0", "runtime only", True)
    if not doctor_looks._has_module("tensorrt.plugin"):
        assert found.registry_problem == "No module named 'tensorrt'"


def test_a_file_that_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / LIBRARY_NAME
    place.write_bytes(b"not a library")
    monkeypatch.setenv(LIBRARY_VARIABLE, str(place))
    found = doctor_looks._plugin()
    assert found.library == str(place)
    assert "not a library of rmsnorm-deploy" in found.problem
    assert not found.is_usable
    assert found.registering is None
