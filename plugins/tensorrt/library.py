"""The C++ library with the TensorRT plugins: find it, build it, and read its description."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...models.errors import EnvironmentMissingError, RmsnormDeployError, UsageError
from ..kernel.norm_kernel import HEADERS, SOURCE
from ..kernel.norm_kernel import SOURCE_FOLDER as SOURCE_CUDA
from .header import contract_digest

LIBRARY_NAME: Final = "librmsnorm_deploy.so"
REGISTERING_NAME: Final = "librmsnorm_deploy_register.so"
# Path of the library, if it is not the default one.
LIBRARY_VARIABLE: Final = "RMSNORM_DEPLOY_PLUGIN"
# Environment variables that the library reads when it compiles kernels: NVRTC's path, and architectures like `86,89`.
NVRTC_VARIABLE: Final = "RMSNORM_DEPLOY_NVRTC"
ARCHITECTURES_VARIABLE: Final = "RMSNORM_DEPLOY_ARCHITECTURES"


SOURCE_FOLDER: Final = Path(__file__).parent / "cpp"
_HEADER: Final = "NvInferRuntime.h"
# Folders in which TensorRT's Debian packages and archives install its headers.
_HEADER_PLACES: Final = (
    "/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu", "/usr/include", "/usr/local/TensorRT/include",
    "/opt/TensorRT/include", "/opt/tensorrt/include",
)  # fmt: skip
_HEADER_VARIABLES: Final = ("TENSORRT_ROOT", "TENSORRT_RTX_ROOT", "TENSORRT_HOME")
GET_HEADERS: Final = (
    "TensorRT's headers come with its archive or its Debian packages (libnvinfer-headers-dev), from "
    "https://developer.nvidia.com/tensorrt, or from the folder include/ of https://github.com/NVIDIA/TensorRT at the "
    "tag of your version; name their folder with --tensorrt-include"
)
GET_CUDA: Final = "nvcc comes with the CUDA toolkit, https://developer.nvidia.com/cuda-downloads; name it with --nvcc"
GET_CMAKE: Final = "cmake comes with: pip install cmake"
GET_COMPILER: Final = "a C++17 compiler comes with: apt install g++"
_BUILD_SECONDS: Final = 1800


@dataclass(frozen=True, slots=True)
class LibraryInfo:
    """The description of a library.

    Attributes:
        path: path of the library.
        creators: name, version and namespace of each plugin creator.
        is_current: whether it was built for the current contract.
        tensorrt_headers: version of the TensorRT headers that it was built with.
        generic_architectures: architectures that its generic kernel is compiled for.
        nvrtc: version of the NVRTC that it finds on this machine; empty if it finds none and uses the generic kernel.
    """

    path: Path
    creators: list[dict[str, str]]
    is_current: bool
    tensorrt_headers: str
    generic_architectures: list[int]
    nvrtc: str

    def to_dict(self) -> dict[str, Any]:
        """The library as JSON."""
        return {name: getattr(self, name) for name in self.__slots__} | {"path": str(self.path)}


@dataclass(frozen=True, slots=True)
class Toolchain:
    """Paths of the tools and headers that a library is built with."""

    tensorrt_include: Path
    nvcc: Path
    cmake: Path
    compiler: Path


def default_folder() -> Path:
    """The folder to which `rmsnorm plugin build` writes the library by default."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "rmsnorm-deploy" / "plugin"


def find_library() -> Path | None:
    """The default library: that of the environment variable, else that in the default folder; None if it is missing."""
    named = os.environ.get(LIBRARY_VARIABLE)
    place = Path(named).expanduser() if named else default_folder() / LIBRARY_NAME
    return place if place.is_file() else None


def default_registering_library() -> Path:
    """The library that registers itself, beside the default one: the path that it has if it exists."""
    found = find_library()
    return (default_folder() if found is None else found.absolute().parent) / REGISTERING_NAME


def find_nvrtc() -> Path | None:
    """Path of the NVRTC that was installed with pip; None to let the system's loader find another one."""
    for module, pattern in (("nvidia.cu13", "lib/libnvrtc.so.*"), ("nvidia.cuda_nvrtc", "lib/libnvrtc.so.*")):
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            continue
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            found = sorted(Path(place).glob(pattern))
            if found:
                return found[-1]
    return None


def python_digest() -> str:
    """A hash of the sources of the plugins in Python: the kernel's sources, the contract, the version of NVRTC."""
    text = b"".join((SOURCE_CUDA / name).read_bytes() for name in (*HEADERS, SOURCE)) + contract_digest().encode()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        text += importlib.metadata.version("nvidia-cuda-nvrtc").encode()
    return hashlib.sha256(text).hexdigest()


def kernels_report(library: Path) -> list[dict[str, Any]]:
    """The kernels that a loaded library compiled in this process: operator, width, dtype, architectures, bytes."""
    return json.loads(_text(library, "rmsnorm_deploy_kernels") or "[]")


def last_error(library: Path) -> str:
    """The last error of a loaded library in this process; empty if there was none."""
    return _text(library, "rmsnorm_deploy_last_error")


def _text(library: Path, function: str) -> str:
    entry = getattr(ctypes.CDLL(str(library)), function)
    entry.restype = ctypes.c_char_p
    return (entry() or b"").decode(errors="replace")


