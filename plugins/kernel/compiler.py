"""The kernel's source compiled by NVRTC, for one architecture, without a CUDA toolkit, a driver or a GPU."""

from __future__ import annotations

import re
from dataclasses import dataclass
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
    """A kernel as the driver loads it.

    Attributes:
        name: of the entry.
        kind: `ptx` or `cubin`.
        image: the PTX text, in UTF-8, or the cubin.
        architecture: compute capability without its point, such as 90.
        registers: of one thread.
        shared_bytes: static shared memory of one block.
        stack_bytes: local memory that one thread's frame takes.
        spilled_bytes: registers that were stored to local memory.
    """

    name: str
    kind: Kind
    image: bytes
    architecture: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    spilled_bytes: int


def compile_kernel(kernel: NormKernel, config: LaunchConfig, architecture: int, kind: Kind = "cubin") -> CompiledKernel:
    """Compile one kernel in one layout.

    Args:
        kernel: what is computed.
        config: the layout, as `choose` gives it.
        architecture: compute capability without its point: 75 and later.
        kind: `cubin` for this architecture alone, `ptx` for it and later ones.

    Raises:
        UsageError: the layout cannot run on the architecture, or NVRTC does not know it.
        EnvironmentMissingError: cuda-bindings or NVRTC is not installed.
        RmsnormDeployError: NVRTC refused the source; the message holds its log.
    """
    if kind not in ("ptx", "cubin"):
        raise UsageError(f"a kernel is compiled to ptx or cubin, not to {kind!r}.")
    if architecture < OLDEST:
        raise UsageError(f"sm_{architecture}: the kernel needs sm_{OLDEST} or later.")
    config.check(kernel, architecture)
    nvrtc = import_nvrtc()
    known = _call(nvrtc, nvrtc.nvrtcGetSupportedArchs())
    if architecture not in known:
        raise UsageError(f"sm_{architecture}: this NVRTC compiles for {', '.join(f'sm_{a}' for a in sorted(known))}.")
    name = kernel.op
    defined = {"RMSNORM_NAME": name, **macros(kernel, config)}
    options = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", "--ptxas-options=-v"]
    options += [f"-D{macro}={value}" for macro, value in defined.items()]
    headers = [(SOURCE_FOLDER / header).read_bytes() for header in HEADERS]
    program = _call(
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            (SOURCE_FOLDER / SOURCE).read_bytes(), SOURCE.encode(), len(headers), headers, [h.encode() for h in HEADERS]
        ),
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _text(nvrtc, program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RmsnormDeployError(f"NVRTC did not compile {name} for sm_{architecture} ({status.name}):\n{log}")
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
            "compiling the kernel needs cuda-bindings and NVRTC; install: pip install 'rmsnorm-deploy[kernel]'"
        ) from error
    return nvrtc


def _call(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RmsnormDeployError(f"NVRTC answers {status.name}.")
    return values[-1]


def _text(nvrtc: Any, program: Any, size: Any, read: Any) -> bytes:
    content = b" " * _call(nvrtc, size(program))
    read(program, content)
    return content


def _number(pattern: re.Pattern[str], log: str) -> int:
    found = pattern.search(log)
    return int(found[1]) if found else 0
