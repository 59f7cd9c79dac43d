"""The plugins in Python in the real registry of TensorRT-RTX, which is one for a process: so each in its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from rmsnorm_deploy.runtime.engines.api import library_folders, link_libraries

pytest.importorskip("tensorrt_rtx", reason="needs the builder: pip install 'rmsnorm-deploy[rtx]'")

BEFORE = """
import json
from types import SimpleNamespace
import numpy as np
import tensorrt_rtx as trt
from rmsnorm_deploy.models.errors import RmsnormDeployError, UsageError
from rmsnorm_deploy.plugins.tensorrt.creators import Plugins, read_fields
from rmsnorm_deploy.plugins.tensorrt.images import unpack

BUILD, RUNTIME = trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME
ARRAYS = {"epsilon": np.float32, "scale_offset": np.float32, "scale_type": np.int32}
KINDS = {"epsilon": trt.PluginFieldType.FLOAT32, "scale_offset": trt.PluginFieldType.FLOAT32,
         "scale_type": trt.PluginFieldType.INT32}
kept = []

def fields(**values):
    found = [trt.PluginField(n, np.array([v], ARRAYS[n]), KINDS[n]) for n, v in values.items()]
    kept.append(found)
    return trt.PluginFieldCollection(found)

def tensor(dtype=trt.float16, dims=(-1, -1, 64), format=trt.TensorFormat.LINEAR):
    return SimpleNamespace(desc=SimpleNamespace(type=dtype, dims=dims, format=format))

def message(call):
    try:
        call()
    except RmsnormDeployError as error:
        return f"{type(error).__name__}: {error}"
    return None

GOOD = dict(epsilon=1e-5, scale_offset=1.0, scale_type=10)
out = {}
"""


def ran(script: str, tmp_path: Path) -> Any:
    """What the script puts into `out`, run in a process with the loader's path as a build has it."""
    link_libraries("rtx", tmp_path)
    places = [str(tmp_path), *map(str, library_folders("rtx")), os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, places))}
    code = f"{BEFORE}{textwrap.dedent(script)}\nprint(json.dumps(out))\n"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_registry_has_both_creators_once(tmp_path: Path) -> None:
    script = """
        plugins = Plugins(trt, (89,))
        registry = trt.get_plugin_registry()
        before = {(c.name, c.plugin_version, c.plugin_namespace) for c in registry.all_creators}
        plugins.register()
        after = [(c.name, c.plugin_version, c.plugin_namespace) for c in registry.all_creators]
        out["new"] = sorted(set(after) - before)
        out["fields"] = [[field.name for field in creator.field_names] for creator in plugins.creators]
        out["again"] = message(Plugins(trt, (89,)).register)
    """
    found = ran(script, tmp_path)
    names = ("AddRMSNorm", "AddRMSNormQuant", "RMSNorm", "RMSNormQuant")
    assert found["new"] == [[name, "1", "rmsnorm_deploy"] for name in names]
    plain = ["epsilon", "scale_offset", "scale_type"]
    assert found["fields"] == [plain] * 2 + [[*plain, "quant_type"]] * 2
    assert found["again"].startswith("RmsnormDeployError: TensorRT's registry refused RMSNorm: another creator")


