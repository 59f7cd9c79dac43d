"""What a machine can export, build and run, from what is found on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rmsnorm_deploy.export.lowering.table import TARGETS
from rmsnorm_deploy.runtime.doctor import Diagnosis, Surroundings, diagnose
from rmsnorm_deploy.runtime.doctor_records import Driver, PluginState, Product
from rmsnorm_deploy.runtime.doctor_tensorrt import supports
from rmsnorm_deploy.runtime.engines.api import FLAVORS
from tests.helpers.runtime.machines import CPU_MACHINE, CREATORS, GPU_MACHINE, product

TRT, RTX = 'pip install "rmsnorm-deploy[tensorrt]"', 'pip install "rmsnorm-deploy[rtx]"'


def _changed(machine: Surroundings, **changes: Any) -> Surroundings:
    products = {**machine.products, **changes.pop("products", {})}
    return dataclasses.replace(machine, products=products, **changes)


def _without_onnxruntime(machine: Surroundings) -> Surroundings:
    problems = dict.fromkeys(machine.providers, "onnxruntime is not installed")
    return _changed(machine, onnxruntime=None, providers=problems, compiled=[])


def _ways(diagnosis: Diagnosis, target: str) -> dict[str, tuple[bool, str, str]]:
    return {w.name: (w.possible, "; ".join(w.missing), "; ".join(w.get)) for w in diagnosis.targets[target]}


def _on(architecture: int) -> Surroundings:
    return _changed(GPU_MACHINE, driver=Driver("580.65", (13, 0), (("a GPU", architecture),)))


# ------------------------------------------------------------------------------------------------- the uses


def test_a_cpu_machine() -> None:
    diagnosis = diagnose(CPU_MACHINE)
    for target in TARGETS:
        ways = _ways(diagnosis, target)
        assert ways["export"][0]
        assert ways["onnxruntime cpu"][0]
        assert not ways["onnxruntime cuda"][0]
        assert "rmsnorm-deploy[gpu]" in ways["onnxruntime cuda"][2]
        assert "tensorrt-cu13<11" in ways["onnxruntime tensorrt"][2]
        assert diagnosis.can_run(target)
    for use in ("tensorrt build", "tensorrt run"):
        assert "SimplifiedLayerNormalization" in _ways(diagnosis, "ort")[use][1]


def test_what_running_an_engine_misses() -> None:
    ways = _ways(diagnose(CPU_MACHINE), "plugin")
    for name, module, get in (("tensorrt", "tensorrt", TRT), ("tensorrt-rtx", "tensorrt_rtx", RTX)):
        possible, missing, commands = ways[f"{name} run"]
        assert not possible
        assert missing == (
            f"no NVIDIA GPU was found; {module} is not installed; PyTorch for CUDA, which holds an engine's inputs and "
            "outputs: this one is for the CPU; the plugin's library is missing: expected /home/me/lib.so"
        )
        assert commands == (
            f"use a machine with an NVIDIA GPU and its driver; {get}; install PyTorch for CUDA: https://pytorch.org; "
            "rmsnorm plugin build"
        )
    assert "library" not in _ways(diagnose(CPU_MACHINE), "standard")["tensorrt run"][1]


def test_everything() -> None:
    """On a GPU that both products support."""
    diagnosis = diagnose(_on(89))
    for target in ("primitives", "standard", "plugin"):
        assert {name for name, way in _ways(diagnosis, target).items() if way != (True, "", "")} == set()
    assert [way.name for way in diagnosis.targets["plugin"]] == [
        "export", "onnxruntime cpu", "onnxruntime cuda", "onnxruntime tensorrt", "tensorrt build", "tensorrt run",
        "tensorrt-rtx build", "tensorrt-rtx run",
    ]  # fmt: skip
    assert diagnosis.warnings == []


def test_building_is_not_running() -> None:
    """TensorRT-RTX builds without a GPU; but it cannot run a model there."""
    alone = _changed(_without_onnxruntime(CPU_MACHINE), products={"rtx": product("1.7.1.116")})
    diagnosis = diagnose(alone)
    for target in TARGETS:
        assert _ways(diagnosis, target)["tensorrt-rtx build"][0]
        assert not diagnosis.can_run(target)
    found = _ways(diagnose(CPU_MACHINE), "plugin")["tensorrt-rtx build"]
    assert found == (False, "tensorrt_rtx is not installed", RTX)
    old = _ways(diagnose(_changed(CPU_MACHINE, products={"rtx": product("1.4.0")})), "plugin")["tensorrt-rtx build"]
    assert old[0] is False
    assert "requires tensorrt-rtx 1.7, and this is 1.4.0" in old[1]


def test_without_onnxruntime() -> None:
    diagnosis = diagnose(_without_onnxruntime(CPU_MACHINE))
    assert not any(diagnosis.can_run(target) for target in TARGETS)
    found = _ways(diagnosis, "primitives")["onnxruntime cpu"]
    assert found == (False, "onnxruntime is not installed", 'pip install "rmsnorm-deploy[cpu]"')


def test_old_versions() -> None:
    old = _changed(
        GPU_MACHINE,
        onnxruntime="1.20.1",
        imports={"torch": "torch is not installed"},
        products={"tensorrt": product("10.9.0", "tensorrt-cu13")},
    )
    diagnosis = diagnose(old)
    assert "requires onnxruntime 1.23, and this is 1.20.1" in _ways(diagnosis, "ort")["onnxruntime cpu"][1]
    for use in ("tensorrt build", "tensorrt run"):
        assert "requires tensorrt 10.15, and this is 10.9.0" in _ways(diagnosis, "standard")[use][1]
    assert _ways(diagnosis, "plugin")["tensorrt build"][0]
    assert _ways(diagnosis, "plugin")["tensorrt run"][1] == "torch is not installed"
    assert _ways(diagnosis, "plugin")["export"][1] == "torch is not installed"


def test_partial_runtimes() -> None:
    lean = Product(problem="tensorrt is not installed", partial=("tensorrt_lean", "tensorrt_dispatch"))
    diagnosis = diagnose(_changed(GPU_MACHINE, products={"tensorrt": lean}))
    for use in ("tensorrt build", "tensorrt run"):
        possible, missing, get = _ways(diagnosis, "plugin")[use]
        assert (possible, get) == (False, TRT)
        assert missing.endswith("installed are only tensorrt_lean, tensorrt_dispatch, which this package does not use")
    assert diagnosis.to_dict()["tensorrt"]["kind"] == "tensorrt_lean, tensorrt_dispatch"
    whole = product("11.4.0")
    parserless = dataclasses.replace(whole, has_parser=False)
    ways = _ways(diagnose(_changed(GPU_MACHINE, products={"tensorrt": parserless})), "plugin")
    assert ways["tensorrt build"][:2] == (False, "this TensorRT has no builder or no ONNX parser")
    assert ways["tensorrt run"][0]
    assert [each.kind for each in (whole, parserless, Product())] == ["full", "runtime only", "missing"]


@pytest.mark.parametrize("architecture", [70, 75, 80, 86, 89, 90, 100, 120, 121])
def test_architectures(architecture: int) -> None:
    rtx = architecture in FLAVORS["rtx"].architectures
    assert (supports("tensorrt", architecture), supports("rtx", architecture)) == (architecture >= 75, rtx)
    diagnosis = diagnose(_on(architecture))
    ways = _ways(diagnosis, "plugin")
    assert ways["tensorrt build"][0] is ways["tensorrt run"][0] is (architecture >= 75)
    assert ways["tensorrt-rtx build"][0]
    assert ways["tensorrt-rtx run"][0] is rtx
    if not rtx:
        wanted = "TensorRT-RTX supports sm_75, sm_80, sm_86, sm_89, sm_120, sm_121, and not a GPU"
        assert ways["tensorrt-rtx run"][1:] == (f"{wanted} (sm_{architecture})", f"use TensorRT: {TRT}")
    if architecture < 75:
        assert ways["tensorrt run"][1] == "TensorRT supports sm_75 and later, and not a GPU (sm_70)"
    assert diagnosis.to_dict()["driver"] == {
        "version": "580.65",
        "cuda": "13.0",
        "gpus": [
            {"name": "a GPU", "architecture": f"sm_{architecture}", "tensorrt": architecture >= 75, "tensorrt-rtx": rtx}
        ],
    }


def test_drivers() -> None:
    """A GPU without a usable driver, and a driver that is too old for the packages."""
    unusable = _changed(GPU_MACHINE, driver=Driver("580.65"))
    found = _ways(diagnose(unusable), "plugin")["tensorrt run"]
    assert found == (False, "the driver's library libcuda.so.1 cannot be used", "install NVIDIA's driver")
    old = _changed(GPU_MACHINE, driver=Driver("570.1", (12, 8), (("a GPU", 89),)), torch_cuda="13.0")
    for use, title in (("tensorrt", "TensorRT"), ("tensorrt-rtx", "TensorRT-RTX")):
        assert _ways(diagnose(old), "plugin")[f"{use} run"] == (
            False,
            f"the driver supports CUDA 12.8, and this {title} requires CUDA 13",
            "install NVIDIA's driver 580 or later",
        )
    cu12 = _changed(old, products={"tensorrt": product("10.9.0", "tensorrt-cu12")})
    assert _ways(diagnose(cu12), "plugin")["tensorrt run"][0]


@pytest.mark.parametrize(
    ("plugin", "problem", "get"),
    [
        (PluginState(expected="/x.so"), "library is missing: expected /x.so", "rmsnorm plugin build"),
        (PluginState(expected="/x.so", toolchain_problem="no nvcc"), "is missing: expected /x.so", "no nvcc"),
        (PluginState(library="/x.so", is_current=False), "/x.so is of another version", "rmsnorm plugin build"),
        (
            PluginState(library="/x.so", problem="not a library"),
            "cannot be read: not a library",
            "rmsnorm plugin build",
        ),
    ],
)
def test_the_plugins_library(plugin: PluginState, problem: str, get: str) -> None:
    machine = _changed(_on(89), plugin=plugin)
    for use in ("tensorrt run", "tensorrt-rtx run"):
        possible, missing, command = _ways(diagnose(machine), "plugin")[use]
        assert (possible, command) == (False, get)
        assert problem in missing
        assert _ways(diagnose(machine), "standard")[use][0]
    python = _changed(machine, plugin=dataclasses.replace(plugin, python=True))
    assert _ways(diagnose(python), "plugin")["tensorrt run"][0]


# ------------------------------------------------------------------------------------------- the suited target


@pytest.mark.parametrize(
    ("machine", "target", "reason"),
    [
        (GPU_MACHINE, "plugin", "TensorRT 11.4.0 runs the fused kernel with its C++ library"),
        (
            _changed(GPU_MACHINE, plugin=PluginState(expected="/x.so", python=True)),
            "plugin",
            "TensorRT 11.4.0 runs the fused kernel with the plugins in Python",
        ),
        (
            _changed(_on(89), products={"tensorrt": Product(problem="none")}),
            "plugin",
            "TensorRT-RTX 1.7.1.116 runs the fused kernel with its C++ library",
        ),
        (
            _changed(GPU_MACHINE, plugin=PluginState(expected="/x.so")),
            "standard",
            "TensorRT 11.4.0 runs RMSNormalization itself; for the plugin: the plugin's library is missing: expected "
            "/x.so",
        ),
        (
            _changed(GPU_MACHINE, torch_cuda=None),
            "ort",
            "ONNX Runtime 1.30.0 runs it on the GPU, and no TensorRT runs here",
        ),
        (CPU_MACHINE, "ort", "ONNX Runtime 1.30.0 runs it on the CPU, and no TensorRT runs here"),
        (
            _changed(CPU_MACHINE, onnxruntime="1.20.1"),
            "primitives",
            "every runtime runs it; none of them works here",
        ),
        (
            _changed(_without_onnxruntime(CPU_MACHINE), products={"rtx": product("1.7.1.116")}),
            "plugin",
            "engines can be built here for other machines; nothing here runs a model",
        ),
        (_without_onnxruntime(CPU_MACHINE), "primitives", "every runtime runs it; none of them works here"),
        (
            _changed(_without_onnxruntime(CPU_MACHINE), imports={"torch": "torch is not installed"}),
            None,
            "nothing can be exported here",
        ),
    ],
)
def test_the_target_that_suits(machine: Surroundings, target: str | None, reason: str) -> None:
    diagnosis = diagnose(machine)
    assert (diagnosis.suited, diagnosis.reason) == (target, reason)
    assert diagnosis.to_dict()["suited"] == {"target": target, "reason": reason}


# ------------------------------------------------------------------------------------------------- conflicts


GPU_BUILD = {"onnxruntime": None, "onnxruntime-gpu": "1.31.1", "transformers": "5.0.0"}


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"versions": {**GPU_BUILD, "onnxruntime": "1.31.1"}, "products": {"tensorrt": Product()}},
         "onnxruntime and onnxruntime-gpu are both installed"),
        ({"versions": GPU_BUILD}, 'loads libnvinfer.so.10, and TensorRT 11.4.0 is installed; for that provider: pip '
                                  'install "tensorrt-cu13<11"'),
        ({"versions": {**GPU_BUILD, "onnxruntime-ep-nv-tensorrt-rtx-cu13": "0.5.0"},
          "products": {"tensorrt": Product()}},
         "onnxruntime-ep-nv-tensorrt-rtx-cu13 requires onnxruntime in place of onnxruntime-gpu"),
        ({"products": {"tensorrt": dataclasses.replace(
            product("11.4.0"), distributions={"tensorrt": "11.4.0", "tensorrt-cu13": "10.15.1"})}},
         "different TensorRT versions are installed (tensorrt 11.4.0, tensorrt-cu13 10.15.1)"),
        ({"torch_cuda": None}, "this torch was built without CUDA, so PyTorch runs on the CPU, and no engine"),
        ({"products": {"tensorrt": product("11.4.0", "tensorrt-cu12", "tensorrt-cu13")}},
         "TensorRT for different CUDA versions is installed (tensorrt-cu12, tensorrt-cu13)"),
        ({"torch_cuda": "12.8", "products": {"rtx": Product()}},
         "PyTorch is for CUDA 12.8, and TensorRT for CUDA 13"),
        ({"versions": {"onnxruntime": "1.30.0", "transformers": None}}, "models of transformers cannot be loaded"),
    ],
)  # fmt: skip
def test_conflicts(changes: dict[str, Any], warning: str) -> None:
    (text,) = diagnose(_changed(GPU_MACHINE, **changes)).warnings
    assert warning in text


def test_what_does_not_conflict() -> None:
    ten = {"tensorrt": product("10.15.1", "tensorrt-cu13"), "rtx": GPU_MACHINE.products["rtx"]}
    assert diagnose(_changed(GPU_MACHINE, versions=GPU_BUILD, products=ten)).warnings == []


def test_json() -> None:
    content = diagnose(GPU_MACHINE).to_dict()
    assert content["schema"] == "rmsnorm_deploy.doctor/2"
    assert content["plugin"] == {
        "namespace": "rmsnorm_deploy", "version": "1", "library": "/lib.so", "expected": "/lib.so", "is_current": True,
        "headers": "10.14", "creators": CREATORS, "nvrtc": "13.0", "problem": "", "registering": "/register.so",
        "python": False, "nvrtc_path": None, "toolchain_problem": "",
    }  # fmt: skip
    assert content["tensorrt"]["creators"] == CREATORS
    assert content["tensorrt"]["kind"] == "full"
    assert content["tensorrt_rtx"]["distributions"] == {"tensorrt-rtx-cu13": "1.7.1.116"}
    assert Path(content["plugin"]["library"]) == Path("/lib.so")
