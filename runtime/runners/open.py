"""Open a runner for a model (`open_runner`), the only place that chooses a backend."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, overload

from ...models.errors import UsageError
from ..engines.engine_file import is_engine
from .base import DecoderSession, OnnxSession, Runner
from .ort_graph import has_large_weights as has_large_weights

if TYPE_CHECKING:
    from torch import nn

    Source = str | os.PathLike[str] | bytes | nn.Module

# The default of `provider`, which only files for ONNX Runtime have.
CPU_NAME: Final = "cpu"


@overload
def open_runner(
    source: str | os.PathLike[str] | bytes, provider: str | Sequence[str] = ..., **options: Any
) -> OnnxSession: ...


@overload
def open_runner(source: nn.Module, provider: str | Sequence[str] = ..., **options: Any) -> DecoderSession: ...


def open_runner(source: Source, provider: str | Sequence[str] = CPU_NAME, **options: Any) -> Runner:
    """A runner for a model, open until its context exits.

    Args:
        source: an .onnx file's path, an ONNX model's bytes, an engine's path, or a PyTorch module.
        provider: for ONNX, the execution provider (`cpu`, `cuda`, `tensorrt`, `rtx` or a full name; with options as in
            `cuda:use_tf32=0`), or several in order of preference. A PyTorch module runs where its parameters are, and
            an engine in the TensorRT that built it.
        options: further arguments of the backend's own runner, see `OrtRunner`, `TensorRTRunner` and
            `TorchRunner`.

    Raises:
        UsageError: `source` is not one of these, or the model cannot be opened.
        UnsupportedError: the backend cannot run the model.
        EnvironmentMissingError: the backend or the provider is not installed.
    """
    if isinstance(source, str | os.PathLike) and is_engine(Path(source).expanduser()):
        from .tensorrt import TensorRTRunner

        if provider != CPU_NAME:
            raise UsageError(
                f"{source} is an engine, which runs in the TensorRT that built it; expected no provider of ONNX "
                f"Runtime, got {provider}. Omit --provider."
            )
        return TensorRTRunner(source, **options)
    if isinstance(source, str | bytes | os.PathLike):
        from .onnxruntime import OrtRunner

        providers = [provider] if isinstance(provider, str) else list(provider)
        return OrtRunner(source, providers=providers, **options)
    from torch import nn

    if isinstance(source, nn.Module):
        from .torch import TorchRunner

        return TorchRunner(source, **options)
    raise UsageError(
        "expected an .onnx file's path, an ONNX model's bytes, an engine's path or a PyTorch module to run, got "
        f"{type(source).__name__}."
    )
