"""The custom operators: names, attributes and inputs, for export, both kinds of plugin and the tests.

The operators compute, with S = float32 and T the dtype of X::

    RMSNorm(X, scale) -> Y
    AddRMSNorm(X, residual, scale) -> (Y, sum)        sum = X + residual in T, normalized instead of X
    RMSNormQuant(X, scale, y_scale) -> Y
    AddRMSNormQuant(X, residual, scale, y_scale) -> (Y, sum)

    n = X / sqrt(mean(X^2 over the last dim) + epsilon)                       in S
    Y = cast(cast(n, scale_type) * cast(scale + scale_offset, scale_type), T)

`scale_type` is the ONNX data type in which the scale is multiplied: FLOAT multiplies before the cast back to T, T
multiplies after it. X, residual and scale have the same dtype; every attribute is required.

`RMSNormQuant` and `AddRMSNormQuant` return QuantizeLinear(cast(Y, S), y_scale) instead of Y: y_scale is one float32
number for the whole tensor, there is no zero point, and values out of range saturate. `quant_type` is the ONNX data
type of the result: INT8 (rounded to nearest, ties to even) or FLOAT8E4M3FN. Infinity saturates; NaN stays NaN in
FLOAT8E4M3FN and becomes 0 in INT8, which ONNX does not define.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from ..models.dtypes import ONNX_NUMBERS

DOMAIN: Final = "rmsnorm_deploy"
DOMAIN_VERSION: Final = 1
RMS_NORM: Final = "RMSNorm"
ADD_RMS_NORM: Final = "AddRMSNorm"
RMS_NORM_QUANT: Final = "RMSNormQuant"
ADD_RMS_NORM_QUANT: Final = "AddRMSNormQuant"

PLUGIN_NAMESPACE: Final = "rmsnorm_deploy"
# Version of the TensorRT plugin creators; quick deployable plugins can only be "1".
PLUGIN_VERSION: Final = "1"
# The domain in which ONNX Runtime's TensorRT provider registers every plugin of TensorRT's registry.
ORT_DOMAIN: Final = "trt.plugins"

INPUTS: Final = {
    RMS_NORM: ("X", "scale"),
    ADD_RMS_NORM: ("X", "residual", "scale"),
    RMS_NORM_QUANT: ("X", "scale", "y_scale"),
    ADD_RMS_NORM_QUANT: ("X", "residual", "scale", "y_scale"),
}
OUTPUTS: Final = {
    RMS_NORM: ("Y",),
    ADD_RMS_NORM: ("Y", "sum"),
    RMS_NORM_QUANT: ("Y",),
    ADD_RMS_NORM_QUANT: ("Y", "sum"),
}
# The operator with a quantized output for each operator without one.
QUANTIZED: Final = {RMS_NORM: RMS_NORM_QUANT, ADD_RMS_NORM: ADD_RMS_NORM_QUANT}
UNQUANTIZED: Final = {quantized: op_type for op_type, quantized in QUANTIZED.items()}

# The attributes that every kernel reads, with their ONNX types.
KERNEL_ATTRIBUTES: Final = {"epsilon": "FLOAT", "scale_offset": "FLOAT", "scale_type": "INT"}
# The same for each operator, with the attributes that only some have.
OPERATOR_ATTRIBUTES: Final = {
    op_type: {**KERNEL_ATTRIBUTES, "quant_type": "INT"} if op_type in UNQUANTIZED else KERNEL_ATTRIBUTES
    for op_type in INPUTS
}
# The attributes by which TensorRT's parser finds the plugin.
PARSER_ATTRIBUTES: Final = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}
ATTRIBUTES: Final = (*KERNEL_ATTRIBUTES, *PARSER_ATTRIBUTES)
DTYPES: Final = ("float32", "float16", "bfloat16")

# The TensorRT field type that the parser creates for each ONNX attribute type.
FIELD_TYPES: Final = {"FLOAT": "FLOAT32", "INT": "INT32", "STRING": "CHAR"}
# A field that only serialized plugins have: the compiled kernels; see `plugins/tensorrt/images.py`.
KERNELS_FIELD: Final = "kernels"
# The name of each operator's kernel in the CUDA source.
KERNEL_OPS: Final = {
    RMS_NORM: "rms_norm",
    ADD_RMS_NORM: "add_rms_norm",
    RMS_NORM_QUANT: "rms_norm",
    ADD_RMS_NORM_QUANT: "add_rms_norm",
}

# The values of `scale_offset` that the kernel supports, and ONNX's number of each dtype (TensorProto.DataType).
SCALE_OFFSETS: Final = (0.0, 1.0)
ONNX_TYPES: Final = {name: ONNX_NUMBERS[name] for name in DTYPES}
# The same for the dtypes of a quantized output.
QUANT_TYPES: Final = {name: ONNX_NUMBERS[name] for name in ("int8", "float8_e4m3")}


def attribute_problems(values: Mapping[str, float | int], op_type: str = RMS_NORM) -> list[str]:
    """Problems with the kernel attributes of a node or the fields of a plugin; empty if there are none.

    Args:
        values: the operator's `OPERATOR_ATTRIBUTES` by name; others are ignored.
        op_type: the operator.
    """
    problems = [f"attribute {name} is missing" for name in OPERATOR_ATTRIBUTES[op_type] if name not in values]
    epsilon = values.get("epsilon", 0.0)
    if not (math.isfinite(epsilon) and epsilon >= 0):
        problems.append(f"epsilon: expected a finite number of at least 0, got {epsilon}")
    offset = values.get("scale_offset", 0.0)
    if offset not in SCALE_OFFSETS:
        problems.append(f"scale_offset: expected 0 or 1, got {offset}")
    kind = values.get("scale_type", ONNX_TYPES["float32"])
    if kind not in ONNX_TYPES.values():
        allowed = ", ".join(f"{number} ({name})" for name, number in ONNX_TYPES.items())
        problems.append(f"scale_type: expected one of {allowed}, got {kind}")
    quant_type = values.get("quant_type", QUANT_TYPES["int8"])
    if op_type in UNQUANTIZED and quant_type not in QUANT_TYPES.values():
        allowed = ", ".join(f"{number} ({name})" for name, number in QUANT_TYPES.items())
        problems.append(f"quant_type: expected one of {allowed}, got {quant_type}")
    return problems


def scale_type_problem(scale_type: int, dtype: str) -> str | None:
    """Why a scale cannot be multiplied in ONNX type `scale_type` if X has `dtype`; None if it can."""
    allowed = dict.fromkeys((ONNX_TYPES["float32"], ONNX_TYPES[dtype]))
    if scale_type in allowed:
        return None
    return f"scale_type: expected {' or '.join(map(str, allowed))} for X of {dtype}, got {scale_type}"
