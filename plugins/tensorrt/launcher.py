"""Run the compiled kernels of an engine on a GPU, through the CUDA driver API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...models.errors import EnvironmentMissingError, RmsnormDeployError
from .images import KernelImage, KernelImages


def cuda_driver() -> Any:
    """`cuda.bindings.driver`.

    Raises:
        EnvironmentMissingError: it is not installed.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise EnvironmentMissingError(
            "running the plugin in Python requires cuda-bindings; install: pip install 'rmsnorm-deploy[kernel]'"
        ) from error
    return driver


class Launcher:
    """The kernels of one norm in the current CUDA context; each is loaded at its first launch.

    Args:
        images: the kernels in the engine.
        name: name of the kernels' entry point, `rms_norm` or `add_rms_norm`.
        driver: `cuda.bindings.driver`, or a replacement for it.
    """

    def __init__(self, images: KernelImages, name: str, driver: Any) -> None:
        self._images = images
        self._name = name.encode()
        self._driver = driver
        self._functions: dict[KernelImage, Any] = {}
        self._device: tuple[int, int] | None = None

    def load(self) -> None:
        """Load every kernel that this GPU can run, as is necessary before the capture of a CUDA graph.

        Raises:
            RmsnormDeployError: a call of the driver failed.
        """
        architecture, _ = self._device or self._found_device()
        for image in self._images.images:
            if image.runs_on(architecture):
                self._function(image)

    def launch(self, pointers: list[int], inputs: int, rows: int, stream: int, strides: Sequence[int] = ()) -> None:
        """Run the kernel on `rows` rows; for 0 rows nothing is launched.

        Args:
            pointers: device addresses of all inputs, then of all outputs.
            inputs: number of inputs among them.
            rows: number of rows of x.
            stream: handle of the CUDA stream.
            strides: of a strided kernel, in elements: outer and inner of x, then of the residual.

        Raises:
            RmsnormDeployError: no image runs on this GPU, or a call of the driver failed.
        """
        if rows == 0:
            return
        architecture, multiprocessors = self._device or self._found_device()
        image = self._images.choose(architecture, rows, multiprocessors)
        if image is None:
            built = ", ".join(f"sm_{number}" for number in self._images.architectures)
            raise RmsnormDeployError(
                f"the engine has kernels for {built}, and this GPU is sm_{architecture}. Build it again with "
                f"--arch sm_{architecture}."
            )
        values: list[Any] = [np.array([pointer], np.uint64) for pointer in pointers]
        values[inputs:inputs] = [np.array([rows], np.int32), *(np.array([stride], np.int64) for stride in strides)]
        addresses = np.array([value.ctypes.data for value in values], np.uint64)
        function, grid, given = self._function(image), image.grid(rows), addresses.ctypes.data
        if image.waits and hasattr(self._driver, "cuLaunchKernelEx"):
            config = self._overlapping(grid, image.block, stream)
            self._call(self._driver.cuLaunchKernelEx(config, function, given, 0), "cuLaunchKernelEx")
        else:
            launched = self._driver.cuLaunchKernel(function, grid, 1, 1, image.block, 1, 1, 0, stream, given, 0)
            self._call(launched, "cuLaunchKernel")

    def _overlapping(self, grid: int, block: int, stream: int) -> Any:
        """The launch of a kernel that may begin before the kernel before it in the stream has ended."""
        driver = self._driver
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.hStream = stream
        config.attrs, config.numAttrs = [attribute], 1
        return config

    def _function(self, image: KernelImage) -> Any:
        if image not in self._functions:
            module = self._call(self._driver.cuModuleLoadData(image.image), "cuModuleLoadData")
            self._functions[image] = self._call(
                self._driver.cuModuleGetFunction(module, self._name), "cuModuleGetFunction"
            )
        return self._functions[image]

    def _found_device(self) -> tuple[int, int]:
        driver, attribute = self._driver, self._driver.CUdevice_attribute
        device = self._call(driver.cuCtxGetDevice(), "cuCtxGetDevice")
        major, minor, count = (
            self._call(driver.cuDeviceGetAttribute(what, device), "cuDeviceGetAttribute")
            for what in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            )
        )
        self._device = (10 * major + minor, count)
        return self._device

    def _call(self, result: tuple[Any, ...], what: str) -> Any:
        status, *values = result
        if int(status) != 0:
            raise RmsnormDeployError(f"{what}: the CUDA driver returned {getattr(status, 'name', status)}.")
        return values[0] if values else None
