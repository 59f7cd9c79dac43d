"""Read named arrays from .npz and .safetensors files (`read_arrays`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.dtypes import numpy_dtype
from ...models.errors import UsageError

if TYPE_CHECKING:
    from ..runners.base import Array

SAFETENSORS = ".safetensors"
ARRAY_SUFFIXES = (".npz", SAFETENSORS)

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

    Raises:
        UsageError: the file does not exist, is truncated or has another format, or it contains anything but
            arrays of numbers.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file.")
    try:
        return _safetensors(path) if path.suffix == SAFETENSORS else _npz(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error


def _npz(path: Path) -> dict[str, Array]:
    import ml_dtypes
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except OSError:
        raise
    except Exception as error:  # numpy and zipfile raise many kinds; all mean that this is not an archive of arrays
        raise UsageError(
            f"{path}: expected an .npz file of plain arrays ({error}). Write one with numpy.savez(path, name=array)."
        ) from error
    return {n: a.view(ml_dtypes.bfloat16) if a.dtype.str == "|V2" else a for n, a in arrays.items()}


def _safetensors(path: Path) -> dict[str, Array]:
    from safetensors import SafetensorError, deserialize

    try:
        entries = deserialize(path.read_bytes())
    except SafetensorError as error:
        raise UsageError(f"{path}: not a .safetensors file, or it is truncated ({error}).") from error
    # deserialize returns them in no fixed order.
    return {name: _tensor(path, name, entry) for name, entry in sorted(entries, key=lambda item: item[0])}


def _tensor(path: Path, name: str, entry: dict[str, Any]) -> Array:
    import numpy as np

    if entry["dtype"] not in _DTYPES:
        raise UsageError(f"{path}: {name}: expected one of the dtypes {', '.join(_DTYPES)}, got {entry['dtype']}.")
    return np.frombuffer(entry["data"], numpy_dtype(_DTYPES[entry["dtype"]])).reshape(entry["shape"])
