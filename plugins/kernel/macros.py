"""The preprocessor macros that configure `cuda/kernel.cu`: what it computes, and in which layout."""

from __future__ import annotations

import struct
from typing import Any, Final, get_args

from ...models.spec import Activation, Gate, Scale
from .launch_config import LaunchConfig
from .norm_kernel import NormKernel, Quantization

# The source's name of each dtype.
FORMATS: Final[dict[str, str]] = {
    "float32": "Float32", "float16": "Float16", "bfloat16": "BFloat16", "int8": "Int8", "float8_e4m3": "Float8E4M3",
}  # fmt: skip


def macros(kernel: NormKernel, config: LaunchConfig) -> dict[str, str]:
    """The macros that `cuda/kernel.cu` reads, except the kernel's name."""
    bits = struct.unpack("<I", struct.pack("<f", kernel.epsilon))[0]
    values: dict[str, object] = {
        "X": FORMATS[kernel.dtype],
        "RESIDUAL": FORMATS[kernel.residual_dtype or kernel.dtype] if kernel.adds else "None",
        "WEIGHT": FORMATS[kernel.weight_dtype or kernel.dtype],
        "Y": FORMATS[kernel.y_dtype],
        "OUT": FORMATS[kernel.out_dtype],
        "WIDTH": kernel.width,
        "INNER": kernel.inner,
        "WEIGHT_ROWS": kernel.weight_rows,
        "ADDS": int(kernel.adds),
        "SCALE": _number(Scale, kernel.scale),
        "GATE": _number(Gate, kernel.gate),
        "ACTIVATION": _number(Activation, kernel.activation),
        "QUANTIZATION": _number(Quantization, kernel.quantization),
        "CAST_FIRST": int(kernel.cast_first),
        "STRIDED": int(kernel.strided),
        "EPSILON": f"{bits:#010x}u",
        "THREADS": config.threads,
        "VECTORS": config.vectors,
        "ELEMENTS": config.elements,
        "ROWS": config.rows,
        "CLUSTER": config.cluster,
        "PREFETCH": int(config.prefetch and kernel.has_weight),
    }
    return {f"RMSNORM_{name}": str(value) for name, value in values.items()}


def _number(members: Any, member: str) -> int:
    """The number of a member in its enumeration of `cuda/rms_norm.cuh`, which has the same order."""
    return get_args(members).index(member)
