"""Compile the kernel with NVRTC for one architecture, without the CUDA toolkit, a driver or a GPU."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from ...models.errors import EnvironmentMissingError, RmsnormDeployError, UsageError
from .launch_config import LaunchConfig
from .macros import macros
from .norm_kernel import HEADERS, SOURCE, SOURCE_FOLDER, NormKernel

Kind = Literal["ptx", "cubin"]
OLDEST: Final = 75
_RESOURCES: Final = {
    "registers": re.compile(r"Used (\d+) registers"),
    "shared_bytes": re.compile(r"(\d+) bytes smem"),
    "stack_bytes": re.compile(r"(\d+) bytes stack frame"),
    "spilled_bytes": re.compile(r"(\d+) bytes spill stores"),
}


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """A compiled kernel, as the CUDA driver loads it.

    Attributes:
        name: name of the entry point.
        kind: `ptx` or `cubin`.
        image: the PTX text, in UTF-8, or the cubin.
        architecture: compute capability without the point, such as 90.
        registers: registers of one thread.
        shared_bytes: static shared memory of one block, in bytes.
        stack_bytes: stack frame of one thread, in bytes of local memory.
        spilled_bytes: registers spilled to local memory, in bytes.
    """

    name: str
    kind: Kind
    image: bytes
    architecture: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    spilled_bytes: int


def compile_kernel(
    kernel: NormKernel,
    config: LaunchConfig,
    architecture: int,
    kind: Kind = "cubin",
    folder: Path = SOURCE_FOLDER,
) -> CompiledKernel:
    """Compile one kernel in one layout.

    Args:
        kernel: what the kernel computes.
        config: the layout, see `choose`.
        architecture: compute capability without the point, at least 75.
        kind: `cubin` for this architecture only, `ptx` for it and later ones.
        folder: the source's folder.

    Raises:
        UsageError: the architecture does not support the layout, or NVRTC does not support the architecture.
        EnvironmentMissingError: cuda-bindings or NVRTC is not installed.
        RmsnormDeployError: compilation failed; the message contains NVRTC's log.
    """
    if kind not in ("ptx", "cubin"):
        raise UsageError(f"kind of a compiled kernel: expected ptx or cubin, got {kind!r}.")
    if architecture < OLDEST:
        raise UsageError(f"architecture: expected sm_{OLDEST} or later, got sm_{architecture}.")
    config.check(kernel, architecture)
    nvrtc = import_nvrtc()
    known = _call(nvrtc, nvrtc.nvrtcGetSupportedArchs())
    if architecture not in known:
        raise UsageError(f"NVRTC supports {', '.join(f'sm_{a}' for a in sorted(known))}, not sm_{architecture}.")
    name = kernel.op
    defined = {"RMSNORM_NAME": name, **macros(kernel, config)}
    # A kernel from NVRTC's cache has a log without its resources.
    options = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", "--ptxas-options=-v", "--no-cache"]
    options += [f"-D{macro}={value}" for macro, value in defined.items()]
    headers = [(folder / header).read_bytes() for header in HEADERS]
    program = _call(
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            (folder / SOURCE).read_bytes(), SOURCE.encode(), len(headers), headers, [h.encode() for h in HEADERS]
        ),
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _text(nvrtc, program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RmsnormDeployError(f"NVRTC failed to compile {name} for sm_{architecture} ({status.name}):\n{log}")
        if kind == "ptx":
            image = _text(nvrtc, program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX).rstrip(b"\0")
        else:
            image = _text(nvrtc, program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    resources = {what: _number(pattern, log) for what, pattern in _RESOURCES.items()}
    return CompiledKernel(name, kind, image, architecture, **resources)


def import_nvrtc() -> Any:
    """`cuda.bindings.nvrtc`.

    Raises:
        EnvironmentMissingError: it is not installed.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise EnvironmentMissingError(
            "compiling the kernel requires cuda-bindings and NVRTC; install: pip install 'rmsnorm-deploy[kernel]'"
        ) from error
    return nvrtc


def _call(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RmsnormDeployError(f"NVRTC returned {status.name}.")
    return values[-1]


def _text(nvrtc: Any, program: Any, size: Any, read: Any) -> bytes:
    content = b" " * _call(nvrtc, size(program))
    read(program, content)
    return content


def _number(pattern: re.Pattern[str], log: str) -> int:
    found = pattern.search(log)
    return int(found[1]) if found else 0
