"""Open an engine on this machine's GPU (`open_engine`), with a reason if it does not fit it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.errors import EnvironmentMissingError, RmsnormDeployError, UnsupportedError
from .api import Api, cuda_device
from .engine_file import EngineFile, record_of
from .io_tensors import IOTensor, read_tensors
from .messages import logger_class
from .plugin_creators import ensure_creators


@dataclass(frozen=True, slots=True)
class OpenEngine:
    """An engine in the memory of a GPU.

    Attributes:
        file: its file.
        api: the TensorRT that runs it.
        logger: TensorRT's messages.
        runtime: what opened it; it must outlive the engine.
        engine: TensorRT's engine.
        tensors: its inputs and outputs.
        gpu: name and architecture of the GPU, such as 89.
    """

    file: EngineFile
    api: Api
    logger: Any
    runtime: Any
    engine: Any
    tensors: list[IOTensor]
    gpu: tuple[str, int]

    @property
    def inputs(self) -> list[IOTensor]:
        """The inputs, in the engine's order."""
        return [tensor for tensor in self.tensors if tensor.is_input]

    @property
    def outputs(self) -> list[IOTensor]:
        """The outputs, in the engine's order."""
        return [tensor for tensor in self.tensors if not tensor.is_input]

    def failure(self, what: str) -> RmsnormDeployError:
        """An error with the last of TensorRT's messages."""
        return RmsnormDeployError(_with_cause(f"{self.file.path}: {what}", self.logger))


def open_engine(file: EngineFile, gpu: tuple[str, int], library: Path | None = None) -> OpenEngine:
    """Open an engine; the CUDA device must be the current one.

    Args:
        file: the engine.
        gpu: the GPU of that device, see `local_gpu`.
        library: the plugin's C++ library; see `ensure_creators`.

    Raises:
        UsageError: the file is not the engine that its record describes, or the plugin cannot be loaded.
        EnvironmentMissingError: TensorRT or the plugin is missing.
        UnsupportedError: the engine was built for another GPU or by another version.
        RmsnormDeployError: TensorRT cannot open it.
    """
    api = Api(file.runtime)
    _check_fits(file, api, gpu)
    content = file.read()
    ensure_creators(api.trt, file, library)
    logger = logger_class(api.trt)(lambda _line: None)
    runtime = api.trt.Runtime(logger)
    problem = api.engine_problem(runtime, content)
    if problem is not None:
        raise UnsupportedError(f"{file.path}: {api.flavor.title} {api.version} cannot run it on {gpu[0]}: {problem}")
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        built = file.record.get("runtime", {}).get("version")
        versions = f" (built by {built}, opened by {api.version})" if built not in (None, api.version) else ""
        raise RmsnormDeployError(_with_cause(f"{file.path}: {api.flavor.title} cannot open it{versions}", logger))
    return OpenEngine(file, api, logger, runtime, engine, read_tensors(api.trt, engine), gpu)


def local_gpu(device: int = 0) -> tuple[str, int]:
    """Name and architecture of the GPU that runs engines.

    Raises:
        EnvironmentMissingError: there is none: TensorRT ends the process if it is used without a driver.
    """
    gpu = cuda_device(device)
    if gpu is None:
        number = f" number {device}" if device else ""
        raise EnvironmentMissingError(
            f"running an engine requires an NVIDIA GPU and its driver, and there is none{number} on this machine. "
            "Engines can be built here (rmsnorm build --runtime rtx) and run on a machine with a GPU; rmsnorm doctor "
            "says more."
        )
    return gpu


def _check_fits(file: EngineFile, api: Api, gpu: tuple[str, int]) -> None:
    """Check GPU and version against the record."""
    record = file.record
    if not record:
        return
    if f"sm_{gpu[1]}" not in record["architectures"]:
        raise UnsupportedError(
            f"{file.path}: it was built for {', '.join(record['architectures'])}"
            f"{'' if record['gpu'] is None else ' on ' + record['gpu']}, and this machine's GPU is {gpu[0]} "
            f"(sm_{gpu[1]}). Build it for this GPU: rmsnorm build."
        )
    built = record["runtime"]["version"]
    if built != api.version and not api.is_rtx and not record["options"]["version_compatible"]:
        raise UnsupportedError(
            f"{file.path}: it was built by {api.flavor.title} {built}, and {api.version} is installed here, which "
            f"cannot run it. Install {built}, build it again, or build it with --version-compatible "
            f"(see {record_of(file.path).name})."
        )


def _with_cause(what: str, logger: Any) -> str:
    causes = list(dict.fromkeys(list(logger.errors)[-3:]))
    return f"{what}: {'; '.join(causes)}" if causes else f"{what}, without a reason."
