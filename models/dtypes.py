"""The dtypes that this package supports: one table of their names in each library, and their sizes.

Importing this module loads no library; each function imports the library whose dtype it returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from .errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    import torch


@dataclass(frozen=True, slots=True)
class Dtype:
    """One dtype.

    Attributes:
        name: this package's name, on the command line and in files.
        library_name: its name in PyTorch, NumPy and ml_dtypes.
        onnx_name: its name in ONNX, a member of `TensorProto.DataType` and of `onnx_ir.DataType`.
        onnx_number: the number of that member.
        bytes: size of one element in bytes.
        has_norms: whether norms are computed in it; otherwise it occurs only as the dtype of a quantized output.
        aliases: other names that a user may give.
    """

    name: str
    library_name: str
    onnx_name: str
    onnx_number: int
    bytes: int
    has_norms: bool
    aliases: tuple[str, ...] = ()


TABLE: Final = (
    Dtype("float32", "float32", "FLOAT", 1, 4, True, ("fp32", "f32", "float", "single")),
    Dtype("float16", "float16", "FLOAT16", 10, 2, True, ("fp16", "f16", "half")),
    Dtype("bfloat16", "bfloat16", "BFLOAT16", 16, 2, True, ("bf16", "bfloat")),
    Dtype("float64", "float64", "DOUBLE", 11, 8, True, ("fp64", "f64", "double")),
    Dtype("int8", "int8", "INT8", 3, 1, False),
    Dtype("float8_e4m3", "float8_e4m3fn", "FLOAT8E4M3FN", 17, 1, False),
)
DTYPES: Final[dict[str, Dtype]] = {dtype.name: dtype for dtype in TABLE}
# The dtypes that a model may have, and those of them with two bytes.
NORM_DTYPES: Final = tuple(dtype.name for dtype in TABLE if dtype.has_norms)
HALF_DTYPES: Final = tuple(dtype.name for dtype in TABLE if dtype.has_norms and dtype.bytes == 2)
BYTES: Final[dict[str, int]] = {dtype.name: dtype.bytes for dtype in TABLE}
ONNX_NUMBERS: Final[dict[str, int]] = {dtype.name: dtype.onnx_number for dtype in TABLE}

_BY_LIBRARY_NAME: Final = {dtype.library_name: dtype.name for dtype in TABLE}
_BY_ONNX_NUMBER: Final = {dtype.onnx_number: dtype.name for dtype in TABLE}
_BY_ALIAS: Final = {alias: dtype.name for dtype in TABLE for alias in (dtype.name, *dtype.aliases)}


def norm_dtype(given: str | torch.dtype) -> str:
    """The name of a dtype that a user chose for a model.

    Args:
        given: a name of the table or an alias in any case, such as `float16`, `fp16` or `half`; PyTorch's dtype, or
            its name with `torch.`.

    Raises:
        UsageError: it is not a dtype that norms are computed in.
    """
    name = _BY_ALIAS.get(str(given).strip().lower().removeprefix("torch."))
    if name not in NORM_DTYPES:
        raise UsageError(f"dtype: expected one of {', '.join(NORM_DTYPES)}, got {str(given)!r}.")
    return name


def dtype_named(name: str) -> Dtype:
    """The table's row for a name.

    Raises:
        UsageError: there is no dtype of this name.
    """
    if name not in DTYPES:
        raise UsageError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}.")
    return DTYPES[name]


def torch_dtype(name: str) -> torch.dtype:
    """PyTorch's dtype of this name.

    Raises:
        UsageError: there is no dtype of this name in the table.
    """
    import torch

    dtype: torch.dtype = getattr(torch, dtype_named(name).library_name)
    return dtype


def torch_name(dtype: torch.dtype) -> str:
    """This package's name for a PyTorch dtype; PyTorch's own name where the table does not contain it."""
    name = str(dtype).removeprefix("torch.")
    return _BY_LIBRARY_NAME.get(name, name)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of this name, the table's or NumPy's own, such as `int64`; ml_dtypes adds what NumPy lacks.

    Raises:
        UsageError: there is no dtype of this name.
    """
    import ml_dtypes
    import numpy as np

    if name in DTYPES:
        library_name = DTYPES[name].library_name
        return np.dtype(getattr(ml_dtypes, library_name, library_name))
    try:
        return np.dtype(name)
    except TypeError:
        raise UsageError(f"dtype: expected one of {', '.join(DTYPES)} or a NumPy name, got {name!r}.") from None


def onnx_dtype(name: str) -> ir.DataType:
    """onnx_ir's dtype of this name.

    Raises:
        UsageError: there is no dtype of this name in the table.
    """
    import onnx_ir as ir

    return ir.DataType(dtype_named(name).onnx_number)


def onnx_name(dtype: ir.DataType) -> str:
    """This package's name for an onnx_ir dtype; ONNX's own name in lower case where the table does not contain it."""
    return _BY_ONNX_NUMBER.get(int(dtype), dtype.name.lower())


# The names of dtypes in KServe's inference protocol, version 2; Triton's configuration has them behind `TYPE_`.
KSERVE_NAMES: Final = {
    "bool": "BOOL", "float16": "FP16", "bfloat16": "BF16", "float32": "FP32", "float64": "FP64",
    **{f"int{bits}": f"INT{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"UINT{bits}" for bits in (8, 16, 32, 64)},
}  # fmt: skip
