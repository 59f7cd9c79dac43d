"""The cache of a decoder in the memory of its GPU (`DeviceCache`)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .device import Device
from .io_tensors import Shape

if TYPE_CHECKING:
    import torch


class DeviceCache:
    """Two buffers for each tensor of a cache: a step reads one, and writes the other.

    A buffer that is too small is replaced by one of twice the size, so that many steps need few allocations, and no
    step copies the cache. A step that fails can be repeated: what it read is unchanged.

    Args:
        device: the GPU.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._read: dict[str, torch.Tensor] = {}
        self._written: dict[str, torch.Tensor] = {}

    def memory(self, name: str, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        """Where a step writes a tensor of the cache."""
        held, size = self._written.get(name), math.prod(shape)
        if held is None or held.numel() < size or held.dtype != dtype:
            least = 0 if held is None else 2 * held.numel()
            held = self._written[name] = self._device.empty((max(size, least, 1),), dtype)
        return held[:size].view(shape)

    def advance(self) -> None:
        """Let the next step read what this one has written."""
        self._read, self._written = self._written, self._read

    def clear(self) -> None:
        """Forget the tensors, and free their memory."""
        self._read, self._written = {}, {}
