"""What this machine can export, build and run (`examine`): versions, providers, GPUs, and what each target lacks."""

from __future__ import annotations

import importlib
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..export.lowering.table import TARGETS, Environment, LoweringRefusal, Target, resolve
from ..models.errors import EnvironmentMissingError
from ..models.spec import NormSpec
from ..models.versions import LIBRARIES, installed_version, newer_than_tested, too_old
from ..plugins.tensorrt.library import find_library, find_toolchain
from .engines.api import FLAVORS

SCHEMA = "rmsnorm_deploy.doctor/1"

# In display order; a package that is not installed is shown as missing.
_DISTRIBUTIONS = (
    "rmsnorm-deploy", "numpy", "ml_dtypes", "torch", "onnx", "onnx-ir", "onnxscript", "safetensors", "transformers",
    "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx-cu13",
)  # fmt: skip
_TENSORRT_DISTRIBUTIONS = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
_EXPORT_MODULES = ("numpy", "ml_dtypes", "torch", "onnx", "onnx_ir", "onnxscript")
_PROVIDERS = ("cpu", "cuda", "tensorrt")
_SMI_SECONDS = 10.0

GET_ONNXRUNTIME = 'pip install "rmsnorm-deploy[cpu]"'
GET_ONNXRUNTIME_GPU = 'pip uninstall onnxruntime && pip install "rmsnorm-deploy[gpu]"'
# onnxruntime-gpu's provider loads libnvinfer.so.10; without a version, pip installs TensorRT 11.
GET_TENSORRT_10 = 'pip install "tensorrt-cu13<11"'
GET_TENSORRT = FLAVORS["tensorrt"].install
GET_RTX = FLAVORS["rtx"].install
GET_LIBRARY = "rmsnorm plugin build"
BUILD_RTX = "tensorrt-rtx build"
GET_PACKAGE = "pip install rmsnorm-deploy"
GET_GPU = "use a machine with an NVIDIA GPU and its driver"

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What was found on this machine. Problems are texts, empty if there is no problem.

    Attributes:
        versions: installed versions by distribution, None if it is not installed.
        imports: the problem of each module that export requires.
        onnxruntime: onnxruntime's version, None if it cannot be imported.
        providers: the problem of each ONNX Runtime provider `cpu`, `cuda`, `tensorrt`, found by opening a session.
        compiled: the providers that onnxruntime was built with, by their full names.
        gpus: name, memory and driver of each GPU that nvidia-smi or torch finds.
        torch_cuda: the CUDA version that torch was built for, None for a CPU build.
        tensorrt: version of TensorRT's Python package, None if it cannot be imported.
        tensorrt_problem: why it cannot be imported.
        rtx: version of TensorRT-RTX's Python package, None if it cannot be imported.
        rtx_problem: why it cannot be imported.
        plugin_library: the library of the TensorRT plugin that builds use, None if there is none.
        toolchain_problem: why that library cannot be built here.
    """

    versions: dict[str, str | None]
    imports: dict[str, str]
    onnxruntime: str | None
    providers: dict[str, str]
    compiled: list[str]
    gpus: list[str]
    torch_cuda: str | None
    tensorrt: str | None
    tensorrt_problem: str
    rtx: str | None = None
    rtx_problem: str = ""
    plugin_library: str | None = None
    toolchain_problem: str = ""


@dataclass(frozen=True, slots=True)
class Way:
    """One use of a target on this machine.

    Attributes:
        name: `export`, `tensorrt-rtx build`, or a runtime: `onnxruntime cpu`, `onnxruntime cuda`,
            `onnxruntime tensorrt`, `tensorrt`.
        missing: what is missing; empty if the use is possible.
        get: the commands that install what is missing, in order.
    """

    name: str
    missing: list[str] = field(default_factory=list)
    get: list[str] = field(default_factory=list)

    @property
    def possible(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing

    def to_dict(self) -> dict[str, Any]:
        """The use as JSON values."""
        return {"name": self.name, "possible": self.possible, "missing": self.missing, "get": self.get}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found, and the possible uses of each target: export first, then build and run."""

    found: Surroundings
    targets: dict[str, list[Way]]
    warnings: list[str]

    def can_run(self, target: str) -> bool:
        """Whether the target can be run here in any runtime."""
        return any(way.possible for way in self.targets[target] if way.name not in ("export", BUILD_RTX))

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON values."""
        found = self.found
        return {
            "schema": SCHEMA,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "versions": found.versions,
            "gpus": found.gpus,
            "torch_cuda": found.torch_cuda,
            "onnxruntime": {
                "version": found.onnxruntime,
                "compiled_providers": found.compiled,
                "providers": {name: {"works": not why, "problem": why} for name, why in found.providers.items()},
            },
            "tensorrt": {"version": found.tensorrt, "problem": found.tensorrt_problem},
            "tensorrt_rtx": {"version": found.rtx, "problem": found.rtx_problem},
            "plugin": {"library": found.plugin_library, "toolchain_problem": found.toolchain_problem},
            "targets": {
                name: {
                    "can_export": ways[0].possible,
                    "can_run": self.can_run(name),
                    "ways": [way.to_dict() for way in ways],
                }
                for name, ways in self.targets.items()
            },
            "warnings": self.warnings,
        }


def examine(progress: Progress | None = None) -> Diagnosis:
    """Examine this machine. Missing or broken packages are reported and do not raise an error.

    Args:
        progress: called with a line of text at each step.
    """
    return diagnose(look(progress))


def diagnose(found: Surroundings) -> Diagnosis:
    """The possible uses of each target, given what was found."""
    targets: dict[str, list[Way]] = {target: [_export_way(found), *_run_ways(found, target)] for target in TARGETS}
    return Diagnosis(found, targets, _warnings(found))


def look(progress: Progress | None = None) -> Surroundings:
    """Find out what is installed and works, by trying it. `progress` is called with a line of text at each step."""
    progress = progress or (lambda _: None)
    progress("importing the packages")
    imports = {name: _import_problem(name) for name in _EXPORT_MODULES}
    progress("trying ONNX Runtime's providers")
    onnxruntime, compiled = _onnxruntime()
    providers = {name: _provider_problem(name, compiled) for name in _PROVIDERS}
    progress("looking for GPUs and TensorRT")
    torch_cuda, torch_gpus = (None, []) if imports["torch"] else _torch_devices()
    problem, rtx_problem = _import_problem("tensorrt"), _import_problem("tensorrt_rtx")
    library = find_library()
    return Surroundings(
        versions={name: installed_version(name) for name in _DISTRIBUTIONS},
        imports=imports,
        onnxruntime=onnxruntime,
        providers=providers,
        compiled=compiled,
        gpus=_smi_devices() or torch_gpus,
        torch_cuda=torch_cuda,
        tensorrt=None if problem else _tensorrt_version(),
        tensorrt_problem=problem,
        rtx=None if rtx_problem else importlib.import_module("tensorrt_rtx").__version__,
        rtx_problem=rtx_problem,
        plugin_library=None if library is None else str(library),
        toolchain_problem=_toolchain_problem(),
    )


# Meaning ----------------------------------------------------------------------------------------------------------


def _export_way(found: Surroundings) -> Way:
    missing = [problem for problem in found.imports.values() if problem]
    return Way("export", missing, [GET_PACKAGE] if missing else [])


def _run_ways(found: Surroundings, target: Target) -> list[Way]:
    ways = [_onnxruntime_way(found, target, provider) for provider in _PROVIDERS]
    return [*ways, _tensorrt_way(found, target), _rtx_way(found, target)]


def _onnxruntime_way(found: Surroundings, target: Target, provider: str) -> Way:
    name = f"onnxruntime {provider}"
    too_old = _obstacles(target, "onnxruntime", found.onnxruntime)
    get_build = GET_ONNXRUNTIME if provider == "cpu" else GET_ONNXRUNTIME_GPU
    if found.onnxruntime is None:
        return Way(name, [found.providers[provider]], [get_build])
    if too_old:
        return Way(name, too_old, [get_build])
    problem = found.providers[provider]
    if not problem:
        return Way(name)
    missing, get = [problem], []
    if provider != "cpu" and not found.gpus:
        missing.append("no NVIDIA GPU was found")
        get.append(GET_GPU)
    if not _is_compiled(provider, found.compiled):
        get.append(get_build)
    if provider == "tensorrt":
        get.append(GET_TENSORRT_10)
    return Way(name, missing, get)


def _tensorrt_way(found: Surroundings, target: Target) -> Way:
    unknown = _obstacles(target, "tensorrt", None)
    if unknown:
        return Way("tensorrt", unknown)
    missing, get = [], []
    if not found.gpus:
        missing.append("no NVIDIA GPU was found")
        get.append(GET_GPU)
    if found.tensorrt is None:
        missing.append(found.tensorrt_problem)
        get.append(GET_TENSORRT)
    else:
        too_old = _obstacles(target, "tensorrt", found.tensorrt)
        missing += too_old
        get += [GET_TENSORRT] if too_old else []
    return Way("tensorrt", missing, get)


def _rtx_way(found: Surroundings, target: Target) -> Way:
    """The build, which does not require a GPU."""
    if found.rtx is None:
        return Way(BUILD_RTX, [found.rtx_problem or "tensorrt_rtx is not installed"], [GET_RTX])
    too_old = _obstacles(target, "tensorrt-rtx", found.rtx)
    return Way(BUILD_RTX, too_old, [GET_RTX] if too_old else [])


def _is_compiled(provider: str, compiled: list[str]) -> bool:
    return any(provider == full.lower().removesuffix("executionprovider") for full in compiled)


def _obstacles(target: Target, runtime: str, version: str | None) -> list[str]:
    """The reasons why the lowering table refuses this runtime, for an ordinary norm."""
    environment = Environment(runtime=runtime, runtime_version=version)
    cell = resolve(NormSpec(eps=1e-6), "plain", target, environment)
    return list(cell.reasons) if isinstance(cell, LoweringRefusal) else []


def _warnings(found: Surroundings) -> list[str]:
    warnings = []
    if found.versions.get("onnxruntime") and found.versions.get("onnxruntime-gpu"):
        warnings.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; uninstall both, "
            "then install one."
        )
    if found.gpus and found.torch_cuda is None and not found.imports["torch"]:
        warnings.append("a GPU was found, but this torch was built without CUDA, so PyTorch runs on the CPU.")
    warnings += [f"{text}." for library in LIBRARIES if (text := too_old(library.distribution))]
    warnings += [f"{text}." for library in LIBRARIES if (text := newer_than_tested(library.distribution))]
    if not found.versions.get("transformers"):
        warnings.append('models of transformers cannot be loaded: pip install "rmsnorm-deploy[hf]"')
    return warnings


# Looking ----------------------------------------------------------------------------------------------------------


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


def _provider_problem(provider: str, compiled: list[str]) -> str:
    """Open a session on the provider and run it: a provider in the build may still fail to load."""
    problem = _import_problem("onnxruntime")
    if problem:
        return problem
    if not _is_compiled(provider, compiled):
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


def _toolchain_problem() -> str:
    try:
        find_toolchain()
    except EnvironmentMissingError as error:
        return str(error)
    return ""


def _tensorrt_version() -> str | None:
    import tensorrt

    return getattr(tensorrt, "__version__", None) or next(
        filter(None, map(installed_version, _TENSORRT_DISTRIBUTIONS)), None
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return " ".join(text.splitlines()[0].split()) if text else type(error).__name__
