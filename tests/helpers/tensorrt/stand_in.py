"""A stand-in for TensorRT's runtime where there is no GPU: its execution context computes with ONNX Runtime.

Engines are built by the real TensorRT-RTX; the stand-in opens them by their record, which names the .onnx file they
were built from, and runs that file. It behaves as TensorRT does towards its callers: shapes outside of a profile are
refused, addresses must be set, calls that fail return False or None and leave a message in the log. The signatures of
its methods are compared with the real bindings in `tests/runtime/tensorrt/test_api_names.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import hashlib
import importlib.machinery
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rmsnorm_deploy.models.tensors import to_numpy
from rmsnorm_deploy.runtime.engines import api, device, open_engine
from rmsnorm_deploy.runtime.engines.engine_file import EngineFile
from rmsnorm_deploy.runtime.runners import tensorrt as runner
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from rmsnorm_deploy.runtime.tensorrt import on_demand

GPU = ("NVIDIA L4", 89)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class EngineValidity(enum.Enum):
    INVALID, SUBOPTIMAL, VALID = range(3)


class CudaGraphStrategy(enum.Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64, INT4 = range(10)


_TYPES = {
    "float32": DataType.FLOAT, "float16": DataType.HALF, "bfloat16": DataType.BF16, "int8": DataType.INT8,
    "int32": DataType.INT32, "int64": DataType.INT64, "bool": DataType.BOOL, "uint8": DataType.UINT8,
}  # fmt: skip


class ILogger:
    """The base of our logger."""


class IOutputAllocator:
    """The base of our allocators."""


class Behavior:
    """What the stand-in does, set by tests.

    Attributes:
        fail_at: the number of the execution, counted from 1 over all contexts, that fails; None for none.
        seconds: how long an execution takes at least.
        value_dependent: outputs whose shape is known during the execution only.
        host: inputs that are read in host memory.
        aliases: outputs that share memory with an input, by name.
        no_engine: whether engines cannot be opened.
        no_context: whether there is no memory for a context.
        invalid: what the engine's validity says; None if it is valid.
        refused: names of methods that fail once.
        executions: how many there were.
        most_at_once: how many were at work at the same time.
        change: makes another value of an output, given its name, as a wrong kernel would.
        allocated: sizes that allocators were asked for.
    """

    def __init__(self) -> None:
        self.fail_at: int | None = None
        self.seconds = 0.0
        self.value_dependent: set[str] = set()
        self.host: set[str] = set()
        self.aliases: dict[str, str] = {}
        self.no_engine = self.no_context = False
        self.invalid: str | None = None
        self.refused: set[str] = set()
        self.executions = self.at_once = self.most_at_once = 0
        self.allocated: list[int] = []
        self.change: Callable[[str, np.ndarray], np.ndarray] = lambda _name, value: value
        self.lock = threading.Lock()
        self.records: dict[str, EngineFile] = {}
        self.graphs: list[Any] = []

    def refuses(self, method: str) -> bool:
        """Whether this call fails."""
        with self.lock:
            found = method in self.refused
            self.refused.discard(method)
            return found


class Runtime:
    """Opens engines."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.behavior: Behavior = sys.modules["tensorrt_rtx"].behavior  # type: ignore[attr-defined]

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        file = self.behavior.records.get(hashlib.sha256(serialized_engine).hexdigest())
        if file is None or self.behavior.no_engine:
            self.logger.log(1, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magic tag)")
            return None
        return ICudaEngine(self, file)

    def get_engine_validity(self, buffer: bytes) -> tuple[EngineValidity, Any]:
        if self.behavior.invalid is not None:
            return EngineValidity.INVALID, self.behavior.invalid
        return EngineValidity.VALID, 0


class IRuntimeConfig:
    """Options of a context."""

    def __init__(self) -> None:
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED


