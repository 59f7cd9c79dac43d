"""The kernels of one GPU, compiled at first use and launched on PyTorch's current stream."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...models.errors import RmsnormDeployError
from ..kernel.compiler import compile_kernel
from ..kernel.launch_config import layouts
from ..kernel.norm_kernel import NormKernel
from ..tensorrt.images import KernelImages, image_of
from ..tensorrt.launcher import Launcher, cuda_driver
from .kernel_choice import RowStrides, alignment


@dataclass(frozen=True, slots=True)
class LaunchTensors:
    """The tensors of one launch, on one device.

    Attributes:
        rows: x and the residual or the gate, where the kernel has one, both `[..., width]`; where the kernel has
            groups, several are side by side.
        weight: contiguous `[weight_rows * width]`, or None.
        scale: one float32 element where the kernel quantizes by a given scale, else None.
        outputs: contiguous y, the sum where the kernel adds, and float32 `[..., 1]` where it quantizes by row.
    """

    rows: list[tuple[Tensor, RowStrides]]
    weight: Tensor | None
    scale: Tensor | None
    outputs: tuple[Tensor, ...]

    @property
    def inputs(self) -> list[Tensor]:
        """In the kernel's order."""
        return [*(tensor for tensor, _ in self.rows), *(t for t in (self.weight, self.scale) if t is not None)]


class DeviceKernels:
    """The kernels of one GPU; its context must be the current one.

    Args:
        architecture: compute capability without the point, such as 90.
        driver: `cuda.bindings.driver`, or a replacement for it.
    """

    def __init__(self, architecture: int, driver: Any) -> None:
        self._architecture = architecture
        self._driver = driver
        self._launchers: dict[tuple[NormKernel, int], Launcher] = {}
        self._lock = threading.Lock()

    def run(self, kernel: NormKernel, tensors: LaunchTensors, stream: int = 0, capturing: bool = False) -> None:
        """Launch the kernel.

        Args:
            kernel: what it computes.
            tensors: what it reads and writes.
            stream: handle of the CUDA stream.
            capturing: whether a CUDA graph is being captured, so that nothing can be compiled or loaded.

        Raises:
            RmsnormDeployError: the kernel is not loaded while a graph is captured; it failed to compile; or a call of
                the driver failed.
            EnvironmentMissingError: NVRTC is not installed.
        """
        launcher = self._launcher(kernel, alignment(tensors.rows, tensors.weight), capturing)
        inputs, outputs = tensors.inputs, tensors.outputs
        strides = [n for _, row in tensors.rows for n in (row.outer, row.inner)] if kernel.strided else []
        pointers = [tensor.data_ptr() for tensor in (*inputs, *outputs)]
        launcher.launch(pointers, len(inputs), outputs[0].numel() // kernel.width, stream, strides)

    def _launcher(self, kernel: NormKernel, aligned: int, capturing: bool) -> Launcher:
        found = self._launchers.get((kernel, aligned))
        if found is not None:
            return found
        if capturing:
            raise RmsnormDeployError(
                f"{kernel.op}: expected a kernel that is loaded before the capture of a CUDA graph, got one of width "
                f"{kernel.width} in {kernel.dtype} that has not run yet. Run the model once with inputs of "
                "these dtypes and strides before the capture."
            )
        with self._lock:
            if (kernel, aligned) not in self._launchers:
                launcher = Launcher(self._images(kernel, aligned), kernel.op, self._driver)
                launcher.load()
                self._launchers[kernel, aligned] = launcher
            return self._launchers[kernel, aligned]

    def _images(self, kernel: NormKernel, aligned: int) -> KernelImages:
        images = []
        for config in layouts(kernel, self._architecture, aligned):
            compiled = compile_kernel(kernel, config, self._architecture)
            images.append(image_of(config, self._architecture, compiled.image))
        return KernelImages(kernel.width, kernel.dtype, tuple(images))


@functools.cache
def kernels_of(index: int) -> DeviceKernels:
    """The kernels of a CUDA device by its index, which live as long as the process.

    Raises:
        EnvironmentMissingError: cuda-bindings is not installed.
    """
    major, minor = torch.cuda.get_device_capability(index)
    return DeviceKernels(10 * major + minor, cuda_driver())


def run_on_device(kernel: NormKernel, tensors: LaunchTensors) -> None:
    """`DeviceKernels.run` on the tensors' CUDA device and its current stream.

    Raises:
        RmsnormDeployError: see `DeviceKernels.run`.
    """
    device = tensors.outputs[0].device
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        kernels_of(device.index).run(kernel, tensors, stream, torch.cuda.is_current_stream_capturing())
