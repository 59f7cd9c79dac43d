"""One execution context of an engine (`EngineContext`): a stream, and one run at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...models.errors import UsageError
from .device import Device
from .io_tensors import IOTensor, Shape, choose_profile, text_of
from .open_engine import OpenEngine
from .output_memory import Memory, allocator_class, new_memory

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Graph:
    """A captured run: its inputs and outputs stay where they are."""

    inputs: Tensors
    outputs: Tensors
    replay: Callable[[], None]


class EngineContext:
    """Runs an engine on tensors of its device, without copies of contiguous ones.

    Args:
        opened: the engine.
        device: the GPU.
        cuda_graphs: replay a run as a CUDA graph from the third one of the same shapes on; its inputs and outputs are
            copied. TensorRT-RTX has graphs of its own.

    Raises:
        RmsnormDeployError: TensorRT makes no context, for which it reserves memory.
    """

    def __init__(self, opened: OpenEngine, device: Device, cuda_graphs: bool = False) -> None:
        self._opened, self._device = opened, device
        self._with_graphs = cuda_graphs and not opened.api.has_cuda_graphs
        self._stream = device.stream()
        self._context: Any = opened.api.execution_context(opened.engine, cuda_graphs)
        if self._context is None:
            raise opened.failure("TensorRT made no execution context")
        self._shapes: dict[str, Shape] = {}
        self._allocators: dict[str, Any] = {}  # TensorRT has their addresses only
        self._runs = 0  # in these shapes
        self._graph: _Graph | None = None
        # TensorRT refuses a null address, which empty tensors have.
        self._nothing = device.empty((256,), _bytes())

    def run(self, inputs: Tensors, memory: Memory | None = None) -> Tensors:
        """Run once, and wait for the results.

        Args:
            inputs: every input, on the device (host tensors where TensorRT reads shapes).
            memory: where outputs are written; None for new tensors.

        Returns:
            Every output. One that shares memory with an input is that input.

        Raises:
            UsageError: no profile covers the shapes.
            RmsnormDeployError: TensorRT failed; the context must not be used again.
        """
        with self._device.using(self._stream):
            placed = {tensor.name: inputs[tensor.name].contiguous() for tensor in self._opened.inputs}
            try:
                if self._with_graphs and memory is None:
                    return self._with_graph(placed)
                outputs = self._enqueue(placed, memory or new_memory(self._device))
                self._stream.synchronize()
                return outputs()
            except RuntimeError as error:  # of TensorRT's bindings, or PyTorch without memory
                raise self._opened.failure(f"TensorRT failed on these inputs ({error})") from error
            finally:
                self._stream.synchronize()  # nothing of a failed run may still be at work when its memory is freed

    def _enqueue(self, inputs: Tensors, memory: Memory) -> Callable[[], Tensors]:
        """Queue a run; returns a function that gives the outputs once it has ended."""
        context, opened = self._context, self._opened
        self._set_shapes({name: tuple(tensor.shape) for name, tensor in inputs.items()})
        for name, tensor in inputs.items():
            self._set_address(name, tensor)
        unknown = context.infer_shapes()
        if unknown:
            raise opened.failure(f"TensorRT cannot infer the shapes of {', '.join(unknown)}")
        outputs: Tensors = {}
        allocators: dict[str, Any] = {}
        for output in opened.outputs:
            shape = tuple(context.get_tensor_shape(output.name))
            if output.alias is not None:
                outputs[output.name] = inputs[output.alias]
            elif -1 in shape:
                allocators[output.name] = self._allocator(output)
                continue
            elif output.on_host:
                outputs[output.name] = _host_tensor(shape, output.dtype)
            else:
                outputs[output.name] = memory(output.name, shape, output.dtype)
            self._set_address(output.name, outputs[output.name])
        if not context.execute_async_v3(self._stream.handle):
            problem = next((a.problem for a in allocators.values() if a.problem is not None), None)
            raise opened.failure("TensorRT failed to run it") from problem
        return lambda: {
            tensor.name: allocators[tensor.name].result() if tensor.name in allocators else outputs[tensor.name]
            for tensor in opened.outputs
        }

    def _set_shapes(self, shapes: dict[str, Shape]) -> None:
        if shapes == self._shapes:
            return
        self._runs, self._graph = 0, None  # a graph is one of these shapes
        context, opened = self._context, self._opened
        number = choose_profile(opened.inputs, shapes, str(opened.file.path))
        if context.active_optimization_profile != number:
            self._shapes = {}
            if not context.set_optimization_profile_async(number, self._stream.handle):
                raise opened.failure(f"TensorRT does not switch to profile {number}")
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape and not context.set_input_shape(name, shape):
                self._shapes = {}
                raise opened.failure(f"TensorRT refuses an input {name} of shape {text_of(shape)}")
        self._shapes = shapes

    def _set_address(self, name: str, tensor: torch.Tensor) -> None:
        address = tensor.data_ptr() or self._nothing.data_ptr()
        if not self._context.set_tensor_address(name, address):
            raise self._opened.failure(f"TensorRT refuses the address of {name}")

    def _allocator(self, tensor: IOTensor) -> Any:
        allocator = self._allocators.get(tensor.name)
        if allocator is None:
            allocator = allocator_class(self._opened.api.trt)(self._device, tensor)
            if not self._context.set_output_allocator(tensor.name, allocator):
                raise self._opened.failure(f"TensorRT refuses an allocator for {tensor.name}")
            self._allocators[tensor.name] = allocator
        return allocator

    # CUDA graphs

    def _with_graph(self, inputs: Tensors) -> Tensors:
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        if self._graph is None or shapes != self._shapes:
            outputs = self._enqueue(inputs, new_memory(self._device))
            self._stream.synchronize()
            found = outputs()
            self._runs += 1
            # The first run of new shapes updates TensorRT's own state, which a graph would not repeat.
            if self._runs > 1 and self._can_be_captured():
                self._graph = self._captured(inputs)
            return found
        for name, tensor in inputs.items():
            self._graph.inputs[name].copy_(tensor)
        self._graph.replay()
        self._stream.synchronize()
        return {name: tensor.clone() for name, tensor in self._graph.outputs.items()}

    def _captured(self, inputs: Tensors) -> _Graph:
        kept = {name: tensor.clone() for name, tensor in inputs.items()}
        outputs: Tensors = {}
        memory = new_memory(self._device)
        known = {
            tensor.name: memory(tensor.name, tuple(self._context.get_tensor_shape(tensor.name)), tensor.dtype)
            for tensor in self._opened.outputs
        }

        def work() -> None:
            outputs.update(self._enqueue(kept, lambda name, _shape, _dtype: known[name])())

        work()
        self._stream.synchronize()
        replay = self._device.captured(self._stream, work)
        return _Graph(kept, dict(outputs), replay)

    def _can_be_captured(self) -> bool:
        """Whether a run in the current shapes can be captured: TensorRT must not allocate or read shapes in it."""
        tensors = self._opened.tensors
        if any(tensor.on_host or tensor.alias is not None for tensor in tensors):
            return False
        return all(-1 not in tuple(self._context.get_tensor_shape(tensor.name)) for tensor in self._opened.outputs)


def check_tensors(tensors: list[IOTensor], given: Mapping[str, torch.Tensor], device: Device, where: str) -> None:
    """Check that tensors match the inputs of an engine in names, dtypes and devices.

    Raises:
        UsageError: one is missing, unknown, of another dtype, or on another device.
    """
    known = {tensor.name: tensor for tensor in tensors}
    if set(known) != set(given):
        missing = [name for name in known if name not in given]
        unknown = [name for name in given if name not in known]
        problems = [f"missing: {', '.join(missing)}"] if missing else []
        problems += [f"unexpected: {', '.join(unknown)}"] if unknown else []
        raise UsageError(f"{where}: inputs {'; '.join(problems)}. The inputs are: {', '.join(known)}.")
    for name, tensor in known.items():
        found = given[name]
        wanted = "cpu" if tensor.on_host else device.place.type
        if found.dtype != tensor.dtype:
            raise UsageError(f"{where}: input {name}: expected dtype {tensor.dtype}, got {found.dtype}.")
        if found.device.type != wanted:
            raise UsageError(f"{where}: input {name}: expected a tensor on {wanted}, got one on {found.device}.")


def _host_tensor(shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    import torch

    return torch.empty(shape, dtype=dtype)


def _bytes() -> torch.dtype:
    import torch

    return torch.uint8
