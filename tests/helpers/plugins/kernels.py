"""The kernels on poisoned outputs: on the host, thread by thread (`plugins/kernel/host/gpu.h`), as PTX, or on a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from rmsnorm_deploy.plugins.kernel.compiler import compile_kernel
from rmsnorm_deploy.plugins.kernel.launch_config import LaunchConfig
from rmsnorm_deploy.plugins.kernel.macros import macros
from rmsnorm_deploy.plugins.kernel.norm_kernel import SOURCE_FOLDER, NormKernel
from tests.helpers.plugins.gpu_memory import GpuMemory
from tests.helpers.plugins.ptx import Machine, Program
from tests.helpers.plugins.ptx_arithmetic import Approximation
from tests.helpers.plugins.ptx_memory import GlobalMemory

Array = NDArray[Any]
SHIM = Path(__file__).parents[2] / "plugins" / "kernel" / "host" / "gpu.h"
NUMPY: dict[str, Any] = {
    "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8,
    "float8_e4m3": ml_dtypes.float8_e4m3fn,
}  # fmt: skip
_POISON = 0xA5


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


def host_library(folder: Path, lines: Sequence[str]) -> ctypes.CDLL:
    """C++ source that uses the kernel's headers, compiled by the host's compiler and loaded."""
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text("\n".join(['#include "gpu.h"', *lines]) + "\n")
    command = [
        str(compiler()), "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w",
        f"-I{SHIM.parent}", f"-I{SOURCE_FOLDER}", str(source), "-o", str(library),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


class Kernels:
    """Several kernels, and how they are run."""

    def __init__(self, folder: Path, cases: Sequence[tuple[NormKernel, LaunchConfig]]) -> None:
        self._folder, self._cases = folder, list(cases)

    def run(
        self,
        number: int,
        x: Array,
        *,
        residual: Array | None = None,
        gate: Array | None = None,
        weight: Array | None = None,
        scale: Array | None = None,
        rows: int | None = None,
        strides: Sequence[int] = (),
        seed: int = 0,
        in_place: bool = False,
    ) -> dict[str, Array]:
        """Run one kernel on poisoned outputs; `y` [rows, width], and where there are any `sum` and `row_scale`."""
        kernel, _ = self._cases[number]
        rows = len(x) if rows is None else rows
        sum_dtype = NUMPY[kernel.residual_dtype or kernel.dtype]
        outputs = {"y": _poisoned((rows + 1, kernel.width), NUMPY[kernel.out_dtype])}
        if kernel.adds:
            outputs["sum"] = _poisoned((rows + 1, kernel.width), sum_dtype)
        if kernel.quantization == "per_row":
            outputs["row_scale"] = _poisoned((rows + 1,), np.float32)
        if in_place:
            outputs["y"] = x
            if residual is not None:
                outputs["sum"] = residual
        given = [array for array in (x, residual, gate, weight, scale) if array is not None]
        self._launch(number, given, [rows, *strides], list(outputs.values()), seed)
        if in_place:
            return outputs
        for array in outputs.values():
            assert set(array[rows:].tobytes()) == {_POISON}, "written beyond the end"
        return {name: array[:rows] for name, array in outputs.items()}

    def _launch(self, number: int, inputs: list[Array], scalars: list[int], outputs: list[Array], seed: int) -> None:
        """Run one kernel; an array that is input and output is the same object in both lists."""
        raise NotImplementedError


class HostKernels(Kernels):
    """Compiled in one library by the host's compiler."""

    def __init__(self, folder: Path, cases: Sequence[tuple[NormKernel, LaunchConfig]]) -> None:
        super().__init__(folder, cases)
        lines = ['#include "rms_norm.cuh"']
        for number, (kernel, config) in enumerate(self._cases):
            defined = {"RMSNORM_NAME": f"kernel_{number}", **macros(kernel, config)}
            lines += [f"#define {name} {value}" for name, value in defined.items()]
            lines += ['#include "kernel.cu"', *(f"#undef {name}" for name in defined)]
        self._library = host_library(folder, lines)

    def approximate(self, ulps: int) -> None:
        """Let the results that a GPU approximates be off by this many ULPs from now on, of either sign."""
        self._library.approximate(ulps)

    def _launch(self, number: int, inputs: list[Array], scalars: list[int], outputs: list[Array], seed: int) -> None:
        _, config = self._cases[number]
        values = [*(array.ctypes.data for array in inputs), *scalars, *(array.ctypes.data for array in outputs)]
        packed = (ctypes.c_uint64 * 16)(*values)
        entry = ctypes.cast(getattr(self._library, f"kernel_{number}"), ctypes.c_void_p)
        failed = self._library.launch(
            entry, config.grid(scalars[0]), config.block, config.cluster, packed, ctypes.c_uint(seed)
        )
        assert not failed, "threads wait for each other in vain"


