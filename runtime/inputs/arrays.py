"""Read named arrays from .npz and .safetensors files (`read_arrays`). The files are not trusted."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.dtypes import numpy_dtype
from ...models.errors import UsageError
from ...models.regular_files import read_bytes, regular_size

if TYPE_CHECKING:
    from ..runners.base import Array

SAFETENSORS = ".safetensors"
ARRAY_SUFFIXES = (".npz", SAFETENSORS)
# The most bytes of a file, and of all arrays of an .npz file after decompression.
LARGEST_ARRAYS = 64 << 30
# The largest ratio of an array to its compressed bytes. Deflate reaches 1032 for equal bytes; arrays that compress more
# than this limit are read up to `_SMALL` bytes.
_MOST_RATIO = 200
_SMALL = 256 << 20
_HEADER = 64 << 10  # a header of an .npy member has at most this many bytes
_MEMBER = ".npy"

# Names in safetensors of the dtypes that numpy and ml_dtypes support.
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of a file by name: .safetensors by its suffix, .npz with any other suffix.

    bfloat16 arrays have the dtype of ml_dtypes. numpy writes such arrays without their dtype, as two bytes per element;
    these are read back as bfloat16.

    No more is read than the file has on disk. The arrays of a compressed file may have `LARGEST_ARRAYS` bytes, and 200
    times their compressed size or 256 MiB, whichever is more; sizes are checked before memory is allocated.

    Raises:
        UsageError: the file does not exist, is not a regular file, is truncated or has another format, it contains
            anything but arrays of numbers, two arrays have one name, or the arrays are larger than the limits.
    """
    if "\0" in str(path) or not path.exists():
        raise UsageError(f"{path}: there is no such file.")
    size = regular_size(path)
    if size > LARGEST_ARRAYS:
        raise UsageError(f"{path}: expected at most {LARGEST_ARRAYS} bytes, got {size}. Split the file.")
    if size == 0:
        raise UsageError(f"{path}: expected an .npz file of plain arrays or a .safetensors file, got an empty file.")
    try:
        return _safetensors(path) if path.suffix == SAFETENSORS else _npz(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error


def _npz(path: Path) -> dict[str, Array]:
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive)
            return {info.filename.removesuffix(_MEMBER): _array(path, archive, info) for info in archive.infolist()}
    except (
        zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OverflowError,
        RecursionError,
    ) as error:  # fmt: skip
        raise UsageError(
            f"{path}: expected an .npz file of plain arrays ({_short(error)}). "
            "Write one with numpy.savez(path, name=array)."
        ) from error


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse members that are not arrays, and sizes beyond the limits, by the archive's directory."""
    infos = archive.infolist()
    remedy = "Write the file with numpy.savez(path, name=array)."
    total = sum(info.file_size for info in infos)
    if total > LARGEST_ARRAYS:
        raise UsageError(f"{path}: expected at most {LARGEST_ARRAYS} bytes of arrays, got {total}. Split the file.")
    stored = sum(info.compress_size for info in infos)
    if stored > regular_size(path):
        raise UsageError(f"{path}: its members state {stored} bytes, more than the file has. {remedy}")
    names = Counter(info.orig_filename.removesuffix(_MEMBER) for info in infos)
    for info in infos:
        name = info.orig_filename  # `filename` ends at a NUL character
        if not name.endswith(_MEMBER) or "\0" in name:
            raise UsageError(f"{path}: member {name!r}: expected the name of an array, NAME{_MEMBER}. {remedy}")
        if names[name.removesuffix(_MEMBER)] > 1:
            raise UsageError(f"{path}: member {name!r}: expected one array of this name, got several. {remedy}")
        if info.file_size > max(_SMALL, _MOST_RATIO * info.compress_size):
            raise UsageError(
                f"{path}: member {name!r}: expected at most {_MOST_RATIO} times its {info.compress_size} compressed "
                f"bytes, got {info.file_size}. Write the file uncompressed, with numpy.savez."
            )


def _array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    """One array, whose header is compared with the member's size before memory is allocated."""
    import ml_dtypes
    import numpy as np

    with archive.open(info) as member:
        shape, dtype = _header(member)
        start = member.tell()
    if dtype.hasobject:
        raise UsageError(
            f"{path}: member {info.filename!r}: expected an .npz file of plain arrays, got Python objects. "
            "Write one with numpy.savez(path, name=array)."
        )
    needed = start + math.prod(shape) * dtype.itemsize
    if needed != info.file_size or min(shape, default=0) < 0:
        raise UsageError(
            f"{path}: member {info.filename!r}: expected {needed} bytes for shape {_text(shape)} of {dtype}, got "
            f"{info.file_size}. The file is damaged; write it again."
        )
    with archive.open(info) as member:
        array: Array = np.lib.format.read_array(member, allow_pickle=False, max_header_size=_HEADER)
        member.read()  # to the end, where the checksum is compared
    return array.view(ml_dtypes.bfloat16) if array.dtype.str == "|V2" else array


def _header(member: Any) -> tuple[tuple[int, ...], Any]:
    import numpy as np

    version = np.lib.format.read_magic(member)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version == (3, 0):  # version 2.0 with names in UTF-8, which only structured dtypes have
        raise ValueError("an array with named fields")
    if version not in readers:
        raise ValueError(f"version {version} of an array")
    shape, _, dtype = readers[version](member, max_header_size=_HEADER)
    return shape, dtype


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape[:8])) or "of a scalar"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _safetensors(path: Path) -> dict[str, Array]:
    from safetensors import SafetensorError, deserialize

    try:
        entries = deserialize(read_bytes(path, LARGEST_ARRAYS))
    except SafetensorError as error:
        raise UsageError(f"{path}: not a .safetensors file, or it is truncated ({error}).") from error
    # deserialize returns them in no fixed order.
    return {name: _tensor(path, name, entry) for name, entry in sorted(entries, key=lambda item: item[0])}


def _tensor(path: Path, name: str, entry: dict[str, Any]) -> Array:
    import numpy as np

    if entry["dtype"] not in _DTYPES:
        raise UsageError(f"{path}: {name}: expected one of the dtypes {', '.join(_DTYPES)}, got {entry['dtype']}.")
    return np.frombuffer(entry["data"], numpy_dtype(_DTYPES[entry["dtype"]])).reshape(entry["shape"])
