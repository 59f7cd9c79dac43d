"""Run an engine in TensorRT or TensorRT-RTX (`TensorRTRunner`), on arrays or on tensors of its GPU."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...export.graph.cache_names import is_present, present_to_past
from ...export.graph.sizes import size_limits_of
from ...models.dtypes import torch_name
from ...models.errors import UsageError
from ...models.tensors import to_numpy, to_torch
from ..engines import device as devices
from ..engines.context import EngineContext, check_tensors
from ..engines.device_cache import DeviceCache
from ..engines.engine_file import open_engine_file
from ..engines.io_tensors import IOTensor
from ..engines.open_engine import OpenEngine, local_gpu, open_engine
from ..engines.output_memory import Memory, new_memory
from .base import Array, ClosesOnExit, TensorInfo, check_feeds

if TYPE_CHECKING:
    import torch


class TensorRTRunner(ClosesOnExit):
    """Runs an engine on an NVIDIA GPU; several threads may run it at once.

    Args:
        source: the engine's file.
        runtime: `tensorrt` or `rtx`; None for the product that built the engine.
        contexts: how many runs may be at work at once, each with memory and a stream of its own; others wait.
        cuda_graphs: replay runs of the same shapes as CUDA graphs; see `EngineContext`.
        device: the number of the GPU.
        plugin_library: the plugin's C++ library; None for the one that the engine was built with, or the default one.

    Raises:
        UsageError: the file is not an engine, or was changed since it was built.
        UnsupportedError: it was built for another GPU or by another version.
        EnvironmentMissingError: TensorRT, PyTorch for CUDA, the GPU or the plugin's library is missing.
        RmsnormDeployError: TensorRT cannot open it.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        runtime: str | None = None,
        contexts: int = 1,
        cuda_graphs: bool = False,
        device: int = 0,
        plugin_library: str | os.PathLike[str] | None = None,
    ) -> None:
        if contexts < 1:
            raise UsageError(f"contexts: expected at least 1, got {contexts}.")
        file = open_engine_file(Path(source), runtime)
        self._where, self._graphs = str(file.path), cuda_graphs
        gpu = local_gpu(device)
        self._device = devices.open_device(device)
        self._stream = self._device.stream()
        with self._device.using(self._stream):
            library = None if plugin_library is None else Path(plugin_library)
            self._opened: OpenEngine | None = open_engine(file, gpu, library)
        self._count = contexts
        # None stands for a context that is yet to be made: the first one, and one that replaces a failed one.
        self._free: queue.LifoQueue[EngineContext | None] = queue.LifoQueue()
        for _ in range(contexts):
            self._free.put(None)
        dims = file.dims()
        self._inputs = [_info(tensor, dims.get(tensor.name)) for tensor in self._opened.inputs]
        self._outputs = [_info(tensor, None) for tensor in self._opened.outputs]
        self._limits = size_limits_of(file.manifest) if file.manifest else None

    def close(self) -> None:
        """Wait for runs that are at work, then release the contexts, the engine and their memory."""
        if self._opened is None:
            return
        for _ in range(self._count):
            self._free.get()
        self._opened = None

    def inputs(self) -> list[TensorInfo]:
        """The engine's inputs; dims have their names where the engine's record has them."""
        return list(self._inputs)

    def outputs(self) -> list[TensorInfo]:
        """The engine's outputs."""
        return list(self._outputs)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run one inference; see `Runner.run`.

        Args:
            feeds: an array for every input.
            outputs: names of the outputs to copy to the host; None is all of them.

        Raises:
            UsageError: the feeds do not match the inputs, or no optimization profile covers their shapes.
            RmsnormDeployError: TensorRT failed.
        """
        opened = self._engine()
        check_feeds(self._inputs, feeds, self._where, self._limits)
        given = {tensor.name: self._placed(tensor, feeds[tensor.name]) for tensor in opened.inputs}
        results = self._run(given, None)
        return {name: to_numpy(results[name].cpu()) for name in (results if outputs is None else outputs)}

    def run_tensors(self, inputs: Mapping[str, torch.Tensor], memory: Memory | None = None) -> dict[str, torch.Tensor]:
        """Run one inference on tensors of the GPU; contiguous ones are not copied.

        Args:
            inputs: a tensor for every input.
            memory: returns the contiguous tensor that an output is written to, by its name, shape and dtype; None for
                new tensors.

        Returns:
            Every output by name, complete, on the GPU.

        Raises:
            UsageError, RmsnormDeployError: as `run`; or a tensor has another dtype or device.
        """
        check_tensors(self._engine().inputs, inputs, self._device, self._where)
        return self._run(dict(inputs), memory)

    def decoding(self) -> DeviceDecoding:
        """The steps of a decoder, whose cache stays on the GPU."""
        return DeviceDecoding(self, self._engine(), self._device)

    def provenance(self) -> dict[str, Any]:
        """Versions, the GPU, the engine's hash and what it was built from.

        Raises:
            UsageError: the runner is closed.
        """
        opened = self._engine()
        record = opened.file.record
        return {
            "runner": "tensorrt",
            "product": opened.api.flavor.title,
            "version": opened.api.version,
            "gpu": {"name": opened.gpu[0], "architecture": f"sm_{opened.gpu[1]}"},
            "engine": {"path": self._where, "sha256": record.get("sha256"), "built": record.get("built")},
            "model": {key: value for key, value in record.get("model", {}).items() if key != "manifest"},
            "plugin": record.get("plugin"),
            "norms": record.get("norms", []),
            "contexts": self._count,
            "cuda_graphs": self._graphs,
        }

    def placed(self, feeds: Mapping[str, Array]) -> dict[str, torch.Tensor]:
        """Arrays as tensors on the GPU, or in host memory where TensorRT reads shapes there."""
        known = {tensor.name: tensor for tensor in self._engine().inputs}
        return {name: self._placed(known[name], array) for name, array in feeds.items()}

    def _placed(self, tensor: IOTensor, array: Array) -> torch.Tensor:
        found = to_torch(array)
        return found if tensor.on_host else found.to(self._device.place)

    def _engine(self) -> OpenEngine:
        if self._opened is None:
            raise UsageError(f"{self._where}: the runner is closed.")
        return self._opened

    def _run(self, inputs: dict[str, torch.Tensor], memory: Memory | None) -> dict[str, torch.Tensor]:
        with self._context() as context:
            return context.run(inputs, memory)

    @contextmanager
    def _context(self) -> Iterator[EngineContext]:
        """A context that no other run uses. One that TensorRT failed in is dropped, and the next run makes another."""
        context = self._free.get()
        try:
            if context is None:
                context = EngineContext(self._engine(), self._device, self._graphs)
            yield context
        except UsageError:
            raise
        except BaseException:
            context = None
            raise
        finally:
            self._free.put(context)


class DeviceDecoding:
    """See `Decoding`: the cache is never copied, neither on the GPU nor to the host.

    Args:
        runner: runs the engine.
        opened: the engine.
        device: the GPU.
    """

    def __init__(self, runner: TensorRTRunner, opened: OpenEngine, device: devices.Device) -> None:
        self._runner, self._device = runner, device
        self._names = {tensor.name for tensor in opened.inputs}
        self._cache = DeviceCache(device)
        self._past: dict[str, torch.Tensor] = {}

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """See `Decoding.step`."""
        inputs = self._runner.placed({name: array for name, array in feeds.items() if name not in self._past})
        outputs = self._runner.run_tensors({**inputs, **self._past}, self._memory)
        self._cache.advance()
        self._past = {name: value for name, value in present_to_past(outputs).items() if name in self._names}
        return to_numpy(outputs["logits"][:, -1].float().cpu())

    def restart(self) -> None:
        """See `Decoding.restart`."""
        self._past = {}
        self._cache.clear()

    def select(self, rows: Sequence[int]) -> bool:
        """See `Decoding.select`; the buffers of the cache are written by the engine alone."""
        return False

    def _memory(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if is_present(name):
            return self._cache.memory(name, shape, dtype)
        return new_memory(self._device)(name, shape, dtype)


def _info(tensor: IOTensor, dims: list[int | str | None] | None) -> TensorInfo:
    shape = tuple(None if size == -1 else size for size in tensor.shape)
    named = shape if dims is None or len(dims) != len(shape) else tuple(dims)
    return TensorInfo(tensor.name, torch_name(tensor.dtype), named)