def test_fields_arrive_and_are_read_back(tmp_path: Path) -> None:
    script = """
        plugins = Plugins(trt, (89, 80))
        plugins.register()
        registry = trt.get_plugin_registry()
        for name in ("RMSNorm", "AddRMSNorm"):
            creator = registry.get_creator(name, "1", "rmsnorm_deploy")
            plugin = creator.create_plugin("layers.0/norm", fields(**GOOD), BUILD)
            copy = plugin.clone()
            copy.configure_plugin([tensor()], [])
            serialized = copy.get_fields_to_serialize()
            values, kernels = read_fields(name, serialized, runtime=True)
            images = unpack(kernels)
            loaded = creator.create_plugin(name, serialized, RUNTIME)
            out[name] = {
                "values": plugin.values, "outputs": plugin.num_outputs, "copy": copy.values, "read": values,
                "different": copy is not plugin, "kernels_of_first": plugin.kernels,
                "names": [field.name for field in serialized], "width": images.width, "dtype": images.dtype,
                "architectures": images.architectures, "same": loaded.kernels == copy.kernels == kernels,
                "loaded": loaded.values, "identity": [plugin.plugin_name, plugin.plugin_version,
                plugin.plugin_namespace],
            }
            again = plugin.clone()
            again.configure_plugin([tensor()], [])
            out[name]["shared"] = again.kernels == copy.kernels
        out["compiled"] = len(plugins.images)
        out["report"] = plugins.report()
        out["problems"] = plugins.problems
    """
    found = ran(script, tmp_path)
    values = {"epsilon": pytest.approx(1e-5), "scale_offset": 1.0, "scale_type": 10}
    for name, outputs in (("RMSNorm", 1), ("AddRMSNorm", 2)):
        row = found[name]
        assert row["values"] == row["copy"] == row["read"] == row["loaded"] == values
        assert row["identity"] == [name, "1", "rmsnorm_deploy"]
        assert (row["outputs"], row["different"], row["kernels_of_first"]) == (outputs, True, None)
        assert row["names"] == ["epsilon", "scale_offset", "scale_type", "kernels"]
        assert (row["width"], row["dtype"], row["architectures"]) == (64, "float16", [80, 89])
        assert (row["same"], row["shared"]) == (True, True)
    assert (found["compiled"], found["problems"]) == (2, [])
    report = [(row["operator"], row["width"], row["dtype"], row["architectures"]) for row in found["report"]]
    assert report == [("RMSNorm", 64, "float16", [80, 89]), ("AddRMSNorm", 64, "float16", [80, 89])]


def test_what_is_refused_is_recorded(tmp_path: Path) -> None:
    script = """
        plugins = Plugins(trt, (89,))
        creator = plugins.creators[0]
        make = lambda phase=BUILD, node="layers.0/norm", **values: message(
            lambda: creator.create_plugin(node, fields(**values), phase))
        out["offset"] = make(**{**GOOD, "scale_offset": 0.5})
        out["missing"] = make(epsilon=1e-5, scale_type=1)
        out["type"] = make(**{**GOOD, "scale_type": 11})
        out["no kernels"] = make(RUNTIME, "RMSNorm", **GOOD)
        out["created"] = list(plugins.problems)
        plugin = creator.create_plugin("norm", fields(**GOOD), BUILD)
        for _ in range(2):
            plugin.configure_plugin([tensor(dims=(-1, -1))], [])
        plugin.configure_plugin([tensor(dims=(4, 65537))], [])
        plugin.configure_plugin([tensor(dtype=trt.float32)], [])
        out["configured"] = plugins.problems[len(out["created"]):]
        unknown = Plugins(trt, (99,))
        unknown.creators[0].create_plugin("norm", fields(**GOOD), BUILD).configure_plugin([tensor()], [])
        out["unknown"] = unknown.problems
    """
    found = ran(script, tmp_path)
    assert found["offset"] == "UsageError: layers.0/norm (RMSNorm): scale_offset: expected 0 or 1, got 0.5."
    assert found["missing"] == "UsageError: layers.0/norm (RMSNorm): attribute scale_offset is missing."
    assert "scale_type: expected one of 1 (float32), 10 (float16), 16 (bfloat16), got 11" in found["type"]
    assert found["no kernels"] == (
        "UsageError: RMSNorm: field kernels is missing, so the engine has no kernel."
    )  # fmt: skip
    names = ("offset", "missing", "type", "no kernels")
    assert found["created"] == [found[name].removeprefix("UsageError: ") for name in names]
    width, wide, kind = found["configured"]
    assert width == "RMSNorm: width of x: expected a static width when the engine is built, got -1"
    assert "65537" in wide
    assert "scale_type: expected 1 for X of float32, got 10" in kind
    (unknown,) = found["unknown"]
    assert unknown.startswith("RMSNorm: NVRTC supports sm_75")


