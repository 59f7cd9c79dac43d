"""Compile the kernel with NVRTC for one architecture, without the CUDA toolkit, a driver or a GPU."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from ...models.errors import EnvironmentMissingError, RmsnormDeployError, UnsupportedError, UsageError
from ...models.versions import installed_version
from .kernel_cache import entry_key, read_entry, write_entry
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
    """Compile one kernel in one layout, or read it from the cache on disk (`kernel_cache`).

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
    sources = {file: (folder / file).read_bytes() for file in (SOURCE, *HEADERS)}
    key = entry_key({
        "name": name, "kind": kind, "options": options, "nvrtc": _build_of(nvrtc),
        "sources": {file: hashlib.sha256(content).hexdigest() for file, content in sources.items()},
    })  # fmt: skip
    cached = read_entry(key)
    if cached is not None:
        return CompiledKernel(**cached)
    image, log = _compile(nvrtc, sources, options, kind, f"{name} for sm_{architecture}")
    resources = {what: _number(pattern, log) for what, pattern in _RESOURCES.items()}
    compiled = CompiledKernel(name, kind, image, architecture, **resources)
    write_entry(key, dataclasses.asdict(compiled))
    return compiled


def _compile(nvrtc: Any, sources: dict[str, bytes], options: list[str], kind: Kind, what: str) -> tuple[bytes, str]:
    """The image and the log of NVRTC."""
    headers = [sources[header] for header in HEADERS]
    program = _call(
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            sources[SOURCE], SOURCE.encode(), len(headers), headers, [header.encode() for header in HEADERS]
        ),
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _text(nvrtc, program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RmsnormDeployError(f"NVRTC failed to compile {what} ({status.name}):\n{log}")
        if kind == "ptx":
            return _text(nvrtc, program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX).rstrip(b"\0"), log
        return _text(nvrtc, program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def nvrtc_version() -> tuple[int, int]:
    """The CUDA version of NVRTC. It writes PTX for drivers of this CUDA version or later, and cannot write older PTX.

    Raises:
        EnvironmentMissingError: NVRTC is not installed.
    """
    nvrtc = import_nvrtc()
    status, major, minor = nvrtc.nvrtcVersion()
    _call(nvrtc, (status, major))
    return major, minor


def check_driver(driver: tuple[int, int]) -> None:
    """Check that a driver can load PTX of this NVRTC.

    Args:
        driver: the newest CUDA version that it supports, as `nvidia-smi` prints it.

    Raises:
        UnsupportedError: it is older than NVRTC.
    """
    version = nvrtc_version()
    if driver < version:
        wanted, found = (".".join(map(str, numbers)) for numbers in (driver, version))
        raise UnsupportedError(
            f"PTX for a driver of CUDA {wanted}: expected NVRTC {wanted} or earlier, got {found}, whose PTX that "
            "driver refuses. Compile a cubin, which needs no newer driver than its GPU does, or use an older NVRTC."
        )


def _build_of(nvrtc: Any) -> list[str]:
    """What names the build of NVRTC: its CUDA version, and the versions of the packages that may contain it."""
    _, major, minor = nvrtc.nvrtcVersion()
    packages = ("nvidia-cuda-nvrtc", f"nvidia-cuda-nvrtc-cu{major}")
    return [f"{major}.{minor}", *(installed_version(package) or "" for package in packages)]


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
