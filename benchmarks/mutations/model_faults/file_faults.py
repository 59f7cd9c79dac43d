"""Faults of weights in a file with external data: weights of another layer, shuffled, rounded, shifted offsets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx

from ..faults import Fault
from ..surgery import Array

Damage = Callable[[Path], None]


def _weights(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """The tensors with external data, the largest first, in a fixed order."""
    found = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    return sorted(found, key=lambda tensor: (-_entry(tensor, "length"), tensor.name))


def _entry(tensor: onnx.TensorProto, key: str) -> int:
    return int(next((entry.value for entry in tensor.external_data if entry.key == key), "0"))


def _set(tensor: onnx.TensorProto, key: str, value: int) -> None:
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = str(value)


def entries(change: Callable[[list[onnx.TensorProto]], None]) -> Damage:
    """A change of where the tensors of a file find their data."""

    def damage(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        change(_weights(model))
        onnx.save(model, folder / "model.onnx")

    return damage


def data(number: int, change: Callable[[Array], Array]) -> Damage:
    """A change of the data of one tensor, in the order of `_weights`."""

    def damage(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        tensor = _weights(model)[number]
        start, length = _entry(tensor, "offset"), _entry(tensor, "length")
        path = folder / "model.onnx.data"
        content = bytearray(path.read_bytes())
        array = np.frombuffer(bytes(content[start : start + length]), np.float32)
        content[start : start + length] = np.asarray(change(array.copy()), np.float32).tobytes()
        path.write_bytes(bytes(content))

    return damage


def _same_size(tensors: list[onnx.TensorProto]) -> tuple[onnx.TensorProto, onnx.TensorProto]:
    """Two tensors of equal shape: weights of one kind in two layers."""
    for first in tensors:
        for second in tensors:
            if first.name != second.name and list(first.dims) == list(second.dims):
                return first, second
    raise ValueError("no two weights have equal shapes")


def _exchange(tensors: list[onnx.TensorProto]) -> None:
    first, second = _same_size(tensors)
    a, b = _entry(first, "offset"), _entry(second, "offset")
    _set(first, "offset", b)
    _set(second, "offset", a)


def _same(tensors: list[onnx.TensorProto]) -> None:
    first, second = _same_size(tensors)
    _set(first, "offset", _entry(second, "offset"))


def _shift(tensors: list[onnx.TensorProto]) -> None:
    """One tensor starts 4 bytes early, which is one element."""
    tensor = next(t for t in tensors if _entry(t, "offset") >= 4)
    _set(tensor, "offset", _entry(tensor, "offset") - 4)


def _half(array: Array) -> Array:
    return array.astype(np.float16).astype(np.float32)


def _bfloat16(array: Array) -> Array:
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def _truncated(array: Array) -> Array:
    """The lower 12 bits are cut off."""
    return (array.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)


def _four_bits(array: Array) -> Array:
    step = np.abs(array).max() / 7
    return np.asarray(np.round(array / step) * step)


def _shuffled(array: Array) -> Array:
    return np.random.default_rng(0).permutation(array)


def _one_bit(array: Array) -> Array:
    """The lowest bit of the exponent of one element is flipped."""
    bits = array.view(np.uint32).copy()
    bits[bits.size // 2] ^= np.uint32(1 << 23)
    return bits.view(np.float32)


def _page_zero(array: Array) -> Array:
    array[-64:] = 0
    return array


def _byte_order(array: Array) -> Array:
    array[:8] = array[:8].byteswap()
    return array


def _file(name: str, model: str, damage: Damage, target: str = "ort", variant: str = "plain") -> Fault:
    return Fault(name, model, target, None, variant=variant, damage=damage)


FILES = (
    _file("weights of two layers exchanged", "llama", entries(_exchange)),
    _file("weights of two layers exchanged", "t5", entries(_exchange), "plugin"),
    _file("a weight of another layer", "qwen3", entries(_same), "standard", "past"),
    _file("a weight read from one element before", "llama", entries(_shift), "ort", "past"),
    _file("a weight shuffled", "mistral w40", data(3, _shuffled)),
    _file("a weight reversed", "llama", data(2, lambda a: a[::-1]), "primitives"),
    _file("a weight rounded to float16", "llama", data(4, _half), "plugin"),
    _file("a weight rounded to bfloat16", "gemma2 w40", data(5, _bfloat16)),
    _file("a weight cut to 11 bits", "llama", data(3, _truncated), "standard", "past"),
    _file("a weight rounded to 4 bits", "t5", data(6, _four_bits)),
    _file("one bit of a weight flipped", "llama", data(3, _one_bit)),
    _file("the end of a weight zero", "qwen3", data(4, _page_zero)),
    _file("the bytes of some elements in reverse order", "mistral w40", data(2, _byte_order), "plugin", "past"),
)  # fmt: skip

FILE_DATA_FAULTS: dict[str, tuple[Fault, ...]] = {"files": FILES}
