"""The header of a safetensors file: where each of its tensors is (`read_header`).

The format, from https://huggingface.co/docs/safetensors: 8 bytes with the length of the header, little-endian; the
header, a JSON object that names each tensor's dtype, shape and offsets; then the tensors' bytes, from which the offsets
count.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..regular_files import regular_size

# The library's own limit.
_LARGEST_HEADER = 100_000_000
_LENGTH = 8
# The format's dtypes, with PyTorch's names and the bits of an element.
_DTYPES = {
    "BOOL": ("bool", 8), "U8": ("uint8", 8), "I8": ("int8", 8), "I16": ("int16", 16), "U16": ("uint16", 16),
    "F16": ("float16", 16), "BF16": ("bfloat16", 16), "I32": ("int32", 32), "U32": ("uint32", 32),
    "F32": ("float32", 32), "F64": ("float64", 64), "I64": ("int64", 64), "U64": ("uint64", 64),
    "C64": ("complex64", 64), "F8_E4M3": ("float8_e4m3fn", 8), "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8), "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: its key.
        dtype: PyTorch's name of its dtype, such as `bfloat16`.
        shape: its dims.
        offset: where its bytes begin, from the start of the file.
        length: the number of its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file, in the header's order; none of them is read.

    Raises:
        UsageError: the file does not exist, is not a safetensors file, has a dtype that PyTorch lacks, or is shorter
            or longer than its header says.
    """
    size = regular_size(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            if size < _LENGTH or not 0 < length <= min(size - _LENGTH, _LARGEST_HEADER):
                raise _damaged(path, f"a header of {length} bytes in a file of {size}")
            values = json.loads(file.read(length))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"a header that is not JSON, {error}") from error
    if not isinstance(values, dict):
        raise _damaged(path, f"a header that is {type(values).__name__}, not an object")
    start = _LENGTH + length
    found = [_stored(path, name, row, start) for name, row in values.items() if name != "__metadata__"]
    _check_places(path, found, start, size)
    return found


def _stored(path: Path, name: str, row: Any, start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
        numbers = (*shape, begin, end)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"{name}: no dtype, shape or data_offsets") from error
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise _damaged(path, f"{name}: a shape or offsets that are not whole numbers")
    if dtype not in _DTYPES:
        raise UsageError(f"{path}: {name} has the dtype {dtype!r}, which PyTorch cannot hold. Convert the checkpoint.")
    torch_dtype, bits = _DTYPES[dtype]
    if math.prod(shape) * bits // 8 != end - begin:
        raise _damaged(path, f"{name}: {end - begin} bytes for {dtype} {list(shape)}")
    return StoredTensor(name, torch_dtype, shape, start + begin, end - begin)


def _check_places(path: Path, found: list[StoredTensor], start: int, size: int) -> None:
    """Check that the tensors cover the file without a gap, as the format requires."""
    place = start
    for tensor in sorted(found, key=lambda tensor: (tensor.offset, tensor.length)):
        if tensor.offset != place:
            raise _damaged(path, f"{tensor.name} at byte {tensor.offset}, where byte {place} was expected")
        place += tensor.length
    if place != size:
        raise _damaged(path, f"{size} bytes, where its header ends at byte {place}")


def _damaged(path: Path, what: str) -> UsageError:
    return UsageError(
        f"{os.fspath(path)} is not a complete safetensors file ({what}). It may be truncated, or a pointer of Git LFS; "
        "download it again."
    )
