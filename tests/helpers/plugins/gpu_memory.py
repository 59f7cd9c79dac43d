"""Device memory of tests that run on a GPU, through CUDA's driver."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rmsnorm_deploy.plugins.tensorrt.launcher import cuda_driver
from rmsnorm_deploy.runtime.engines.api import cuda_device

Array = NDArray[Any]
# (name, compute capability without the point) of the GPU here; None if there is none.
DEVICE = cuda_device()
needs_gpu = pytest.mark.skipif(DEVICE is None, reason="needs an NVIDIA GPU and its driver")


class GpuMemory:
    """Memory of one test, and a context to use it in."""

    def __init__(self) -> None:
        assert DEVICE is not None
        self.architecture = DEVICE[1]
        self.driver = cuda_driver()
        self.call(self.driver.cuInit(0))
        self._device = self.call(self.driver.cuDeviceGet(0))
        context = self.call(self.driver.cuDevicePrimaryCtxRetain(self._device))
        self.call(self.driver.cuCtxSetCurrent(context))
        self._pointers: list[Any] = []

    def put(self, array: Array) -> int:
        pointer = self.empty(array.nbytes)
        array = np.ascontiguousarray(array)
        self.call(self.driver.cuMemcpyHtoD(pointer, array.ctypes.data, array.nbytes))
        return pointer

    def empty(self, size: int) -> int:
        self._pointers.append(self.call(self.driver.cuMemAlloc(max(size, 1))))
        return int(self._pointers[-1])

    def get(self, pointer: int, like: Array) -> Array:
        array = np.empty_like(like)
        self.call(self.driver.cuCtxSynchronize())
        self.call(self.driver.cuMemcpyDtoH(array.ctypes.data, pointer, array.nbytes))
        return array

    def free(self) -> None:
        """Free what was allocated."""
        for pointer in self._pointers:
            self.call(self.driver.cuMemFree(pointer))
        self._pointers.clear()

    def close(self) -> None:
        """Free what was allocated, and give the context back."""
        self.free()
        self.call(self.driver.cuDevicePrimaryCtxRelease(self._device))

    def call(self, result: tuple[Any, ...]) -> Any:
        """The result of a call of the driver, which must succeed."""
        status, *values = result
        assert int(status) == 0, status
        return values[0] if values else None