class DeviceKernels(Kernels):
    """Compiled by NVRTC for the GPU of this machine, each when it is first run."""

    def __init__(self, folder: Path, cases: Sequence[tuple[NormKernel, LaunchConfig]]) -> None:
        super().__init__(folder, cases)
        self._device = GpuMemory()
        self._functions: dict[int, Any] = {}

    def _launch(self, number: int, inputs: list[Array], scalars: list[int], outputs: list[Array], seed: int) -> None:
        kernel, config = self._cases[number]
        device, driver = self._device, self._device.driver
        if number not in self._functions:
            image = compile_kernel(kernel, config, device.architecture)
            module = device.call(driver.cuModuleLoadData(image.image))
            self._functions[number] = device.call(driver.cuModuleGetFunction(module, image.name.encode()))
        grid = config.grid(scalars[0])
        if grid == 0:
            return  # as Launcher does
        held = {id(array): device.put(array) for array in (*inputs, *outputs)}
        pointers = [np.array([held[id(array)]], np.uint64) for array in (*inputs, *outputs)]
        values = [*pointers[: len(inputs)], np.array([scalars[0]], np.int32)]
        values += [np.array([stride], np.int64) for stride in scalars[1:]] + pointers[len(inputs) :]
        addresses = np.array([value.ctypes.data for value in values], np.uint64)
        device.call(
            driver.cuLaunchKernel(
                self._functions[number], grid, 1, 1, config.block, 1, 1, 0, 0, addresses.ctypes.data, 0
            )
        )
        for array in outputs:
            array[...] = device.get(held[id(array)], array)
        device.free()


class PtxKernels(Kernels):
    """Compiled by NVRTC to PTX, each when it is first run, and run by the interpreter of `ptx.py`.

    Args:
        folder: not used.
        cases: kernels and layouts.
        architecture: what is compiled for.
        alignment: of every array in memory, and no more, in bytes.
        side: how far approximate units are off, see `Approximation`; None draws it for each thread.
        sources: folder of the CUDA sources.
    """

    def __init__(
        self,
        folder: Path,
        cases: Sequence[tuple[NormKernel, LaunchConfig]],
        *,
        architecture: int = 90,
        alignment: int = 16,
        side: float | None = None,
        sources: Path = SOURCE_FOLDER,
    ) -> None:
        super().__init__(folder, cases)
        self._architecture, self._alignment, self._side, self._sources = architecture, alignment, side, sources
        self._programs: dict[int, Program] = {}

    def _launch(self, number: int, inputs: list[Array], scalars: list[int], outputs: list[Array], seed: int) -> None:
        kernel, config = self._cases[number]
        if number not in self._programs:
            compiled = compile_kernel(kernel, config, self._architecture, "ptx", self._sources)
            self._programs[number] = Program(compiled.image.decode())
        grid = config.grid(scalars[0])
        if grid == 0:
            return  # as Launcher does
        memory, written = GlobalMemory(self._alignment), {id(array) for array in outputs}
        held = {id(array): memory.put(array, id(array) in written) for array in (*inputs, *outputs)}
        addresses = [held[id(array)] for array in (*inputs, *outputs)]
        arguments = [*addresses[: len(inputs)], *scalars, *addresses[len(inputs) :]]
        approximation = Approximation(seed, self._side)
        Machine(self._programs[number], memory, arguments, grid, config.block, config.cluster, approximation).run()
        for array in outputs:
            array[...] = memory.get(held[id(array)], array)


def _poisoned(shape: tuple[int, ...], dtype: Any) -> Array:
    return np.frombuffer(bytes([_POISON]) * int(np.prod(shape) * np.dtype(dtype).itemsize), dtype).reshape(shape).copy()
