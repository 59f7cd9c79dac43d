"""The custom operators: names, attributes and inputs. Export, both kinds of plugin and the tests read them from here.

Both operators compute, with S = float32 and T the dtype of X::

    RMSNorm(X, scale) -> Y
    AddRMSNorm(X, residual, scale) -> (Y, sum)        sum = X + residual in T, normalised in place of X

    n = X / sqrt(mean(X^2 over the last dim) + epsilon)                       in S
    Y = cast(cast(n, scale_type) * cast(scale + scale_offset, scale_type), T)

`scale_type` is the ONNX data type in which the scale is multiplied: FLOAT multiplies before the cast back to T, T
itself multiplies after it. X, residual and scale have the same dtype; every attribute is always present.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

DOMAIN: Final = "rmsnorm_deploy"
DOMAIN_VERSION: Final = 1
RMS_NORM: Final = "RMSNorm"
ADD_RMS_NORM: Final = "AddRMSNorm"

PLUGIN_NAMESPACE: Final = "rmsnorm_deploy"
# Version of the TensorRT plugin creators; quick deployable plugins can only be "1".
PLUGIN_VERSION: Final = "1"
# Where ONNX Runtime's TensorRT provider puts every plugin of TensorRT's registry.
ORT_DOMAIN: Final = "trt.plugins"

INPUTS: Final = {RMS_NORM: ("X", "scale"), ADD_RMS_NORM: ("X", "residual", "scale")}
OUTPUTS: Final = {RMS_NORM: ("Y",), ADD_RMS_NORM: ("Y", "sum")}

# What the kernel reads, and the ONNX type of each attribute.
KERNEL_ATTRIBUTES: Final = {"epsilon": "FLOAT", "scale_offset": "FLOAT", "scale_type": "INT"}
# What TensorRT's parser reads to find the plugin.
PARSER_ATTRIBUTES: Final = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}
ATTRIBUTES: Final = (*KERNEL_ATTRIBUTES, *PARSER_ATTRIBUTES)
DTYPES: Final = ("float32", "float16", "bfloat16")

# The TensorRT field type that the parser makes of each ONNX attribute type.
FIELD_TYPES: Final = {"FLOAT": "FLOAT32", "INT": "INT32", "STRING": "CHAR"}
# A field that only serialized plugins have: the compiled kernels, see `plugins/tensorrt/images.py`.
KERNELS_FIELD: Final = "kernels"
# The kernel's name in its source, for each operator.
KERNEL_OPS: Final = {RMS_NORM: "rms_norm", ADD_RMS_NORM: "add_rms_norm"}

# Values of `scale_offset` that the kernel can do, and ONNX's number for each dtype (TensorProto.DataType).
SCALE_OFFSETS: Final = (0.0, 1.0)
ONNX_TYPES: Final = {"float32": 1, "float16": 10, "bfloat16": 16}


def attribute_problems(values: Mapping[str, float | int]) -> list[str]:
    """What is wrong with the kernel attributes of a node or the fields of a plugin; empty where nothing is.

    Args:
        values: `KERNEL_ATTRIBUTES` by name; others are ignored.
    """
    problems = [f"attribute {name} is missing" for name in KERNEL_ATTRIBUTES if name not in values]
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
    return problems


def scale_type_problem(scale_type: int, dtype: str) -> str | None:
    """Why a scale cannot be multiplied in ONNX type `scale_type` where X has `dtype`; None where it can."""
    allowed = dict.fromkeys((ONNX_TYPES["float32"], ONNX_TYPES[dtype]))
    if scale_type in allowed:
        return None
    return f"scale_type: expected {' or '.join(map(str, allowed))} for X of {dtype}, got {scale_type}"
