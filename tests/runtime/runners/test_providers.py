"""TensorRT's providers in ONNX Runtime: the plugin's library, and a provider from a package of its own."""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from rmsnorm_deploy.models.errors import EnvironmentMissingError, UsageError
from rmsnorm_deploy.plugins import contract
from rmsnorm_deploy.plugins.tensorrt.library import LIBRARY_NAME, LIBRARY_VARIABLE, REGISTERING_NAME
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner, import_onnxruntime
from rmsnorm_deploy.runtime.runners.providers import (
    CPU,
    PLUGIN_LIBRARIES,
    RTX,
    RTX_MODULE,
    TENSORRT,
    chosen_providers,
    open_session,
    with_plugin_library,
)

pytest.importorskip("onnxruntime", reason='needs onnxruntime: pip install "rmsnorm-deploy[cpu]"')

# ------------------------------------------------------------------------------------- the plugin's library


def _model(domain: str, op: str = contract.RMS_NORM, function: bool = False) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "w", "y")]
    graph = helper.make_graph([helper.make_node(op, ["x", "w"], ["y"], domain=domain)], "g", values[:2], values[2:])
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(domain, 1)]
    body = [helper.make_node("Mul", ["X", "scale"], ["Y"])]
    functions = [helper.make_function(domain, op, ["X", "scale"], ["Y"], body, imports[:1])] if function else []
    return helper.make_model(graph, opset_imports=imports, functions=functions)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default library; the one that registers itself beside it is left to the test."""
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / LIBRARY_NAME))
    (tmp_path / LIBRARY_NAME).write_bytes(b"")
    return tmp_path / REGISTERING_NAME


@pytest.mark.parametrize("domain", [contract.DOMAIN, contract.ORT_DOMAIN])
def test_plugin_nodes_get_the_library_that_registers_itself(library: Path, domain: str) -> None:
    library.write_bytes(b"")
    chosen = {TENSORRT: {"device_id": "1"}, CPU: {}}
    found = with_plugin_library(chosen, _model(domain), "m.onnx")
    assert found == {TENSORRT: {"device_id": "1", PLUGIN_LIBRARIES: str(library)}, CPU: {}}
    assert chosen[TENSORRT] == {"device_id": "1"}


def test_a_library_that_the_user_names_is_kept(library: Path) -> None:
    library.write_bytes(b"")
    chosen = {TENSORRT: {PLUGIN_LIBRARIES: "/mine.so"}}
    assert with_plugin_library(chosen, _model(contract.ORT_DOMAIN), "m.onnx") == chosen


@pytest.mark.parametrize("domain", [contract.DOMAIN, contract.ORT_DOMAIN])
def test_a_needed_library_that_is_missing(library: Path, domain: str) -> None:
    with pytest.raises(EnvironmentMissingError) as error:
        with_plugin_library({TENSORRT: {}}, _model(domain), "m.onnx")
    text = str(error.value)
    assert text.startswith("m.onnx: it has plugin nodes without local functions")
    assert f"expected {library}." in text
    assert "rmsnorm plugin build --tensorrt-include DIR" in text
    assert "version 10" in text


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        (CPU, _model(contract.ORT_DOMAIN)),
        (TENSORRT, _model(contract.DOMAIN, function=True)),
        (TENSORRT, _model("other")),
        (TENSORRT, _model(contract.DOMAIN, "Other")),
    ],
)
def test_a_library_that_is_not_needed_may_be_missing(library: Path, provider: str, model: onnx.ModelProto) -> None:
    assert not library.exists()
    assert with_plugin_library({provider: {}}, model, "m.onnx") == {provider: {}}


def test_without_a_default_library_its_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(EnvironmentMissingError, match=str(tmp_path / "rmsnorm-deploy" / "plugin" / REGISTERING_NAME)):
        with_plugin_library({TENSORRT: {}}, _model(contract.ORT_DOMAIN), "m.onnx")


# ----------------------------------------------------------------------------------- TensorRT-RTX's provider


class FakeOrt:
    """The part of onnxruntime that opens sessions; its registry knows a device once a library is registered.

    Args:
        devices: how many devices the library brings.
        built_in: whether the provider is in this build.
        fails: the error of registering.
    """

    __version__ = "1.32.0"

    def __init__(self, devices: int = 2, built_in: bool = False, fails: Exception | None = None) -> None:
        self.devices, self.built_in, self.fails = devices, built_in, fails
        self.registered: list[tuple[str, str]] = []
        self.opened: list[tuple[Any, ...]] = []

    def get_all_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", CPU]

    def get_available_providers(self) -> list[str]:
        return [*([RTX] if self.built_in else []), "CUDAExecutionProvider", CPU]

    def register_execution_provider_library(self, name: str, path: str) -> None:
        if self.fails is not None:
            raise self.fails
        self.registered.append((name, path))

    def get_ep_devices(self) -> list[Any]:
        found = [SimpleNamespace(ep_name=CPU)]
        return found + [SimpleNamespace(ep_name=RTX, number=n) for n in range(self.devices) if self.registered]

    def InferenceSession(self, source: Any, options: Any, **rest: Any) -> str:
        self.opened.append((source, options, rest))
        return "a session"


class FakeOptions:
    def __init__(self) -> None:
        self.added: list[tuple[list[int], dict[str, str]]] = []

    def add_provider_for_devices(self, devices: Any, options: dict[str, str]) -> None:
        self.added.append(([device.number for device in devices], options))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package that brings the provider."""
    module = ModuleType(RTX_MODULE)
    module.__spec__ = importlib.machinery.ModuleSpec(RTX_MODULE, None)
    module.get_library_path = lambda: "/rtx.so"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, RTX_MODULE, module)


