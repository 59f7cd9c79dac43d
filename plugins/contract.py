"""The custom operators: names, attributes and inputs. Export, plugins and tests read them from here only.

Both operators compute, with S = float32 and T the dtype of X::

    RMSNorm(X, scale) -> Y
    AddRMSNorm(X, residual, scale) -> (Y, sum)        sum = X + residual in T, normalised in place of X

    n = X / sqrt(mean(X^2 over the last dim) + epsilon)                       in S
    Y = cast(cast(n, scale_type) * cast(scale + scale_offset, scale_type), T)

`scale_type` is the ONNX data type in which the scale is multiplied: FLOAT multiplies before the cast back to T, T
itself multiplies after it. X, residual and scale have the same dtype; every attribute is always present.
"""

from __future__ import annotations

from typing import Final

DOMAIN: Final = "rmsnorm_deploy"
DOMAIN_VERSION: Final = 1
RMS_NORM: Final = "RMSNorm"
ADD_RMS_NORM: Final = "AddRMSNorm"

PLUGIN_NAMESPACE: Final = "rmsnorm_deploy"
# Version of the TensorRT plugin creators; quick deployable plugins can only be "1".
PLUGIN_VERSION: Final = "1"

INPUTS: Final = {RMS_NORM: ("X", "scale"), ADD_RMS_NORM: ("X", "residual", "scale")}
OUTPUTS: Final = {RMS_NORM: ("Y",), ADD_RMS_NORM: ("Y", "sum")}

# What the kernel reads, and the ONNX type of each attribute.
KERNEL_ATTRIBUTES: Final = {"epsilon": "FLOAT", "scale_offset": "FLOAT", "scale_type": "INT"}
# What TensorRT's parser reads to find the plugin.
PARSER_ATTRIBUTES: Final = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}
ATTRIBUTES: Final = (*KERNEL_ATTRIBUTES, *PARSER_ATTRIBUTES)
DTYPES: Final = ("float32", "float16", "bfloat16")
