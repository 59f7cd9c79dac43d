"""The cache of a decoder on its device: two buffers that take turns, and no allocation for most steps."""

from __future__ import annotations

import torch

from rmsnorm_deploy.runtime.engines.device_cache import DeviceCache
from tests.helpers.tensorrt.stand_in import HostDevice


def test_a_step_never_writes_what_it_reads() -> None:
    device = HostDevice()
    cache, read = DeviceCache(device), None
    for length in range(1, 40):
        written = cache.memory("k", (1, length, 4), torch.float32)
        assert written.shape == (1, length, 4)
        assert written.is_contiguous()
        assert read is None or written.data_ptr() != read.data_ptr()
        written.fill_(length)
        assert read is None or bool((read == length - 1).all())
        cache.advance()
        read = written


def test_a_failed_step_is_repeated_into_the_same_memory() -> None:
    cache = DeviceCache(HostDevice())
    first = cache.memory("k", (2, 2), torch.float16)
    cache.advance()
    tried = cache.memory("k", (2, 3), torch.float16)
    again = cache.memory("k", (2, 3), torch.float16)
    assert tried.data_ptr() == again.data_ptr() != first.data_ptr()


def test_buffers_double_and_are_freed() -> None:
    device = HostDevice()
    cache, sizes = DeviceCache(device), set()
    for length in range(1, 1001):
        cache.memory("k", (length, 8), torch.float32)
        cache.advance()
        sizes.add(device.live())
    assert len(sizes) <= 24  # two buffers that double ten times
    assert device.live() <= 2 * 2 * 1024 * 8 * 4
    cache.clear()
    assert device.live() == 0


def test_another_dtype_gets_other_memory() -> None:
    cache = DeviceCache(HostDevice())
    assert cache.memory("k", (0, 4), torch.float32).numel() == 0
    assert cache.memory("k", (2, 4), torch.float16).dtype == torch.float16
