"""Errors of ONNX Runtime as errors of this package (`load_error`), with the remedy."""

from __future__ import annotations

import re
from types import ModuleType

from ...export.onnx_io.read_model import ModelFile
from ...models.errors import EnvironmentMissingError, RmsnormDeployError, UnsupportedError, UsageError
from ...plugins import contract
from .ort_graph import input_dtypes
from .providers import CPU

# The domains of the operators that ONNX Runtime has kernels for.
_OWN_DOMAINS = (
    "ai.onnx",
    "ai.onnx.ml",
    "ai.onnx.preview.training",
    "com.microsoft",
    "com.microsoft.nchwc",
    "com.ms.internal.nhwc",
)
_PLUGIN_OPS = {f"{domain}:{name}" for domain in (contract.DOMAIN, contract.ORT_DOMAIN) for name in contract.INPUTS}


def cause_of(error: BaseException) -> str:
    """onnxruntime's message without its code, source lines and padding."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())
    return re.sub(r"/onnxruntime_src/\S+ ", "", text)


def load_error(error: Exception, ort: ModuleType, file: ModelFile, providers: list[str]) -> RmsnormDeployError:
    """The error to raise for a session that could not be created."""
    cause, version = cause_of(error), f"onnxruntime {ort.__version__}"
    missing = re.search(r"implementation for (\S+)\(\d+\) node with name '(.*?)'", cause)
    if missing:
        op, node = missing.groups()
        dtypes = " and ".join(input_dtypes(file.model, op, node))
        advice = "Export the model in float16 or float32" if "bfloat16" in dtypes else "Export with another target"
        return UnsupportedError(
            f"{file.where}: {version} has no kernel for {op} (node {node or 'without name'})"
            f"{f' on {dtypes}' if dtypes else ''} in {', '.join(providers)}. {advice}, or run it on another provider."
        )
    fused = re.search(r"Failed to find kernel for (\w+)\(\d+\) \(node:'(\S*?/(\w+Fusion))/?'", cause)
    if fused:
        op, node, fusion = fused.groups()
        return UnsupportedError(
            f"{file.where}: {version} itself fuses operators into {op} (node {node}), for which {', '.join(providers)} "
            "has no kernel in this dtype. Export with --target standard or --target ort, which have no operators to "
            f"fuse, or open the file with InferenceSession(..., disabled_optimizers=[{fusion!r}])."
        )
    unknown = re.search(r"(\S+?)\(-?\d+\) is not a registered function/op|No Op registered for (\S+)", cause)
    if unknown:
        name = unknown.group(1) or unknown.group(2)
        domain = name.rpartition(":")[0]
        advice = "Install a newer onnxruntime, or export for a target whose ops it supports"
        if domain and domain not in _OWN_DOMAINS:
            advice = (
                f"The domain {domain} is not one of ONNX Runtime's: the op is in a library of whoever wrote the file. "
                "Nothing can be judged without it: load that library in a runner of your own, and give the runner "
                "(from Python), or export with operators of ONNX"
            )
        if name in _PLUGIN_OPS:
            advice = (
                "The file has plugin nodes without the local functions that ONNX Runtime requires: it was written "
                "with --no-function or --ort-trt, for TensorRT. Write it without that option to run it here"
            )
        return UnsupportedError(f"{file.where}: {version} does not know the op {name}: {cause}. {advice}.")
    if re.search(r"is under development|Unsupported model IR version", cause):
        return UnsupportedError(
            f"{file.where}: too new for {version}: {cause}. Install a newer onnxruntime, or export at a lower opset."
        )
    if isinstance(error, (RuntimeError, ValueError)) and providers != [CPU]:
        return EnvironmentMissingError(f"{file.where}: {version} could not set up {', '.join(providers)}: {cause}")
    return UsageError(f"{file.where}: {version} cannot load this model: {cause}")
