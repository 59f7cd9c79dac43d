"""Find out what is installed on this machine and works (`look`), by trying it."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

from ..models.errors import EnvironmentMissingError
from ..models.versions import installed_version
from ..plugins.tensorrt.library import (
    LIBRARY_NAME,
    default_folder,
    default_registering_library,
    find_library,
    find_nvrtc,
    find_toolchain,
)
from .doctor_records import Driver, PluginState, Product, Surroundings
from .doctor_registry import ask
from .engines.api import FLAVORS, RuntimeName

# In display order; a package that is not installed is shown as missing.
_DISTRIBUTIONS = (
    "rmsnorm-deploy", "numpy", "ml_dtypes", "torch", "onnx", "onnx-ir", "onnxscript", "safetensors", "transformers",
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-nv-tensorrt-rtx-cu13", "tensorrt", "tensorrt-rtx-cu13",
    "cuda-bindings", "nvidia-cuda-nvrtc",
)  # fmt: skip
_EXPORT_MODULES = ("numpy", "ml_dtypes", "torch", "onnx", "onnx_ir", "onnxscript")
PROVIDERS = ("cpu", "cuda", "tensorrt")
_PARTIAL_MODULES: dict[RuntimeName, tuple[str, ...]] = {
    "tensorrt": ("tensorrt_lean", "tensorrt_dispatch"), "rtx": (),
}  # fmt: skip
_SMI_SECONDS = 10.0

Progress = Callable[[str], None]


def look(progress: Progress | None = None) -> Surroundings:
    """Find out what is installed and works, by trying it. `progress` is called with a line of text at each step."""
    progress = progress or (lambda _: None)
    progress("importing the packages")
    imports = {name: _import_problem(name) for name in _EXPORT_MODULES}
    progress("trying ONNX Runtime's providers")
    onnxruntime, compiled = _onnxruntime()
    providers = {name: _provider_problem(name, compiled) for name in PROVIDERS}
    progress("looking for GPUs and TensorRT")
    torch_cuda, torch_gpus = (None, []) if imports["torch"] else _torch_devices()
    smi = _smi_devices()
    driver = _driver(smi)
    plugin = _plugin()
    return Surroundings(
        versions={name: installed_version(name) for name in _DISTRIBUTIONS},
        imports=imports,
        onnxruntime=onnxruntime,
        providers=providers,
        compiled=compiled,
        gpus=smi or [name for name, _ in driver.gpus] or torch_gpus,
        torch_cuda=torch_cuda,
        driver=driver,
        products={name: _product(name, plugin) for name in FLAVORS},
        plugin=plugin,
    )


def _import_problem(module: str) -> str:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return f"{module} is not installed"
    except Exception as error:  # an installed package that cannot be loaded may raise any error
        return f"{module} is installed but cannot be loaded: {_first_line(error)}"
    return ""


def _onnxruntime() -> tuple[str | None, list[str]]:
    if _import_problem("onnxruntime"):
        return None, []
    import onnxruntime

    return onnxruntime.__version__, list(onnxruntime.get_available_providers())


def is_compiled(provider: str, compiled: list[str]) -> bool:
    """Whether onnxruntime was built with a provider, by its short name."""
    return any(provider == full.lower().removesuffix("executionprovider") for full in compiled)


def _provider_problem(provider: str, compiled: list[str]) -> str:
    """Open a session on the provider and run it: a provider in the build may still fail to load."""
    problem = _import_problem("onnxruntime")
    if problem:
        return problem
    if not is_compiled(provider, compiled):
        return f"this onnxruntime was built without its {provider} provider"
    try:
        import numpy as np

        from .runners.open import open_runner

        with open_runner(_identity_model(), provider) as runner:
            runner.run({"x": np.ones(1, np.float32)})
    except Exception as error:
        return _first_line(error)
    return ""


def _identity_model() -> bytes:
    import onnx
    from onnx import TensorProto, helper

    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])

    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "probe", [value("x")], [value("y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()


def _torch_devices() -> tuple[str | None, list[str]]:
    import torch

    if not torch.cuda.is_available():
        return torch.version.cuda, []
    return torch.version.cuda, [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _smi_devices() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else []


def _driver(smi: list[str]) -> Driver:
    """The driver, from its library, and its version from nvidia-smi's lines."""
    version = smi[0].rpartition(",")[2].strip() if smi and "," in smi[0] else None
    try:
        library = _driver_library()
    except OSError:
        return Driver(version)
    number, count = ctypes.c_int(), ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)):
        return Driver(version)
    cuda = (number.value // 1000, number.value % 1000 // 10)
    if library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)):
        return Driver(version, cuda)
    gpus = [_gpu(library, index) for index in range(count.value)]
    return Driver(version, cuda, tuple(gpu for gpu in gpus if gpu is not None))


def _driver_library() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _gpu(driver: Any, index: int) -> tuple[str, int] | None:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    # 75 and 76: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    failed = (
        driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    )
    return None if failed else (name.value.decode(), 10 * major.value + minor.value)


def _product(name: RuntimeName, plugin: PluginState) -> Product:
    flavor = FLAVORS[name]
    partial = tuple(module for module in _PARTIAL_MODULES[name] if importlib.util.find_spec(module) is not None)
    versions = {each: version for each in flavor.distributions if (version := installed_version(each))}
    problem = _import_problem(flavor.module)
    if problem:
        return Product(problem=problem, partial=partial, distributions=versions)
    module = importlib.import_module(flavor.module)
    registry = ask(flavor.module, plugin.library)
    version = getattr(module, "__version__", None) or next(iter(versions.values()), "of unknown version")
    return Product(
        version=version,
        has_builder=hasattr(module, "Builder"),
        has_parser=hasattr(module, "OnnxParser"),
        partial=partial,
        distributions=versions,
        creators=tuple(registry["creators"]),
        registry_problem=registry["problem"],
    )


def _plugin() -> PluginState:
    library, registering, nvrtc = find_library(), default_registering_library(), find_nvrtc()
    common: dict[str, Any] = {
        "expected": str(default_folder() / LIBRARY_NAME),
        "registering": str(registering) if registering.is_file() else None,
        "python": _has_module("cuda.bindings.nvrtc"),
        "nvrtc_path": None if nvrtc is None else str(nvrtc),
        "toolchain_problem": _toolchain_problem(),
    }
    if library is None:
        return PluginState(**common)
    told = ask("", str(library))
    info = told.get("info", {})
    return PluginState(
        library=str(library),
        is_current=bool(info.get("is_current")),
        headers=info.get("tensorrt_headers", ""),
        creators=tuple(told["creators"]),
        nvrtc=info.get("nvrtc", ""),
        problem=told["problem"],
        **common,
    )


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _toolchain_problem() -> str:
    try:
        find_toolchain()
    except EnvironmentMissingError as error:
        return str(error)
    return ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return " ".join(text.splitlines()[0].split()) if text else type(error).__name__
