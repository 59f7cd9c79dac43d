"""What TensorRT and TensorRT-RTX can do here (`product_ways`), what conflicts, and which target suits this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from ..export.lowering.table import Environment, LoweringRefusal, Target, resolve
from ..models.spec import NormSpec
from .doctor_records import Driver, Product, Surroundings, Way
from .engines.api import FLAVORS, RuntimeName

# The name of each product among the uses of a target; it is its name in the lowering table too.
USES: Final[dict[RuntimeName, str]] = {"tensorrt": "tensorrt", "rtx": "tensorrt-rtx"}
# NVIDIA's prerequisites of TensorRT 11.2: Turing or later.
_OLDEST_ARCHITECTURE: Final = 75
# The first driver of each major version of CUDA, from NVIDIA's release notes of CUDA.
_DRIVERS: Final = {12: "525", 13: "580"}

# onnxruntime-gpu's provider loads libnvinfer.so.10; without a version, pip installs TensorRT 11.
GET_TENSORRT_10: Final = 'pip install "tensorrt-cu13<11"'
GET_LIBRARY: Final = "rmsnorm plugin build"
GET_GPU: Final = "use a machine with an NVIDIA GPU and its driver"
GET_TORCH: Final = "install PyTorch for CUDA: https://pytorch.org"
_RTX_PROVIDERS: Final = ("onnxruntime-ep-nv-tensorrt-rtx-cu13", "onnxruntime-ep-nv-tensorrt-rtx-cu12")


def supports(name: RuntimeName, architecture: int) -> bool:
    """Whether a product supports GPUs of an architecture."""
    known = FLAVORS[name].architectures
    return architecture in known if known else architecture >= _OLDEST_ARCHITECTURE


def obstacles(target: Target, runtime: str, version: str | None) -> list[str]:
    """The reasons why the lowering table refuses this runtime, for an ordinary norm."""
    environment = Environment(runtime=runtime, runtime_version=version)
    cell = resolve(NormSpec(eps=1e-6), "plain", target, environment)
    return list(cell.reasons) if isinstance(cell, LoweringRefusal) else []


def product_ways(found: Surroundings, target: Target) -> list[Way]:
    """Building and running an engine of a target, with each product."""
    return [way for name in FLAVORS for way in (_build_way(found, target, name), _run_way(found, target, name))]


def _build_way(found: Surroundings, target: Target, name: RuntimeName) -> Way:
    """TensorRT builds for the local GPU; TensorRT-RTX does not require one."""
    way = Way(f"{USES[name]} build")
    refused = obstacles(target, USES[name], None)
    if refused:
        return Way(way.name, refused)
    if not FLAVORS[name].architectures:
        _need_gpu(way, found, name)
    _need_package(way, found.products[name], target, name)
    product = found.products[name]
    if product.version is not None and product.kind != "full":
        _need(way, f"this {FLAVORS[name].title} has no builder or no ONNX parser", FLAVORS[name].install)
    return way


def _run_way(found: Surroundings, target: Target, name: RuntimeName) -> Way:
    way = Way(f"{USES[name]} run")
    refused = obstacles(target, USES[name], None)
    if refused:
        return Way(way.name, refused)
    _need_gpu(way, found, name)
    _need_package(way, found.products[name], target, name)
    if found.imports.get("torch"):
        _need(way, found.imports["torch"], GET_TORCH)
    elif found.torch_cuda is None:
        _need(way, "PyTorch for CUDA, which holds an engine's inputs and outputs: this one is for the CPU", GET_TORCH)
    if target == "plugin" and not found.plugin.python:
        problem = plugin_problem(found)
        if problem:
            _need(way, problem, found.plugin.toolchain_problem or GET_LIBRARY)
    return way


def _need(way: Way, missing: str, get: str) -> None:
    way.missing.append(missing)
    way.get.append(get)


def _need_gpu(way: Way, found: Surroundings, name: RuntimeName) -> None:
    title, driver = FLAVORS[name].title, found.driver
    if not found.gpus:
        return _need(way, "no NVIDIA GPU was found", GET_GPU)
    if driver.cuda is None:
        return _need(way, "the driver's library libcuda.so.1 cannot be used", "install NVIDIA's driver")
    if driver.gpus and not any(supports(name, architecture) for _, architecture in driver.gpus):
        known = FLAVORS[name].architectures
        wanted = ", ".join(f"sm_{number}" for number in known) if known else f"sm_{_OLDEST_ARCHITECTURE} and later"
        gpus = ", ".join(f"{gpu} (sm_{number})" for gpu, number in driver.gpus)
        other = f"use TensorRT: {FLAVORS['tensorrt'].install}" if name == "rtx" else "use ONNX Runtime or PyTorch"
        return _need(way, f"{title} supports {wanted}, and not {gpus}", other)
    needed = _cuda_of(found.products[name])
    if needed and driver.cuda[0] < min(needed):
        have, least = ".".join(map(str, driver.cuda)), min(needed)
        _need(
            way,
            f"the driver supports CUDA {have}, and this {title} requires CUDA {least}",
            f"install NVIDIA's driver {_DRIVERS.get(least, 'for CUDA ' + str(least))} or later",
        )
    return None


def _need_package(way: Way, product: Product, target: Target, name: RuntimeName) -> None:
    flavor = FLAVORS[name]
    if product.version is None:
        partial = (
            f"; installed are only {', '.join(product.partial)}, which this package does not use"
            if product.partial
            else ""
        )
        return _need(way, (product.problem or f"{flavor.module} is not installed") + partial, flavor.install)
    for reason in obstacles(target, USES[name], product.version):
        _need(way, reason, flavor.install)
    return None


def plugin_problem(found: Surroundings) -> str:
    """Why the plugin's library cannot be used; empty if it can."""
    plugin = found.plugin
    if plugin.library is None:
        return f"the plugin's library is missing: expected {plugin.expected}"
    if plugin.problem:
        return f"the plugin's library cannot be read: {plugin.problem}"
    return "" if plugin.is_current else f"the plugin's library {plugin.library} is of another version of rmsnorm-deploy"