# Building -------------------------------------------------------------------------------------------------------


def find_toolchain(tensorrt_include: Path | None = None, nvcc: Path | None = None) -> Toolchain:
    """Find the tools and headers for a build on this machine.

    Args:
        tensorrt_include: the folder of TensorRT's headers; None to search for it.
        nvcc: the CUDA compiler; None to search for it.

    Raises:
        UsageError: an argument does not exist.
        EnvironmentMissingError: tools or headers are missing; the message lists all of them and where to get them.
    """
    if tensorrt_include is not None and not (tensorrt_include / _HEADER).is_file():
        raise UsageError(f"--tensorrt-include: expected a folder with {_HEADER}, got {tensorrt_include}.")
    if nvcc is not None and not os.access(nvcc, os.X_OK):
        raise UsageError(f"--nvcc: expected the CUDA compiler, got {nvcc}.")
    found = {
        f"TensorRT's headers ({_HEADER})": (tensorrt_include or _find_headers(), GET_HEADERS),
        "nvcc": (nvcc or _find_nvcc(), GET_CUDA),
        "cmake": (_which("cmake"), GET_CMAKE),
        "a C++ compiler": (_which(os.environ.get("CXX") or "c++") or _which("g++"), GET_COMPILER),
    }
    missing = [(name, get) for name, (place, get) in found.items() if place is None]
    if missing:
        raise EnvironmentMissingError(
            f"the plugin's library cannot be built on this machine; missing: {', '.join(name for name, _ in missing)}. "
            + " ".join(f"{get[0].upper()}{get[1:]}." for _, get in missing)
        )
    places = [place for place, _ in found.values() if place is not None]
    return Toolchain(*places)


def _find_headers() -> Path | None:
    named = [Path(os.environ[name]) / "include" for name in _HEADER_VARIABLES if os.environ.get(name)]
    return next((place for place in (*named, *map(Path, _HEADER_PLACES)) if (place / _HEADER).is_file()), None)


def _find_nvcc() -> Path | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for place in (*(Path(home) / "bin" / "nvcc" for home in homes), _which("nvcc"), Path("/usr/local/cuda/bin/nvcc")):
        if place is not None and os.access(place, os.X_OK):
            return place
    return None


def _which(program: str) -> Path | None:
    found = shutil.which(program)
    return None if found is None else Path(found)


def build_library(
    folder: Path | None = None,
    tensorrt_include: Path | None = None,
    nvcc: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Compile both libraries: the one that TensorRT loads, and the one that registers itself.

    Args:
        folder: the folder to write to; None for `default_folder()`.
        tensorrt_include: the folder of TensorRT's headers; None to search for it. The library that registers itself
            works only with the major version of these headers.
        nvcc: the CUDA compiler; None to search for it.
        progress: called with a line of text at each step.

    Returns:
        The paths of both libraries.

    Raises:
        EnvironmentMissingError: a compiler or the headers are missing.
        RmsnormDeployError: the build failed; the message contains the end of the compiler's output.
    """
    progress = progress or (lambda _: None)
    tools = find_toolchain(tensorrt_include, nvcc)
    place = (folder or default_folder()).expanduser().absolute()
    try:
        place.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(prefix=".rmsnorm-plugin-", dir=place)
    except OSError as error:
        raise UsageError(f"cannot write to {place}: {error.strerror or error}.") from error
    with work as scratch:
        progress("configuring")
        _run(
            [
                str(tools.cmake), "-S", str(SOURCE_FOLDER), "-B", scratch, f"-DCMAKE_CXX_COMPILER={tools.compiler}",
                f"-DTENSORRT_INCLUDE_DIR={tools.tensorrt_include.absolute()}", f"-DNVCC={tools.nvcc.absolute()}",
            ]
        )  # fmt: skip
        progress("compiling")
        _run([str(tools.cmake), "--build", scratch, "--parallel", str(os.cpu_count() or 1)])
        files = []
        for name in (LIBRARY_NAME, REGISTERING_NAME):
            (Path(scratch) / name).replace(place / name)
            files.append(place / name)
    return files


def _run(command: list[str]) -> None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RmsnormDeployError(f"{command[0]}: {error}") from error
    if answer.returncode:
        lines = [line for line in (answer.stdout + answer.stderr).splitlines() if line.strip()]
        wrong = [line for line in lines if "error" in line.lower()] or lines
        raise RmsnormDeployError(f"building the plugin's library failed: {' | '.join(wrong[-5:])}")


def read_library(path: Path) -> LibraryInfo:
    """Load a library and read its description.

    Raises:
        UsageError: the file does not exist, is not such a library, or cannot be loaded.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist. Build the library with: rmsnorm plugin build")
    nvrtc = find_nvrtc()
    if nvrtc is not None:
        os.environ.setdefault(NVRTC_VARIABLE, str(nvrtc))  # as when an engine is built
    try:
        content = json.loads(_text(path.absolute(), "rmsnorm_deploy_info"))
    except (OSError, AttributeError, ValueError) as error:
        raise UsageError(f"{path}: not a library of rmsnorm-deploy: {error}") from error
    return LibraryInfo(
        path,
        content["creators"],
        content["contract"] == contract_digest(),
        content["tensorrt_headers"],
        content["generic_architectures"],
        content["nvrtc"],
    )
