"""The GPU that an engine runs on (`CudaDevice`): its memory, streams and CUDA graphs, as PyTorch has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from ...models.errors import EnvironmentMissingError

if TYPE_CHECKING:
    import torch


class Stream(Protocol):
    """A queue of work of a device."""

    @property
    def handle(self) -> int:
        """The address of the CUDA stream."""
        ...

    def synchronize(self) -> None:
        """Wait until all work of the stream has ended."""
        ...


class Device(Protocol):
    """What engines run on."""

    @property
    def place(self) -> torch.device:
        """PyTorch's name of it."""
        ...

    def stream(self) -> Stream:
        """A new stream."""
        ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A new tensor in the device's memory, not initialized."""
        ...

    def using(self, stream: Any) -> AbstractContextManager[None]:
        """Within this context, PyTorch's work goes to the stream, after all work that the caller has queued."""
        ...

    def captured(self, stream: Any, work: Callable[[], None]) -> Callable[[], None]:
        """A function that repeats the work as a CUDA graph; the stream must have done the same work before."""
        ...


class CudaStream:
    """A stream of PyTorch's.

    Args:
        place: the device.
    """

    def __init__(self, place: torch.device) -> None:
        import torch

        self.own = torch.cuda.Stream(place)

    @property
    def handle(self) -> int:
        """The address of the CUDA stream."""
        return int(self.own.cuda_stream)

    def synchronize(self) -> None:
        """Wait until all work of the stream has ended."""
        self.own.synchronize()


class CudaDevice:
    """An NVIDIA GPU.

    Args:
        index: its number.

    Raises:
        EnvironmentMissingError: PyTorch has no CUDA, or does not find this GPU.
    """

    def __init__(self, index: int = 0) -> None:
        import torch

        if torch.version.cuda is None:
            raise EnvironmentMissingError(
                f"running an engine requires PyTorch for CUDA, which holds its inputs and outputs; PyTorch "
                f"{torch.__version__} was built without it. Install it from https://pytorch.org."
            )
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if index >= count:
            raise EnvironmentMissingError(
                f"running an engine requires an NVIDIA GPU and its driver; PyTorch finds {count} of them, and number "
                f"{index} was requested."
            )
        self.place = torch.device("cuda", index)

    def stream(self) -> CudaStream:
        """See `Device.stream`."""
        return CudaStream(self.place)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `Device.empty`."""
        import torch

        return torch.empty(tuple(shape), dtype=dtype, device=self.place)

    @contextmanager
    def using(self, stream: CudaStream) -> Iterator[None]:
        """See `Device.using`."""
        import torch

        with torch.cuda.device(self.place):
            stream.own.wait_stream(torch.cuda.current_stream(self.place))
            with torch.cuda.stream(stream.own):
                yield

    def captured(self, stream: CudaStream, work: Callable[[], None]) -> Callable[[], None]:
        """See `Device.captured`."""
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream.own, capture_error_mode="thread_local"):
            work()
        return graph.replay


def open_device(index: int = 0) -> Device:
    """The GPU of this number.

    Raises:
        EnvironmentMissingError: see `CudaDevice`.
    """
    return CudaDevice(index)