@pytest.mark.parametrize("name", ["rtx", "NvTensorRTRTXExecutionProvider", "nvtensorrtrtx", "RTX"])
def test_names_of_the_provider(package: None, name: str) -> None:
    assert chosen_providers(FakeOrt(), [f"{name}:enable_cuda_graph=1"]) == {RTX: {"enable_cuda_graph": "1"}}  # type: ignore[arg-type]


@pytest.mark.usefixtures("package")
def test_it_is_loaded_from_its_package_once() -> None:
    fake = FakeOrt()
    for _ in range(2):
        options = FakeOptions()
        assert open_session(fake, "m.onnx", options, {RTX: {"a": "1"}, CPU: {}}) == "a session"  # type: ignore[arg-type]
        assert options.added == [([0], {"a": "1"})]
    assert fake.registered == [(RTX, "/rtx.so")]
    assert [rest for _, _, rest in fake.opened] == [{"enable_fallback": 0}] * 2


def test_a_build_that_has_it_opens_it_by_name() -> None:
    fake = FakeOrt(built_in=True)
    chosen = chosen_providers(fake, ["rtx", "cpu"])  # type: ignore[arg-type]
    open_session(fake, "m.onnx", FakeOptions(), chosen)  # type: ignore[arg-type]
    assert fake.opened[0][2] == {"providers": [RTX, CPU], "provider_options": [{}, {}], "enable_fallback": 0}
    assert fake.registered == []


@pytest.mark.usefixtures("package")
def test_it_is_not_combined_with_cuda() -> None:
    with pytest.raises(UsageError, match=f"expected it alone or before {CPU}, got it with CUDAExecutionProvider"):
        open_session(FakeOrt(), "m.onnx", FakeOptions(), {RTX: {}, "CUDAExecutionProvider": {}})  # type: ignore[arg-type]


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("fake", "text"),
    [
        (FakeOrt(devices=0), "finds no GPU that it supports"),
        (FakeOrt(fails=RuntimeError("libcuda.so.1:\n cannot open")), "cannot be loaded .*: libcuda.so.1: cannot open"),
    ],
)
def test_a_provider_that_cannot_be_used(fake: FakeOrt, text: str) -> None:
    with pytest.raises(EnvironmentMissingError, match=text):
        open_session(fake, "m.onnx", FakeOptions(), {RTX: {}})  # type: ignore[arg-type]


def test_a_missing_package_says_what_to_install() -> None:
    """In onnxruntime itself, by both names."""
    ort = import_onnxruntime()
    for name in ("rtx", RTX):
        with pytest.raises(EnvironmentMissingError) as error:
            chosen_providers(ort, [name])
        assert 'pip install "onnxruntime>=1.24" onnxruntime-ep-nv-tensorrt-rtx-cu13' in str(error.value)
    old = SimpleNamespace(__version__="1.20.1", get_all_providers=lambda: [CPU], get_available_providers=lambda: [CPU])
    with pytest.raises(EnvironmentMissingError, match=r"expected onnxruntime 1\.24 or later, .* got 1\.20\.1"):
        chosen_providers(old, ["rtx"])  # type: ignore[arg-type]


def test_onnxruntime_has_the_functions() -> None:
    """The names that TensorRT-RTX's provider is loaded by, and a session on a device of the CPU's provider."""
    ort = import_onnxruntime()
    assert callable(ort.register_execution_provider_library)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    options = ort.SessionOptions()
    options.add_provider_for_devices([device for device in ort.get_ep_devices() if device.ep_name == CPU][:1], {})
    session = ort.InferenceSession(model, options, enable_fallback=0)
    assert session.get_providers() == [CPU]
    with OrtRunner(model) as runner:
        assert runner.provenance()["providers_used"] == [CPU]
