"""Packed kernels on a GPU, through CUDA's driver API."""

from __future__ import annotations

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
            "running the plugin in Python needs cuda-bindings; install: pip install 'rmsnorm-deploy[kernel]'"
        ) from error
    return driver


class Launcher:
    """The kernels of one norm in the current CUDA context, loaded when they are first wanted.

    Args:
        images: what the engine carries.
        name: of the kernels' entry, `rms_norm` or `add_rms_norm`.
        driver: `cuda.bindings.driver`, or what stands in for it.
    """

    def __init__(self, images: KernelImages, name: str, driver: Any) -> None:
        self._images = images
        self._name = name.encode()
        self._driver = driver
        self._functions: dict[KernelImage, Any] = {}
        self._device: tuple[int, int] | None = None

    def launch(self, pointers: list[int], inputs: int, rows: int, stream: int) -> None:
        """Run the kernel on `rows` rows; nothing is done for none.

        Args:
            pointers: device addresses of all inputs, then of all outputs.
            inputs: how many of them are inputs.
            rows: rows of x.
            stream: CUDA stream, as a number.

        Raises:
            RmsnormDeployError: no image runs on this GPU, or the driver refuses; the message says which.
        """
        if rows == 0:
            return
        architecture, multiprocessors = self._device or self._found_device()
        image = self._images.choose(architecture, rows, multiprocessors)
        if image is None:
            built = ", ".join(f"sm_{number}" for number in self._images.architectures)
            raise RmsnormDeployError(
                f"the engine carries kernels for {built}, and this GPU is sm_{architecture}. Build it again with "
                f"--arch sm_{architecture}."
            )
        values = [np.array([pointer], np.uint64) for pointer in pointers]
        values.insert(inputs, np.array([rows], np.int32))
        addresses = np.array([value.ctypes.data for value in values], np.uint64)
        launch = self._driver.cuLaunchKernel
        self._call(
            launch(
                self._function(image), image.grid(rows), 1, 1, image.block, 1, 1, 0, stream, addresses.ctypes.data, 0
            ),
            "cuLaunchKernel",
        )

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
            raise RmsnormDeployError(f"CUDA's driver answers {getattr(status, 'name', status)} to {what}.")
        return values[0] if values else None
