"""rmsnorm-deploy: take RMSNorm from PyTorch to ONNX Runtime and TensorRT, and verify the numbers.

The names below are loaded at first use, so that importing this package is fast and does not require torch or
onnxruntime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmsnorm_deploy.export.from_torch.export_model import ExportOptions, export_model
    from rmsnorm_deploy.export.from_torch.save import ExportResult
    from rmsnorm_deploy.export.lowering.table import TARGETS
    from rmsnorm_deploy.export.onnx_io.verify import verify_folder
    from rmsnorm_deploy.models.errors import (
        EnvironmentMissingError,
        MismatchError,
        RmsnormDeployError,
        UnsupportedError,
        UsageError,
    )
    from rmsnorm_deploy.models.hub.options import HubOptions
    from rmsnorm_deploy.models.loading import load_model
    from rmsnorm_deploy.models.recognition.find_norms import find_norms
    from rmsnorm_deploy.models.reference import reference
    from rmsnorm_deploy.models.spec import NormSpec
    from rmsnorm_deploy.models.weights.checkpoint import load_weights
    from rmsnorm_deploy.plugins.torch.operators import add_rms_norm, rms_norm
    from rmsnorm_deploy.plugins.torch.quantized_operators import add_rms_norm_quantized, rms_norm_quantized
    from rmsnorm_deploy.plugins.torch.swap import KernelSwap, use_kernel
    from rmsnorm_deploy.runtime.accuracy.tolerances import Limits
    from rmsnorm_deploy.runtime.dataset.run_dataset import DatasetRun, run_dataset
    from rmsnorm_deploy.runtime.generation.api import Generation, Generator, generate, generate_batch
    from rmsnorm_deploy.runtime.inputs.cases import Case
    from rmsnorm_deploy.runtime.packaging.api import Package, package_model
    from rmsnorm_deploy.runtime.packaging.push import Push, push_folder
    from rmsnorm_deploy.runtime.report.compare import compare
    from rmsnorm_deploy.runtime.rewriting.rewrite_file import rewrite_model
    from rmsnorm_deploy.runtime.risk.report import RiskReport, risk
    from rmsnorm_deploy.runtime.runners.base import Runner
    from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
    from rmsnorm_deploy.runtime.runners.open import open_runner
    from rmsnorm_deploy.runtime.runners.torch import TorchRunner
    from rmsnorm_deploy.runtime.shipping.ship import Shipment, ship
    from rmsnorm_deploy.runtime.tensorrt.build import build_engine
    from rmsnorm_deploy.runtime.validation.api import bisect, validate
    from rmsnorm_deploy.runtime.validation.options import ValidationOptions
    from rmsnorm_deploy.runtime.validation.result import ValidationReport

__version__ = "0.1.0"

_HOME = {
    "NormSpec": "models.spec",
    "reference": "models.reference",
    "find_norms": "models.recognition.find_norms",
    "load_model": "models.loading",
    "HubOptions": "models.hub.options",
    "load_weights": "models.weights.checkpoint",
    "export_model": "export.from_torch.export_model",
    "ExportOptions": "export.from_torch.export_model",
    "ExportResult": "export.from_torch.export_model",
    "verify_folder": "export.onnx_io.verify",
    "TARGETS": "export.lowering.table",
    "rewrite_model": "runtime.rewriting.rewrite_file",
    "package_model": "runtime.packaging.api",
    "Package": "runtime.packaging.api",
    "push_folder": "runtime.packaging.push",
    "Push": "runtime.packaging.push",
    "ship": "runtime.shipping.ship",
    "Shipment": "runtime.shipping.ship",
    "run_dataset": "runtime.dataset.run_dataset",
    "DatasetRun": "runtime.dataset.run_dataset",
    "use_kernel": "plugins.torch.swap",
    "KernelSwap": "plugins.torch.swap",
    "rms_norm": "plugins.torch.operators",
    "add_rms_norm": "plugins.torch.operators",
    "rms_norm_quantized": "plugins.torch.quantized_operators",
    "add_rms_norm_quantized": "plugins.torch.quantized_operators",
    "build_engine": "runtime.tensorrt.build",
    "Runner": "runtime.runners.base",
    "open_runner": "runtime.runners.open",
    "OrtRunner": "runtime.runners.onnxruntime",
    "TorchRunner": "runtime.runners.torch",
    "generate": "runtime.generation.api",
    "generate_batch": "runtime.generation.api",
    "Generator": "runtime.generation.api",
    "Generation": "runtime.generation.api",
    "validate": "runtime.validation.api",
    "bisect": "runtime.validation.api",
    "ValidationOptions": "runtime.validation.options",
    "ValidationReport": "runtime.validation.result",
    "Limits": "runtime.accuracy.tolerances",
    "Case": "runtime.inputs.cases",
    "compare": "runtime.report.compare",
    "risk": "runtime.risk.report",
    "RiskReport": "runtime.risk.report",
    "RmsnormDeployError": "models.errors",
    "UsageError": "models.errors",
    "UnsupportedError": "models.errors",
    "EnvironmentMissingError": "models.errors",
    "MismatchError": "models.errors",
}

__all__ = [  # noqa: RUF022 - in the order of use
    "NormSpec",
    "reference",
    "find_norms",
    "load_model",
    "HubOptions",
    "load_weights",
    "export_model",
    "ExportOptions",
    "ExportResult",
    "verify_folder",
    "TARGETS",
    "rewrite_model",
    "run_dataset",
    "DatasetRun",
    "package_model",
    "Package",
    "push_folder",
    "Push",
    "ship",
    "Shipment",
    "use_kernel",
    "KernelSwap",
    "rms_norm",
    "add_rms_norm",
    "rms_norm_quantized",
    "add_rms_norm_quantized",
    "build_engine",
    "Runner",
    "open_runner",
    "OrtRunner",
    "TorchRunner",
    "generate",
    "generate_batch",
    "Generator",
    "Generation",
    "validate",
    "bisect",
    "ValidationOptions",
    "ValidationReport",
    "Limits",
    "Case",
    "compare",
    "risk",
    "RiskReport",
    "RmsnormDeployError",
    "UsageError",
    "UnsupportedError",
    "EnvironmentMissingError",
    "MismatchError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rmsnorm_deploy' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rmsnorm_deploy.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