class ICudaEngine:
    """An engine that ONNX Runtime runs."""

    def __init__(self, runtime: Runtime, file: EngineFile) -> None:
        assert file.model is not None
        self.runtime, self.behavior = runtime, runtime.behavior
        self.session = OrtRunner(file.model)
        self.infos = {info.name: info for info in (*self.session.inputs(), *self.session.outputs())}
        self.input_names = [info.name for info in self.session.inputs()]
        self.profiles = [
            {name: [tuple(shape) for shape in shapes] for name, shapes in profile.items()}
            for profile in file.record["profiles"]
        ]
        self.known_shapes: dict[Any, dict[str, tuple[int, ...]]] = {}

    @property
    def num_io_tensors(self) -> int:
        return len(self.infos)

    @property
    def num_optimization_profiles(self) -> int:
        return max(len(self.profiles), 1)

    def get_tensor_name(self, index: int) -> str:
        return list(self.infos)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.input_names else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return _TYPES[self.infos[name].dtype]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else -1 for dim in self.infos[name].shape or ())

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self.behavior.host else TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return list(self.profiles[profile_index][name])

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.behavior.aliases.get(name)

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: IRuntimeConfig | None = None) -> IExecutionContext | None:
        self.behavior.graphs.append(None if runtime_config is None else runtime_config.cuda_graph_strategy)
        return None if self.behavior.no_context else IExecutionContext(self)