def test_formats_and_dtypes_that_a_plugin_takes(tmp_path: Path) -> None:
    script = """
        plugins = Plugins(trt, (89,))
        plugin = plugins.creators[1].create_plugin("norm", fields(**GOOD), BUILD)
        def takes(position, *dtypes, format=trt.TensorFormat.LINEAR):
            return plugin.supports_format_combination(position, [tensor(d, format=format) for d in dtypes], 3)
        half, wide = trt.float16, trt.float32
        out["all"] = [takes(index, *[half] * 5) for index in range(5)]
        out["other dtype"] = [takes(index, half, *[wide] * 4) for index in range(1, 5)]
        out["x"] = [takes(0, dtype) for dtype in (half, wide, trt.bfloat16, trt.int32)]
        out["format"] = takes(0, half, format=trt.TensorFormat.CHW2)
        out["dtypes"] = [dtype == half for dtype in plugin.get_output_data_types([half, half, half])]
        out["rest"] = [plugin.get_workspace_size([], []), plugin.get_valid_tactics(),
                       plugin.get_capability_interface(None) is plugin]
        out["problems"] = plugins.problems
    """
    assert ran(script, tmp_path) == {
        "all": [True] * 5, "other dtype": [False] * 4, "x": [True, False, False, False], "format": False,
        "dtypes": [True, True], "rest": [0, [], True], "problems": [],
    }  # fmt: skip


def test_without_kernels_nothing_is_compiled(tmp_path: Path) -> None:
    script = """
        plugins = Plugins(trt, (89,), without_kernels=True)
        plugin = plugins.creators[0].create_plugin("norm", fields(**GOOD), BUILD)
        plugin.configure_plugin([tensor()], [])
        out["names"] = [field.name for field in plugin.get_fields_to_serialize()]
        out["report"], out["problems"] = plugins.report(), plugins.problems
        call = lambda: plugin.enqueue([], [], [], [], 0, 0)
        out["enqueue"] = message(call)
    """
    assert ran(script, tmp_path) == {
        "names": ["epsilon", "scale_offset", "scale_type"], "report": [], "problems": [],
        "enqueue": "RmsnormDeployError: RMSNorm: the engine has no kernel. Build it again.",
    }  # fmt: skip


def test_enqueue_launches_the_kernel_that_the_engine_carries(tmp_path: Path) -> None:
    script = """
        import ctypes
        calls = []

        class Driver:
            CUdevice_attribute = SimpleNamespace(
                CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=8, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=9,
                CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=100)
            cuCtxGetDevice = staticmethod(lambda: (0, 0))
            cuDeviceGetAttribute = staticmethod(lambda what, device: (0, what))
            cuModuleLoadData = staticmethod(lambda image: (0, image))
            cuModuleGetFunction = staticmethod(lambda module, name: (0, (module[:4], name)))

            @staticmethod
            def cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
                addresses = (ctypes.c_uint64 * 6).from_address(parameters)
                values = [(ctypes.c_int32 if i == 3 else ctypes.c_uint64).from_address(a).value
                          for i, a in enumerate(addresses)]
                calls.append([function[0] == b"\\x7fELF", function[1].decode(), gx, stream, values])
                return (0,)

        plugins = Plugins(trt, (89,), driver=Driver)
        built = plugins.creators[1].create_plugin("norm", fields(**GOOD), BUILD)
        built.configure_plugin([tensor()], [])
        loaded = plugins.creators[1].create_plugin("AddRMSNorm", built.get_fields_to_serialize(), RUNTIME)
        running = loaded.attach_to_context(None)
        for dims in ((2, 100, 64), (0, 3, 64), (64,)):
            running.enqueue([SimpleNamespace(dims=dims)], [], [1, 2, 3], [4, 5], 0, 9)
        out["calls"] = calls
        image = plugins.images[next(iter(plugins.images))].choose(89, 200, 100)
        out["grid"] = image.grid(200)
    """
    found = ran(script, tmp_path)
    assert found["calls"] == [
        [True, "add_rms_norm", found["grid"], 9, [1, 2, 3, 200, 4, 5]],
        [True, "add_rms_norm", 1, 9, [1, 2, 3, 1, 4, 5]],
    ]
