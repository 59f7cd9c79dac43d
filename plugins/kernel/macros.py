"""The preprocessor macros that configure `cuda/kernel.cu`: what it computes, and in which layout."""

from __future__ import annotations

import struct
from typing import Final

from ...models.spec import Gate, Scale
from .launch_config import LaunchConfig
from .norm_kernel import Activation, NormKernel, Quantization

# The source's name of each dtype.
FORMATS: Final[dict[str, str]] = {
    "float32": "Float32", "float16": "Float16", "bfloat16": "BFloat16", "int8": "Int8", "float8_e4m3": "Float8E4M3",
}  # fmt: skip
# The enumerations of `cuda/rms_norm.cuh`.
SCALES: Final[dict[Scale, int]] = {"none": 0, "weight": 1, "one_plus_weight": 2}
GATES: Final[dict[Gate, int]] = {"none": 0, "before": 1, "after": 2}
ACTIVATIONS: Final[dict[Activation, int]] = {"silu": 0, "sigmoid": 1}
QUANTIZATIONS: Final[dict[Quantization, int]] = {"none": 0, "static": 1, "per_row": 2}


def macros(kernel: NormKernel, config: LaunchConfig) -> dict[str, str]:
    """The macros that `cuda/kernel.cu` reads, except the kernel's name."""
    bits = struct.unpack("<I", struct.pack("<f", kernel.epsilon))[0]
    values: dict[str, object] = {
        "X": FORMATS[kernel.dtype],
        "RESIDUAL": FORMATS[kernel.residual_dtype or kernel.dtype] if kernel.adds else "None",
        "WEIGHT": FORMATS[kernel.weight_dtype or kernel.dtype],
        "Y": FORMATS[kernel.y_dtype_],
        "OUT": FORMATS[kernel.out_dtype],
        "WIDTH": kernel.width,
        "INNER": kernel.inner,
        "WEIGHT_ROWS": kernel.weight_rows,
        "ADDS": int(kernel.adds),
        "SCALE": SCALES[kernel.scale],
        "GATE": GATES[kernel.gate],
        "ACTIVATION": ACTIVATIONS[kernel.activation],
        "QUANTIZATION": QUANTIZATIONS[kernel.quantization],
        "CAST_FIRST": int(kernel.cast_first),
        "EXACT_SUM": int(kernel.exact_sum),
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
