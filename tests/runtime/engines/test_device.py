"""The GPU as PyTorch has it: what a run asks of `torch.cuda`, in which order, with a stand-in of its streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from rmsnorm_deploy.models.errors import EnvironmentMissingError
from rmsnorm_deploy.runtime.engines.device import CudaDevice, open_device


class FakeCuda:
    """Notes every call."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        fake = self

        class Stream:
            cuda_stream = 77

            def __init__(self, place: torch.device) -> None:
                fake.calls.append(f"stream on {place}")

            def wait_stream(self, other: str) -> None:
                fake.calls.append(f"wait for {other}")

            def synchronize(self) -> None:
                fake.calls.append("synchronize")

        class CUDAGraph:
            def replay(self) -> None:
                fake.calls.append("replay")

        self.Stream, self.CUDAGraph = Stream, CUDAGraph

    @contextmanager
    def device(self, place: torch.device) -> Iterator[None]:
        self.calls.append(f"device {place}")
        yield

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.calls.append("on the stream")
        yield
        self.calls.append("as before")

    @contextmanager
    def graph(self, graph: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.calls.append(f"capture, errors {capture_error_mode}")
        yield
        self.calls.append("captured")

    def current_stream(self, place: torch.device) -> str:
        return "the caller's"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    found = FakeCuda()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("Stream", "CUDAGraph", "device", "stream", "graph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(found, name))
    return found


def test_work_follows_that_of_the_caller(cuda: FakeCuda) -> None:
    device = open_device(1)
    stream = device.stream()
    with device.using(stream):
        cuda.calls.append("work")
    stream.synchronize()
    assert stream.handle == 77
    before = ["stream on cuda:1", "device cuda:1", "wait for the caller's", "on the stream"]
    assert cuda.calls == [*before, "work", "as before", "synchronize"]


def test_a_graph_is_captured_while_other_threads_allocate(cuda: FakeCuda) -> None:
    device = CudaDevice(0)
    replay = device.captured(device.stream(), lambda: cuda.calls.append("work"))
    replay()
    replay()
    assert cuda.calls[1:] == ["capture, errors thread_local", "work", "captured", "replay", "replay"]


def test_a_missing_gpu_is_named(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CudaDevice(0).place == torch.device("cuda", 0)
    with pytest.raises(EnvironmentMissingError, match=r"PyTorch finds 2 of them, and number 2 was requested"):
        CudaDevice(2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentMissingError, match=r"PyTorch finds 0 of them"):
        CudaDevice(0)


def test_a_cpu_build_of_pytorch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(EnvironmentMissingError, match=r"requires PyTorch for CUDA.*was built without it"):
        open_device()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and the CUDA build of torch")
def test_a_device_has_memory_streams_and_graphs() -> None:
    device = open_device()
    stream = device.stream()
    x, y = device.empty((1000,), torch.float32), device.empty((1000,), torch.float32)
    x.fill_(1.0)
    with device.using(stream):
        y.copy_(x)
        replay = device.captured(stream, lambda: y.add_(x))
        for _ in range(3):
            replay()
    stream.synchronize()
    assert y.tolist() == [4.0] * 1000
