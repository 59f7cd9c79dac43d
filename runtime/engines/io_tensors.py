"""The inputs and outputs of an engine (`IOTensor`), and which of its optimization profiles runs given shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ...models.errors import OutsideProfileError, UnsupportedError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

# PyTorch's name of each of TensorRT's data types that an input or output may have.
TORCH_NAMES: Final = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8_e4m3fn", "INT8": "int8",
    "UINT8": "uint8", "INT32": "int32", "INT64": "int64", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class IOTensor:
    """An input or output of an engine.

    Attributes:
        name: its name.
        is_input: whether it is an input.
        dtype: PyTorch's dtype.
        shape: sizes of its dims; -1 where they are dynamic.
        on_host: whether TensorRT reads or writes it in host memory, as it does with shapes.
        profiles: smallest, usual and largest shape of an input in each profile; empty for outputs.
        alias: of an output that TensorRT writes into the memory of an input, that input's name; else None.
    """

    name: str
    is_input: bool
    dtype: torch.dtype
    shape: Shape
    on_host: bool = False
    profiles: tuple[tuple[Shape, Shape, Shape], ...] = ()
    alias: str | None = None

    @property
    def is_dynamic(self) -> bool:
        """Whether a dim has no fixed size."""
        return -1 in self.shape


def read_tensors(trt: Any, engine: Any) -> list[IOTensor]:
    """The inputs and outputs of an engine, in its order.

    Raises:
        UnsupportedError: one has a dtype that PyTorch does not have.
    """
    return [_read(trt, engine, engine.get_tensor_name(index)) for index in range(engine.num_io_tensors)]


def _read(trt: Any, engine: Any, name: str) -> IOTensor:
    import torch

    is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
    kind = engine.get_tensor_dtype(name).name
    if kind not in TORCH_NAMES:
        raise UnsupportedError(
            f"{name}: expected an engine whose inputs and outputs have dtypes of PyTorch ({', '.join(TORCH_NAMES)}), "
            f"got {kind}."
        )
    shape = tuple(engine.get_tensor_shape(name))
    profiles: list[tuple[Shape, Shape, Shape]] = []
    if is_input and -1 in shape:
        for number in range(engine.num_optimization_profiles):
            least, usual, most = engine.get_tensor_profile_shape(name, number)
            profiles.append((tuple(least), tuple(usual), tuple(most)))
    # TensorRT 10 has no tensors that share memory, and no function that says so.
    alias = engine.get_aliased_input_tensor(name) if hasattr(engine, "get_aliased_input_tensor") else None
    return IOTensor(
        name,
        is_input,
        getattr(torch, TORCH_NAMES[kind]),
        shape,
        engine.get_tensor_location(name) == trt.TensorLocation.HOST,
        tuple(profiles),
        None if is_input else alias or None,
    )


def choose_profile(inputs: Sequence[IOTensor], shapes: Mapping[str, Shape], where: str) -> int:
    """The profile that runs these shapes; of several, the one whose usual shapes are nearest.

    Args:
        inputs: the inputs of the engine.
        shapes: the shape of each.
        where: the engine's name in the message.

    Raises:
        OutsideProfileError: no profile covers the shapes; the message names the nearest one, the input and the dim.
    """
    dynamic = [tensor for tensor in inputs if tensor.profiles]
    if not dynamic:
        return 0
    count = len(dynamic[0].profiles)
    outside = {number: _outside(dynamic, shapes, number) for number in range(count)}
    fitting = [number for number, problems in outside.items() if not problems]
    if fitting:
        return min(fitting, key=lambda number: _distance(dynamic, shapes, number))
    nearest = min(outside, key=lambda number: (len(outside[number]), _distance(dynamic, shapes, number)))
    several = f"none of its {count} profiles covers them; the nearest, profile {nearest}," if count > 1 else "it"
    raise OutsideProfileError(
        f"{where}: these shapes are outside of what the engine was built for: {several} takes "
        f"{'; '.join(outside[nearest])}. Build an engine for them: rmsnorm build --profile "
        f"{dynamic[0].name}:SMALLEST,USUAL,LARGEST."
    )


def _outside(inputs: Sequence[IOTensor], shapes: Mapping[str, Shape], number: int) -> list[str]:
    found = []
    for tensor in inputs:
        least, _, most = tensor.profiles[number]
        given = shapes[tensor.name]
        if len(given) != len(least) or any(
            not low <= size <= high for low, size, high in zip(least, given, most, strict=True)
        ):
            found.append(f"{tensor.name} from {text_of(least)} to {text_of(most)}, and got {text_of(given)}")
    return found


def _distance(inputs: Sequence[IOTensor], shapes: Mapping[str, Shape], number: int) -> float:
    """How far the shapes are from the usual ones, in powers of two over all dims."""
    pairs = [
        (size, usual)
        for tensor in inputs
        for size, usual in zip(shapes[tensor.name], tensor.profiles[number][1], strict=False)
    ]
    return sum(abs(math.log2((size + 1) / (usual + 1))) for size, usual in pairs)


def text_of(shape: Shape) -> str:
    """A shape as the command line writes it, such as `4x512`."""
    return "x".join(map(str, shape)) or "scalar"