class IExecutionContext:
    """One run at a time."""

    def __init__(self, engine: ICudaEngine) -> None:
        self.engine, self.behavior = engine, engine.behavior
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.allocators: dict[str, Any] = {}
        self.busy = threading.Lock()

    def fails(self, message: str) -> bool:
        self.engine.runtime.logger.log(1, f"IExecutionContext::{message}")
        return False

    @property
    def active_optimization_profile(self) -> int:
        return self.profile

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if self.behavior.refuses("set_optimization_profile_async"):
            return self.fails("setOptimizationProfileAsync: Error Code 3: API Usage Error")
        if not 0 <= profile_index < self.engine.num_optimization_profiles:
            return self.fails(f"setOptimizationProfileAsync: Error Code 3: no profile {profile_index}")
        self.profile, self.shapes = profile_index, {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name not in self.engine.input_names or self.behavior.refuses("set_input_shape"):
            return self.fails(f"setInputShape: Error Code 3: invalid {name}")
        ranges = self.engine.profiles[self.profile].get(name) if self.engine.profiles else None
        fixed = self.engine.get_tensor_shape(name)
        least, most = (ranges[0], ranges[2]) if ranges else (fixed, fixed)
        fits = len(shape) == len(least) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
        if not fits:
            return self.fails(f"setInputShape: Error Code 3: {name} {shape} is outside of [{least}, {most}]")
        self.shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        if self.behavior.refuses("infer_shapes"):
            return [self.engine.input_names[0]]
        if self.behavior.refuses("infer_shapes by an error"):
            raise RuntimeError("IExecutionContext::inferShapes: Error Code 7: Internal Error")
        return [name for name in self.engine.input_names if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.engine.input_names:
            return self.shapes.get(name, self.engine.get_tensor_shape(name))
        found = self._output_shapes()[name]
        return tuple(-1 for _ in found) if name in self.behavior.value_dependent else found

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if memory == 0 or self.behavior.refuses("set_tensor_address"):
            return self.fails(f"setTensorAddress: Error Code 3: null address of {name}")
        self.addresses[name] = memory
        return True

    def set_output_allocator(self, name: str, output_allocator: Any) -> bool:
        if self.behavior.refuses("set_output_allocator"):
            return self.fails("setOutputAllocator: Error Code 3: API Usage Error")
        self.allocators[name] = output_allocator
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert self.busy.acquire(blocking=False), "two runs of one context at once"
        try:
            return self._execute(stream_handle)
        finally:
            self.busy.release()

    def _execute(self, stream_handle: int) -> bool:
        behavior = self.behavior
        with behavior.lock:
            behavior.executions += 1
            number = behavior.executions
            behavior.at_once += 1
            behavior.most_at_once = max(behavior.most_at_once, behavior.at_once)
        try:
            if number == behavior.fail_at:
                return self.fails("enqueueV3: Error Code 1: Cask (Cask convolution execution)")
            feeds = {name: self._read(name) for name in self.engine.input_names}
            results = self.engine.session.run(feeds)
            time.sleep(behavior.seconds)
            changed = {name: behavior.change(name, value) for name, value in results.items()}
            return all(self._write(name, value, stream_handle) for name, value in changed.items())
        finally:
            with behavior.lock:
                behavior.at_once -= 1

    def _read(self, name: str) -> np.ndarray:
        kind = getattr(torch, self.engine.infos[name].dtype)
        size = int(np.prod(self.shapes[name], dtype=np.int64))
        if size == 0:
            return to_numpy(torch.empty(self.shapes[name], dtype=kind))
        raw = (ctypes.c_ubyte * (size * kind.itemsize)).from_address(self.addresses[name])
        return to_numpy(torch.frombuffer(bytearray(raw), dtype=kind).view(self.shapes[name]))

    def _write(self, name: str, value: np.ndarray, stream_handle: int) -> bool:
        raw = np.ascontiguousarray(value).tobytes()
        address = self.addresses.get(name)
        if name in self.behavior.value_dependent:
            allocator = self.allocators[name]
            self.behavior.allocated.append(len(raw))
            address = allocator.reallocate_output_async(name, 0, len(raw), 256, stream_handle)
            if address is None:
                return self.fails(f"enqueueV3: Error Code 2: OutOfMemory ({name})")
            assert address % 256 == 0
            allocator.notify_shape(name, value.shape)
        assert address is not None, f"no address of {name}"
        ctypes.memmove(address, raw, len(raw))
        return True

    def _output_shapes(self) -> dict[str, tuple[int, ...]]:
        """From a run of zeros: shapes that depend on values are `value_dependent`."""
        key = tuple(self.shapes.items())
        known = self.engine.known_shapes
        if key not in known:
            infos = self.engine.infos
            zeros = {
                name: to_numpy(torch.zeros(shape, dtype=getattr(torch, infos[name].dtype)))
                for name, shape in self.shapes.items()
            }
            known[key] = {name: value.shape for name, value in self.engine.session.run(zeros).items()}
        return known[key]


class HostStream:
    """A stream whose work has always ended."""

    handle = 4096

    def synchronize(self) -> None:
        """Nothing is left to wait for."""


class HostDevice:
    """The host's memory as that of a GPU; `live` says what is still allocated."""

    place = torch.device("cpu")

    def __init__(self) -> None:
        self.made: list[weakref.ref[torch.Tensor]] = []
        self.fail_at_bytes: int | None = None
        self.captures = 0

    def stream(self) -> HostStream:
        return HostStream()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(tuple(shape), dtype=dtype)
        if self.fail_at_bytes is not None and tensor.nbytes >= self.fail_at_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.made = [ref for ref in self.made if ref() is not None]
        self.made.append(weakref.ref(tensor))
        return tensor

    @contextlib.contextmanager
    def using(self, stream: HostStream) -> Iterator[None]:
        yield

    def captured(self, stream: HostStream, work: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        work()
        return work

    def live(self) -> int:
        """Bytes of tensors that somebody still holds."""
        return sum(tensor.nbytes for ref in self.made if (tensor := ref()) is not None)


class StandIn:
    """The stand-in, in the place of TensorRT-RTX in this process.

    Attributes:
        behavior: what it does.
        device: what the engines run on.
        module: the module.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, version: str, product: str = "tensorrt_rtx") -> None:
        self.behavior, self.device = Behavior(), HostDevice()
        self.module = types.ModuleType(product)
        self.module.__spec__ = importlib.machinery.ModuleSpec(product, None)
        for member in (
            ILogger, IOutputAllocator, Runtime, TensorIOMode, TensorLocation, DataType, EngineValidity,
            CudaGraphStrategy,
        ):  # fmt: skip
            setattr(self.module, member.__name__, member)
        for name, value in {"__version__": version, "behavior": self.behavior}.items():
            setattr(self.module, name, value)
        monkeypatch.setitem(sys.modules, product, self.module)
        if product != "tensorrt_rtx":  # where `Runtime` finds its behavior
            monkeypatch.setitem(sys.modules, "tensorrt_rtx", self.module)
        monkeypatch.setattr(api, "cuda_device", lambda _index=0: GPU)
        for module in (open_engine, on_demand):
            monkeypatch.setattr(module, "cuda_device", lambda _index=0: GPU)
        monkeypatch.setattr(open_engine, "ensure_creators", lambda *_: None)
        monkeypatch.setattr(device, "open_device", lambda _index=0: self.device)

        def opened(file: EngineFile, gpu: tuple[str, int], library: Path | None = None) -> Any:
            self.behavior.records[hashlib.sha256(file.path.read_bytes()).hexdigest()] = file
            return open_engine.open_engine(file, gpu, library)

        monkeypatch.setattr(runner, "open_engine", opened)
