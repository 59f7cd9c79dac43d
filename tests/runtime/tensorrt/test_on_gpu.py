"""What only a GPU can show: the kernels through CUDA's driver, and engines that are built, opened and run.

`pytest -m gpu` and `pytest -m tensorrt` run these; elsewhere each is skipped with what it needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rmsnorm_deploy.plugins import contract
from rmsnorm_deploy.plugins.kernel.compiler import compile_kernel
from rmsnorm_deploy.plugins.kernel.launch_config import choose
from rmsnorm_deploy.plugins.kernel.norm_kernel import NormKernel
from rmsnorm_deploy.plugins.tensorrt import library
from rmsnorm_deploy.plugins.tensorrt.images import compile_images, kernel_of
from rmsnorm_deploy.plugins.tensorrt.launcher import Launcher
from rmsnorm_deploy.runtime.engines.api import flavor_of, is_installed
from rmsnorm_deploy.runtime.tensorrt.build import build_engine
from tests.helpers.plugins.gpu_memory import DEVICE, GpuMemory, needs_gpu
from tests.helpers.plugins.plugin_library import NUMPY, BuiltLibrary, reference
from tests.helpers.tensorrt.tensorrt_models import WIDTH, rms_norm_model

RUNNER = Path(__file__).parents[2] / "helpers" / "tensorrt" / "run_engine.py"


@pytest.fixture
def memory() -> Iterator[GpuMemory]:
    held = GpuMemory()
    yield held
    held.close()


def error_in_ulp(got: np.ndarray, expected: np.ndarray) -> float:
    bits = {"float32": 23, "float16": 10, "bfloat16": 7}[got.dtype.name]
    wide = expected.astype(np.float64)
    spacing = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(wide), 1e-4))) - bits)
    return float((np.abs(got.astype(np.float64) - wide) / spacing).max())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", contract.DTYPES)
@pytest.mark.parametrize("op_type", [contract.RMS_NORM, contract.ADD_RMS_NORM])
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (7, 80), (300, 128), (2048, 4096), (33, 3072), (5, 16384)])
@pytest.mark.parametrize(("offset", "cast_first"), [(0, False), (1, False), (0, True)])
def test_a_kernel_on_the_gpu_computes_the_contracts_formula(
    memory: GpuMemory, op_type: str, dtype: str, rows: int, width: int, offset: int, cast_first: bool
) -> None:
    assert DEVICE is not None
    rng = np.random.default_rng(rows + width)
    adds, kind = op_type == contract.ADD_RMS_NORM, NUMPY[dtype]
    x = (3 * rng.standard_normal((rows, width))).astype(kind)
    residual = rng.standard_normal((rows, width)).astype(kind) if adds else None
    scale = (1 + 0.5 * rng.standard_normal(width)).astype(kind)
    scale_type = contract.ONNX_TYPES[dtype] if cast_first else contract.ONNX_TYPES["float32"]
    kernel = kernel_of(op_type, dtype, width, 1e-6, float(offset), scale_type)
    launcher = Launcher(compile_images(kernel, (DEVICE[1],)), contract.KERNEL_OPS[op_type], memory.driver)
    inputs = [memory.put(array) for array in (x, residual, scale) if array is not None]
    outputs = [memory.empty(x.nbytes) for _ in contract.OUTPUTS[op_type]]
    launcher.launch([*inputs, *outputs], len(inputs), rows, 0)
    expected, total = reference(x, scale, residual, 1e-6, offset, cast_first)
    assert error_in_ulp(memory.get(outputs[0], x), expected) <= (4.0 if dtype == "float32" else 2.01)
    if adds:
        assert np.array_equal(memory.get(outputs[1], x), total)


@pytest.mark.gpu
@needs_gpu
def test_a_kernel_that_was_compiled_before_has_its_resources() -> None:
    """With a driver NVRTC keeps what it compiled, and the log of what it kept is empty."""
    assert DEVICE is not None
    kernel = NormKernel(4096, 1e-6)
    config = choose(kernel, 1, DEVICE[1])
    first, second = (compile_kernel(kernel, config, DEVICE[1]) for _ in range(2))
    assert first.registers == second.registers > 0


def run_engine(runtime: str, engine: Path, library_file: Path | None, x: np.ndarray, folder: Path) -> np.ndarray:
    """The engine's `y`, from a process of its own: plugins are registered for as long as a process lives."""
    np.save(folder / "x.npy", x)
    command = [sys.executable, str(RUNNER), runtime, str(engine), str(library_file or "python"), str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=dict(os.environ))
    assert answer.returncode == 0, answer.stderr
    return np.load(folder / "y.npy")


@pytest.mark.gpu
@pytest.mark.tensorrt
@needs_gpu
@pytest.mark.parametrize("kind", ["library", "python"])
@pytest.mark.parametrize("runtime", ["tensorrt", "rtx"])
def test_an_engine_runs_its_norm_in_the_plugin(
    built_library: BuiltLibrary, tmp_path: Path, runtime: str, kind: str
) -> None:
    """The inspector names the plugin's layer, and the engine's numbers are the contract's."""
    if not is_installed(runtime):
        pytest.skip(f"needs pip install 'rmsnorm-deploy[{runtime}]'")
    known = flavor_of(runtime).architectures
    if known and DEVICE is not None and DEVICE[1] not in known:
        pytest.skip(f"needs a GPU that {runtime} supports, such as sm_{known[-1]}; this one is sm_{DEVICE[1]}")
    place = built_library.path if kind == "library" else None
    model = rms_norm_model(tmp_path / "model.onnx")
    choices: dict[str, Any] = {"runtime": runtime, "plugin": kind, "plugin_library": str(built_library.path)}
    engine = build_engine(model, tmp_path / "m.engine", profiles=("rows:1,16,512",), **choices)
    assert engine.record["layer_source"] == "inspector"
    assert [row["plugin"] for row in engine.record["norms"]] == [True]
    rng = np.random.default_rng(3)
    scale = np.linspace(0.5, 1.5, WIDTH).astype(np.float16)
    for rows in (1, 16, 512):
        x = (3 * rng.standard_normal((rows, WIDTH))).astype(np.float16)
        y = run_engine(runtime, engine.path, place, x, tmp_path)
        assert error_in_ulp(y, reference(x, scale, None, 1e-6, 0, False)[0]) <= 1.01


@pytest.mark.tensorrt
@needs_gpu
def test_the_registering_library_registers_with_its_own_tensorrt(tmp_path: Path) -> None:
    """Built with the headers of the TensorRT that is installed here; see `rmsnorm plugin build --tensorrt-include`."""
    if not is_installed("tensorrt"):
        pytest.skip("needs pip install 'rmsnorm-deploy[tensorrt]'")
    headers = library._find_headers()
    if headers is None:
        pytest.skip("needs the C++ headers of the installed TensorRT")
    _, registering = library.build_library(tmp_path, headers)
    opened = (
        "import ctypes, tensorrt as trt\n"
        f"l = ctypes.CDLL({str(registering)!r})\n"
        "print(l.rmsnorm_deploy_registered(), trt.get_plugin_registry().get_creator('RMSNorm', '1', 'rmsnorm_deploy'))"
    )
    answer = subprocess.run([sys.executable, "-c", opened], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("1 ")
    assert "None" not in answer.stdout
