"""The memory of an engine's outputs: allocated before a run where their shapes are known, during it where not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .device import Device
from .io_tensors import IOTensor, Shape

if TYPE_CHECKING:
    import torch

# Where an output is written: a contiguous tensor for a name, a shape and a dtype.
Memory = Callable[[str, Shape, "torch.dtype"], "torch.Tensor"]


def new_memory(device: Device) -> Memory:
    """Memory that is allocated for each run, and then the caller's."""
    return lambda _name, shape, dtype: device.empty(shape, dtype)


def allocator_class(trt: Any) -> Any:
    """The class of an allocator for one output whose shape follows from the values of the inputs.

    Its arguments are the device and the output; `result()` is the output after the run.
    """

    class OutputAllocator(trt.IOutputAllocator):
        """TensorRT calls it during a run. Its methods must not raise."""

        def __init__(self, device: Device, tensor: IOTensor) -> None:
            super().__init__()
            self.device, self.tensor = device, tensor
            self.held: torch.Tensor | None = None
            self.shape: Shape | None = None
            self.offset = 0
            self.problem: Exception | None = None

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int | None:
            return self.memory_of(size, alignment)

        def reallocate_output_async(
            self, tensor_name: str, memory: int, size: int, alignment: int, stream: int
        ) -> int | None:
            return self.memory_of(size, alignment)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shape = tuple(shape)

        def memory_of(self, size: int, alignment: int) -> int | None:
            """The address of memory of this size in bytes; None if there is not enough."""
            import torch

            step = max(alignment, 1)
            try:
                self.held = self.device.empty((size + step,), torch.uint8)
            except Exception as error:  # any error would end the process
                self.problem = error
                return None
            address = self.held.data_ptr()
            self.offset = -address % step
            return address + self.offset

        def result(self) -> torch.Tensor:
            """The output."""
            held, shape, dtype = self.held, self.shape, self.tensor.dtype
            self.held = self.shape = None  # the next run gets memory of its own
            if shape is None:
                raise RuntimeError(f"TensorRT has not said the shape of {self.tensor.name}")
            size = math.prod(shape) * dtype.itemsize
            if size == 0 or held is None:
                return self.device.empty(shape, dtype)
            return held[self.offset : self.offset + size].clone().view(dtype).view(shape)

    return OutputAllocator
