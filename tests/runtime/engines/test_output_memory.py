"""The memory of outputs whose shapes TensorRT knows during a run only."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rmsnorm_deploy.runtime.engines.io_tensors import IOTensor
from rmsnorm_deploy.runtime.engines.output_memory import allocator_class, new_memory
from tests.helpers.tensorrt import stand_in
from tests.helpers.tensorrt.stand_in import HostDevice

OUTPUT = IOTensor("y", False, torch.int32, (-1, 2))


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture
def allocator(device: HostDevice) -> Any:
    return allocator_class(stand_in)(device, OUTPUT)


@pytest.mark.parametrize("with_stream", [True, False])
@pytest.mark.parametrize("alignment", [1, 64, 256])
def test_an_output_is_what_tensorrt_wrote(allocator: Any, alignment: int, with_stream: bool) -> None:
    """TensorRT before 10 has no stream here."""
    ask = ("y", 0, 24, alignment)
    address = allocator.reallocate_output_async(*ask, 7) if with_stream else allocator.reallocate_output(*ask)
    assert address % alignment == 0
    offset = address - allocator.held.data_ptr()
    allocator.held[offset : offset + 24] = torch.arange(6, dtype=torch.int32).view(torch.uint8)
    allocator.notify_shape("y", [3, 2])
    assert allocator.result().tolist() == [[0, 1], [2, 3], [4, 5]]


def test_each_run_has_memory_of_its_own(allocator: Any, device: HostDevice) -> None:
    for number in range(3):
        allocator.reallocate_output_async("y", 0, 8, 256, 0)
        allocator.held.fill_(number)
        allocator.notify_shape("y", (1, 2))
        assert allocator.result().view(torch.uint8).unique().tolist() == [number]
        assert device.live() == 0


def test_an_output_without_elements_needs_no_memory(allocator: Any) -> None:
    allocator.notify_shape("y", (0, 2))
    assert allocator.result().shape == (0, 2)


def test_what_tensorrt_does_not_say_is_an_error(allocator: Any) -> None:
    allocator.reallocate_output_async("y", 0, 8, 256, 0)
    with pytest.raises(RuntimeError, match="TensorRT has not said the shape of y"):
        allocator.result()


def test_without_memory_nothing_is_raised_in_tensorrt(allocator: Any, device: HostDevice) -> None:
    device.fail_at_bytes = 1
    assert allocator.reallocate_output_async("y", 0, 8, 256, 0) is None
    assert isinstance(allocator.problem, torch.OutOfMemoryError)


def test_new_memory_is_on_the_device(device: HostDevice) -> None:
    found = new_memory(device)("y", (2, 3), torch.float16)
    assert (found.shape, found.dtype, device.live()) == ((2, 3), torch.float16, 12)
