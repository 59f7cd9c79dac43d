"""rmsnorm-deploy: take RMSNorm from PyTorch to ONNX Runtime and TensorRT, and prove the numbers.

The names below are loaded when first used, so that importing this package stays quick and needs neither torch nor
onnxruntime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmsnorm_deploy.models.errors import (
        EnvironmentMissingError,
        MismatchError,
        RmsnormDeployError,
        UnsupportedError,
        UsageError,
    )
    from rmsnorm_deploy.models.spec import NormSpec

__version__ = "0.1.0"

_HOME = {
    "NormSpec": "models.spec",
    "RmsnormDeployError": "models.errors",
    "UsageError": "models.errors",
    "UnsupportedError": "models.errors",
    "EnvironmentMissingError": "models.errors",
    "MismatchError": "models.errors",
}

__all__ = [  # noqa: RUF022 - the order of a model's way through the house
    "NormSpec",
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
