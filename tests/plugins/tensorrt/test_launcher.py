"""The launcher with a driver of the test's own, which runs the project's kernel on the host."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from rmsnorm_deploy.models.errors import EnvironmentMissingError, RmsnormDeployError
from rmsnorm_deploy.plugins.kernel.launch_config import LaunchConfig, choose
from rmsnorm_deploy.plugins.tensorrt.images import KernelImage, KernelImages, image_of, kernel_of
from rmsnorm_deploy.plugins.tensorrt.launcher import Launcher, cuda_driver
from tests.helpers.plugins.kernels import NUMPY, HostKernels, compiler

ARCHITECTURE, MULTIPROCESSORS = 89, 4


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_NOT_FOUND = 500


@dataclass
class Driver:
    """Answers as `cuda.bindings.driver` does: a tuple that begins with a status.

    Attributes:
        failing: the call that answers with an error.
        host: kernels to run, by the bytes of their image.
        architecture: of the GPU.
        calls: names of all calls.
        launches: grid, block and so on of each launch.
    """

    failing: str = ""
    host: dict[bytes, tuple[HostKernels, int, LaunchConfig]] = field(default_factory=dict)
    architecture: int = ARCHITECTURE
    values: str = ""
    calls: list[str] = field(default_factory=list)
    launches: list[dict[str, Any]] = field(default_factory=list)

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=16,
    )  # fmt: skip

    def answer(self, name: str, *values: Any) -> tuple[Any, ...]:
        self.calls.append(name)
        if name == self.failing:
            return (Status.CUDA_ERROR_INVALID_IMAGE, *(None for _ in values))
        return (Status.CUDA_SUCCESS, *values)

    def cuCtxGetDevice(self) -> tuple[Any, ...]:
        return self.answer("cuCtxGetDevice", 7)

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[Any, ...]:
        assert device == 7
        major, minor = divmod(self.architecture, 10)
        return self.answer("cuDeviceGetAttribute", {75: major, 76: minor, 16: MULTIPROCESSORS}[attribute])

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, ...]:
        return self.answer("cuModuleLoadData", ("module", image))

    def cuModuleGetFunction(self, module: tuple[str, bytes], name: bytes) -> tuple[Any, ...]:
        assert module[0] == "module"
        return self.answer("cuModuleGetFunction", (name, module[1]))

    def cuLaunchKernel(self, function: Any, *arguments: Any) -> tuple[Any, ...]:
        gx, gy, gz, bx, by, bz, shared, stream, parameters, extra = arguments
        name, image = function
        # What the driver does: one address for each parameter, read as wide as the kernel declares it.
        kinds = {"p": ctypes.c_uint64, "i": ctypes.c_int32}
        addresses = (ctypes.c_uint64 * len(self.values)).from_address(parameters)
        values = [kinds[kind].from_address(a).value for kind, a in zip(self.values, addresses, strict=True)]
        self.launches.append({
            "name": name, "image": image, "grid": (gx, gy, gz), "block": (bx, by, bz), "shared": shared,
            "stream": stream, "values": values, "extra": extra,
        })  # fmt: skip
        if image in self.host:
            self.run(*self.host[image], gx, values)
        return self.answer("cuLaunchKernel")

    CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6)
    CUlaunchConfig = SimpleNamespace

    def CUlaunchAttribute(self) -> SimpleNamespace:
        return SimpleNamespace(value=SimpleNamespace())

    def cuLaunchKernelEx(self, config: Any, function: Any, parameters: int, extra: int) -> tuple[Any, ...]:
        answer = self.cuLaunchKernel(
            function, config.gridDimX, config.gridDimY, config.gridDimZ, config.blockDimX, config.blockDimY,
            config.blockDimZ, 0, config.hStream, parameters, extra,
        )  # fmt: skip
        assert config.numAttrs == len(config.attrs)
        self.launches[-1]["attributes"] = [(attribute.id, vars(attribute.value)) for attribute in config.attrs]
        self.calls[-1] = "cuLaunchKernelEx"
        return answer

    def run(self, host: HostKernels, number: int, config: LaunchConfig, grid: int, values: list[int]) -> None:
        entry = ctypes.cast(getattr(host._library, f"kernel_{number}"), ctypes.c_void_p)
        packed = (ctypes.c_uint64 * 16)(*values)
        failed = host._library.launch(entry, grid, config.block, config.cluster, packed, ctypes.c_uint(0))
        assert not failed


def images(*extra: KernelImage) -> KernelImages:
    return KernelImages(64, "float16", (
        KernelImage("cubin", 80, True, 32, 1, 1, b"few"), KernelImage("cubin", 80, False, 128, 4, 1, b"many"), *extra,
    ))  # fmt: skip


def test_one_launch_has_the_grid_the_block_and_the_arguments_in_order() -> None:
    driver = Driver(values="ppipp")
    Launcher(images(), "add_rms_norm", driver).launch([11, 12, 1 << 40, 14], 2, 9, 77)
    assert driver.launches == [{
        "name": b"add_rms_norm", "image": b"many", "grid": (3, 1, 1), "block": (128, 1, 1), "shared": 0, "stream": 77,
        "values": [11, 12, 9, 1 << 40, 14], "extra": 0,
    }]  # fmt: skip
    assert driver.calls == [
        "cuCtxGetDevice", *["cuDeviceGetAttribute"] * 3, "cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel"
    ]  # fmt: skip


def test_the_layout_follows_the_rows_and_modules_are_loaded_once() -> None:
    driver = Driver(values="pip")
    launcher = Launcher(images(), "rms_norm", driver)
    for rows in (1, MULTIPROCESSORS, MULTIPROCESSORS + 1, 100, 2, 101):
        launcher.launch([1, 2], 1, rows, 0)
    found = [(launch["image"], launch["grid"][0], launch["block"][0]) for launch in driver.launches]
    assert found == [
        (b"few", 1, 32), (b"few", 4, 32), (b"many", 2, 128), (b"many", 25, 128), (b"few", 2, 32), (b"many", 26, 128)
    ]  # fmt: skip
    assert driver.calls.count("cuModuleLoadData") == driver.calls.count("cuModuleGetFunction") == 2
    assert driver.calls.count("cuCtxGetDevice") == 1


OVERLAP = (6, {"programmaticStreamSerializationAllowed": 1})


@pytest.mark.parametrize(("architecture", "attributes"), [(89, None), (90, [OVERLAP]), (100, [OVERLAP])])
def test_a_kernel_that_waits_for_the_one_before_may_overlap_with_it(architecture: int, attributes: Any) -> None:
    made = image_of(LaunchConfig(64, 1, 8, cluster=2), architecture, b"")
    driver = Driver(architecture=architecture, values="ppipp")
    launcher = Launcher(KernelImages(1024, "float16", (made,)), "add_rms_norm", driver)
    launcher.launch([11, 12, 1 << 40, 14], 2, 9, 77)
    (launch,) = driver.launches
    assert launch.get("attributes") == attributes
    assert driver.calls[-1] == ("cuLaunchKernel" if attributes is None else "cuLaunchKernelEx")
    assert (launch["grid"], launch["block"], launch["stream"]) == ((18, 1, 1), (64, 1, 1), 77)
    assert launch["values"] == [11, 12, 9, 1 << 40, 14]


def test_a_driver_without_launch_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Driver, "cuLaunchKernelEx")
    driver = Driver(architecture=90, values="pip")
    made = image_of(LaunchConfig(64, 1, 8), 90, b"")
    Launcher(KernelImages(512, "float16", (made,)), "rms_norm", driver).launch([1, 2], 1, 5, 0)
    assert driver.calls[-1] == "cuLaunchKernel"


def test_no_rows_are_no_launch() -> None:
    driver = Driver()
    Launcher(images(), "rms_norm", driver).launch([1, 2], 1, 0, 0)
    assert driver.calls == []


def test_a_gpu_that_the_engine_was_not_built_for() -> None:
    driver = Driver(architecture=120)
    more = KernelImage("cubin", 90, False, 32, 1, 1, b"")
    with pytest.raises(RmsnormDeployError, match=r"has kernels for sm_80, sm_90, and this GPU is sm_120.*--arch"):
        Launcher(images(more), "rms_norm", driver).launch([1, 2], 1, 3, 0)
    assert driver.launches == []


@pytest.mark.parametrize("call", [
    "cuCtxGetDevice", "cuDeviceGetAttribute", "cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel",
])  # fmt: skip
def test_what_the_driver_refuses_is_reported(call: str) -> None:
    driver = Driver(failing=call, values="pip")
    launcher = Launcher(images(), "rms_norm", driver)
    for _ in range(2):  # a failure is not remembered as a success
        with pytest.raises(RmsnormDeployError, match=rf"{call}: the CUDA driver returned CUDA_ERROR_INVALID_IMAGE\."):
            launcher.launch([1, 2], 1, 3, 0)


def test_without_cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EnvironmentMissingError, match=r"pip install 'rmsnorm-deploy\[kernel\]'"):
        cuda_driver()


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("op_type", ["RMSNorm", "AddRMSNorm"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_kernel_runs_on_what_the_launcher_hands_over(op_type: str, dtype: str, tmp_path: Path) -> None:
    width, epsilon = 96, 1e-5
    kernel = kernel_of(op_type, dtype, width, epsilon, 1.0, 1)
    configs = {few: choose(kernel, 1 if few else None, ARCHITECTURE) for few in (True, False)}
    host = HostKernels(tmp_path, [(kernel, configs[few]) for few in (True, False)])
    made = [
        KernelImage("cubin", ARCHITECTURE, few, config.block, config.rows, config.cluster, f"{few}".encode())
        for few, config in configs.items()
    ]
    known = {f"{few}".encode(): (host, index, configs[few]) for index, few in enumerate((True, False))}
    driver = Driver(host=known, values="pppipp" if kernel.adds else "ppip")
    launcher = Launcher(KernelImages(width, dtype, tuple(made)), kernel.op, driver)
    generator, kind = np.random.default_rng(0), NUMPY[dtype]
    for rows in (3, 37):
        x, residual = (generator.normal(size=(rows, width)).astype(kind) for _ in range(2))
        weight = generator.normal(size=width).astype(kind)
        given = [x, residual, weight] if kernel.adds else [x, weight]
        outputs = [np.zeros((rows, width), kind) for _ in range(2 if kernel.adds else 1)]
        pointers = [array.ctypes.data for array in (*given, *outputs)]
        launcher.launch(pointers, len(given), rows, 0)
        assert driver.launches[-1]["image"] == str(rows <= MULTIPROCESSORS).encode()
        total = (x.astype(np.float64) + residual.astype(np.float64)).astype(kind) if kernel.adds else x
        if kernel.adds:
            np.testing.assert_array_equal(outputs[1], total)
        wide = total.astype(np.float64)
        expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + epsilon) * (1 + weight.astype(np.float64))
        steps = float(ml_dtypes.finfo(kind).eps)
        np.testing.assert_allclose(outputs[0].astype(np.float64), expected, rtol=4 * steps, atol=1e-6)