def _cuda_of(product: Product) -> set[int]:
    """The major versions of CUDA that a product's packages are for."""
    return {int(match[1]) for name in product.distributions if (match := re.search(r"-cu(\d+)", name))}


# Conflicts --------------------------------------------------------------------------------------------------------


def conflicts(found: Surroundings) -> list[str]:
    """Packages that do not work together, with the remedy."""
    versions, warnings = found.versions, []
    gpu_build = versions.get("onnxruntime-gpu")
    if versions.get("onnxruntime") and gpu_build:
        warnings.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; uninstall both, "
            "then install one."
        )
    provider = next((name for name in _RTX_PROVIDERS if versions.get(name)), None)
    if provider and gpu_build:
        warnings.append(f"{provider} requires onnxruntime in place of onnxruntime-gpu.")
    if found.gpus and found.torch_cuda is None and not found.imports["torch"]:
        warnings.append(
            "a GPU was found, but this torch was built without CUDA, so PyTorch runs on the CPU, and no engine of "
            "TensorRT can be run."
        )
    packages = found.products["tensorrt"].distributions
    majors = {name: int(version.partition(".")[0]) for name, version in packages.items()}
    if len(set(majors.values())) > 1:
        named = ", ".join(f"{name} {packages[name]}" for name in majors)
        warnings.append(f"packages of different TensorRT versions are installed ({named}); uninstall all but one.")
    elif gpu_build and majors and min(majors.values()) > 10:
        warnings.append(
            f"onnxruntime-gpu's TensorRT provider loads libnvinfer.so.10, and TensorRT {next(iter(packages.values()))} "
            f"is installed; for that provider: {GET_TENSORRT_10}"
        )
    return warnings + _cuda_conflicts(found)


def _cuda_conflicts(found: Surroundings) -> list[str]:
    warnings = []
    for name, product in found.products.items():
        title, needed = FLAVORS[name].title, _cuda_of(product)
        if len(needed) > 1:
            named = ", ".join(product.distributions)
            warnings.append(f"{title} for different CUDA versions is installed ({named}); uninstall all but one.")
        elif needed and found.torch_cuda and int(found.torch_cuda.partition(".")[0]) not in needed:
            warnings.append(
                f"PyTorch is for CUDA {found.torch_cuda}, and {title} for CUDA {min(needed)}: both load their own CUDA "
                "libraries in one process; install both for the same version."
            )
    return warnings


# The suited target ------------------------------------------------------------------------------------------------


def suited_target(found: Surroundings, targets: Mapping[str, list[Way]]) -> tuple[str | None, str]:
    """The target that suits this machine, and the reason; None if nothing can be exported."""
    possible = {(target, way.name) for target, ways in targets.items() for way in ways if way.possible}
    for name, use in USES.items():
        title = f"{FLAVORS[name].title} {found.products[name].version}"
        if ("plugin", f"{use} run") in possible:
            kind = "its C++ library" if found.plugin.is_usable else "the plugins in Python"
            return "plugin", f"{title} runs the fused kernel with {kind}"
        if ("standard", f"{use} run") in possible:
            (lost,) = (way.missing for way in targets["plugin"] if way.name == f"{use} run")
            return "standard", f"{title} runs RMSNormalization itself; for the plugin: {'; '.join(lost)}"
    for provider, place in (("cuda", "the GPU"), ("cpu", "the CPU")):
        if ("ort", f"onnxruntime {provider}") in possible:
            return "ort", f"ONNX Runtime {found.onnxruntime} runs it on {place}, and no TensorRT runs here"
    for use in USES.values():
        if ("plugin", f"{use} build") in possible:
            return "plugin", "engines can be built here for other machines; nothing here runs a model"
    if ("primitives", "export") in possible:
        return "primitives", "every runtime runs it; none of them works here"
    return None, "nothing can be exported here"


def gpu_rows(driver: Driver) -> list[dict[str, str | bool]]:
    """Each GPU with its architecture, and whether each product supports it."""
    return [
        {"name": gpu, "architecture": f"sm_{number}"} | {USES[name]: supports(name, number) for name in FLAVORS}
        for gpu, number in driver.gpus
    ]
