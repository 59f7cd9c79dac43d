"""The plugin's library, compiled for the tests, and the host's stand-ins for CUDA's driver and NVRTC that run it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from rmsnorm_deploy.models.errors import EnvironmentMissingError
from rmsnorm_deploy.plugins.kernel.norm_kernel import SOURCE_FOLDER
from rmsnorm_deploy.plugins.tensorrt import library

# `make install` puts the pinned headers there; see tests/tensorrt-headers.txt.
HEADERS = Path(sys.prefix) / "tensorrt-headers" / "kernel_lens" / "include" / "tensorrt"
HOST = Path(__file__).parents[2] / "plugins" / "tensorrt" / "host"
SHIM = Path(__file__).parents[2] / "plugins" / "kernel" / "host"
# TensorRT's numbers of data types.
TENSORRT_TYPES = {"float32": 0, "float16": 1, "bfloat16": 7}
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def missing() -> str | None:
    """Why the library cannot be compiled here; None where it can."""
    if not HEADERS.is_dir():
        return f"needs TensorRT's headers in {HEADERS}: make install"
    try:
        library.find_toolchain(HEADERS)
    except EnvironmentMissingError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class BuiltLibrary:
    """The two libraries and what they were built with."""

    path: Path
    registering: Path
    cuda_include: Path


def build_once(folder: Path) -> BuiltLibrary:
    """Build both libraries in `folder`; processes that ask at the same time build them once."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / "built"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / library.REGISTERING_NAME).is_file():
            library.build_library(place, HEADERS)
    nvcc = library.find_toolchain(HEADERS).nvcc
    homes = [nvcc.resolve().parent.parent, Path("/usr/local/cuda")]
    include = next(home / "include" for home in homes if (home / "include" / "cuda.h").is_file())
    return BuiltLibrary(place / library.LIBRARY_NAME, place / library.REGISTERING_NAME, include)


class HostDriver:
    """Drives the library as TensorRT does, over the stand-ins; see tests/plugins/tensorrt/host/driver.cpp.

    Args:
        built: the libraries.
        folder: for what is compiled.
    """

    def __init__(self, built: BuiltLibrary, folder: Path) -> None:
        self._built, self._folder = built, folder
        folder.mkdir(parents=True, exist_ok=True)
        shared = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w"]
        host = [f"-I{SHIM}", f"-I{SOURCE_FOLDER}", "-ffp-contract=off", "-include", "gpu.h", "-x", "c++"]
        includes = [f"-I{HEADERS}", f"-I{built.cuda_include}"]
        for command in (
            [*shared, str(HOST / "nvrtc.cpp"), "-o", str(folder / "libnvrtc.so.13")],
            [*shared, *includes, str(HOST / "cuda.cpp"), "-o", str(folder / "libcuda.so.1"), "-ldl"],
            [*shared, *host, str(SOURCE_FOLDER / "generic.cu"), "-o", str(folder / "generic.so")],
            ["g++", "-std=c++17", "-O1", "-w", *includes, str(HOST / "driver.cpp"), "-o", str(folder / "driver"),
             "-ldl"],
        ):  # fmt: skip
            subprocess.run(command, check=True)

    def run(
        self, commands: Sequence[str], nvrtc: bool = True, library: Path | None = None, **settings: str
    ) -> list[str]:
        """The answers to `commands`, each with the lines of loads and launches before it.

        Args:
            commands: of the driver program.
            nvrtc: whether NVRTC is there.
            library: another library than the one that TensorRT loads.
            settings: environment variables.
        """
        places = self._folder if nvrtc else self._without_nvrtc()
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(places),
            "RMSNORM_TEST_SCRATCH": str(self._folder / "scratch"),
            "RMSNORM_TEST_HOST": str(SHIM),
            "RMSNORM_TEST_GENERIC": str(self._folder / "generic.so"),
            "RMSNORM_DEPLOY_ARCHITECTURES": "86,89",
            "RMSNORM_DEPLOY_NVRTC": "",
            **settings,
        }
        answer = subprocess.run(
            [str(self._folder / "driver"), str(library or self._built.path)],
            input="\n".join(commands) + "\n",
            capture_output=True, text=True, env=environment, timeout=300, check=False,
        )  # fmt: skip
        assert answer.returncode == 0, answer.stderr
        found, lines = [], []
        for line in answer.stdout.splitlines():
            lines.append(line.removeprefix("= "))
            if line.startswith("= "):
                found.append("\n".join(lines))
                lines = []
        return found

    def run_engine_cycle(self, op_type: str, fields: str, shapes: str, folder: Path, **settings: Any) -> list[str]:
        """The answers to one norm's way: made, configured, serialized, made again of that, attached, launched.

        The launch reads `in` and writes `out` in `folder`; the last answer is the library's last error.
        """
        return self.run([
            f"create {op_type} build {fields}",
            f"configure {shapes}",
            "serialize",
            "kernels",
            f"create {op_type} runtime {fields} kernels=saved",
            "attach",
            f"shape {shapes}",
            f"enqueue {shapes} {folder / 'in'} {folder / 'out'}",
            "error",
        ], **settings)  # fmt: skip

    def _without_nvrtc(self) -> Path:
        place = self._folder / "without-nvrtc"
        place.mkdir(exist_ok=True)
        if not (place / "libcuda.so.1").exists():
            (place / "libcuda.so.1").symlink_to(self._folder / "libcuda.so.1")
        return place


def reference(
    x: NDArray, scale: NDArray, residual: NDArray | None, epsilon: float, offset: float, cast_first: bool
) -> tuple[NDArray, NDArray]:
    """The contract's formula in float64, rounded where it rounds: y and the sum, in x's dtype."""
    total = x if residual is None else (x.astype(np.float32) + residual.astype(np.float32)).astype(x.dtype)
    wide = total.astype(np.float64)
    n = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + epsilon)
    shifted = scale.astype(np.float64) + offset
    if cast_first:
        n, shifted = (value.astype(np.float32).astype(x.dtype).astype(np.float64) for value in (n, shifted))
    return (n * shifted).astype(np.float32).astype(x.dtype), total
