"""The kernel's own source, compiled for the host and run by `plugins/host/gpu.h`, thread by thread."""

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

from rmsnorm_deploy.plugins.kernel.launch_config import LaunchConfig
from rmsnorm_deploy.plugins.kernel.macros import macros
from rmsnorm_deploy.plugins.kernel.norm_kernel import SOURCE_FOLDER, NormKernel

Array = NDArray[Any]
SHIM = Path(__file__).parents[2] / "plugins" / "kernel" / "host" / "gpu.h"
NUMPY: dict[str, Any] = {
    "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8,
    "float8_e4m3": ml_dtypes.float8_e4m3fn,
}  # fmt: skip
_POISON = 0xA5


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


class HostKernels:
    """Several kernels in one library."""

    def __init__(self, folder: Path, cases: Sequence[tuple[NormKernel, LaunchConfig]]) -> None:
        self._cases = list(cases)
        lines = ['#include "gpu.h"', '#include "rms_norm.cuh"']
        for number, (kernel, config) in enumerate(self._cases):
            defined = {"RMSNORM_NAME": f"kernel_{number}", **macros(kernel, config)}
            lines += [f"#define {name} {value}" for name, value in defined.items()]
            lines += ['#include "kernel.cu"', *(f"#undef {name}" for name in defined)]
        source, library = folder / "kernels.cpp", folder / "kernels.so"
        source.write_text("\n".join(lines) + "\n")
        command = [
            str(compiler()), "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w",
            f"-I{SHIM.parent}", f"-I{SOURCE_FOLDER}", str(source), "-o", str(library),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        self._library = ctypes.CDLL(str(library))

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
        kernel, config = self._cases[number]
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
        given = (x, residual, gate, weight, scale)
        inputs = [array.ctypes.data for array in given if array is not None]
        values = [*inputs, rows, *strides, *(array.ctypes.data for array in outputs.values())]
        packed = (ctypes.c_uint64 * 16)(*values)
        entry = ctypes.cast(getattr(self._library, f"kernel_{number}"), ctypes.c_void_p)
        failed = self._library.launch(
            entry, config.grid(rows), config.block, config.cluster, packed, ctypes.c_uint(seed)
        )
        assert not failed, "threads wait for each other in vain"
        if in_place:
            return outputs
        for array in outputs.values():
            assert set(array[rows:].tobytes()) == {_POISON}, "written beyond the end"
        return {name: array[:rows] for name, array in outputs.items()}


def _poisoned(shape: tuple[int, ...], dtype: Any) -> Array:
    return np.frombuffer(bytes([_POISON]) * int(np.prod(shape) * np.dtype(dtype).itemsize), dtype).reshape(shape).copy()
