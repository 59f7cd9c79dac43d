"""The C++ library: every function that TensorRT calls, on the host; its reports; its twin in Python."""

from __future__ import annotations

import ctypes
import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rmsnorm_deploy.models.errors import EnvironmentMissingError, UsageError
from rmsnorm_deploy.plugins import contract
from rmsnorm_deploy.plugins.kernel.launch_config import choose, layouts
from rmsnorm_deploy.plugins.kernel.macros import macros
from rmsnorm_deploy.plugins.tensorrt import header, library
from rmsnorm_deploy.plugins.tensorrt.images import kernel_of
from tests.helpers.plugins import plugin_library
from tests.helpers.plugins.plugin_library import NUMPY, TENSORRT_TYPES, BuiltLibrary, HostDriver, reference

needs_library = pytest.mark.skipif(plugin_library.missing() is not None, reason=str(plugin_library.missing()))
FIELDS = "epsilon=1e-5 scale_offset=0 scale_type=1"
# Each operator, with each type of a quantized output.
OPERATORS = [
    (op_type, quant_type)
    for op_type in contract.INPUTS
    for quant_type in (contract.QUANT_TYPES.values() if op_type in contract.UNQUANTIZED else (None,))
]


@pytest.fixture(scope="module")
def driver(built_library: BuiltLibrary, tmp_path_factory: pytest.TempPathFactory) -> HostDriver:
    return HostDriver(built_library, tmp_path_factory.mktemp("host"))


def test_the_header_is_that_of_the_contract() -> None:
    assert header.PLACE.read_text(encoding="utf-8") == header.contract_header(), (
        "write it again: python -m rmsnorm_deploy.plugins.tensorrt.header"
    )


@needs_library
def test_the_library_says_what_it_holds(built_library: BuiltLibrary) -> None:
    info = library.read_library(built_library.path)
    names = [(row["name"], row["version"], row["namespace"]) for row in info.creators]
    assert names == [(name, contract.PLUGIN_VERSION, contract.PLUGIN_NAMESPACE) for name in contract.INPUTS]
    assert info.is_current
    assert info.tensorrt_headers == "10.14.1"
    assert info.generic_architectures == [75, 80, 86, 89, 90, 100, 120]


@needs_library
def test_nothing_is_linked_against_tensorrt_or_cuda(built_library: BuiltLibrary) -> None:
    for path in (built_library.path, built_library.registering):
        listed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
        needed = [line.split("[")[1].split("]")[0] for line in listed.splitlines() if "NEEDED" in line]
        assert needed
        assert not [name for name in needed if "cuda" in name or "nvinfer" in name or "tensorrt" in name]


@needs_library
def test_the_generic_kernel_is_there_for_every_architecture(built_library: BuiltLibrary) -> None:
    content = built_library.path.read_bytes()
    start = content.index(b"\x50\xed\x55\xba")
    _, _, header_size, size = struct.unpack_from("<IHHQ", content, start)
    found, position = [], start + header_size
    while position < start + header_size + size:
        # Of each entry: 1 for PTX and 2 for a cubin, the size of its header and of what follows, and the architecture.
        kind, entry_size, payload, architecture = struct.unpack_from("<H2xIQ12xI", content, position)
        found.append((kind, architecture))
        position += entry_size + payload
    assert sorted(found) == [(1, 120), *((2, number) for number in (75, 80, 86, 89, 90, 100, 120))]


@needs_library
def test_layouts_and_macros_are_those_of_python(built_library: BuiltLibrary) -> None:
    """The library chooses layouts by itself, where there is no Python: every choice must be the same."""
    options = ctypes.CDLL(str(built_library.path)).rmsnorm_deploy_options
    options.restype = ctypes.c_char_p
    options.argtypes = [ctypes.c_int] * 4 + [ctypes.c_float] + [ctypes.c_int] * 4
    rng = random.Random(1)
    widths = [1, 2, 3, 8, 32, 64, 80, 128, 255, 256, 1000, 1024, 2048, 3072, 4096, 5120, 7168, 8192, 12288, 16384,
              28672, 32768, 65535, 65536] + [rng.randint(1, 65536) for _ in range(100)]  # fmt: skip
    count = 0
    for width in widths:
        for op_type, quant_type in OPERATORS:
            for dtype, number in contract.ONNX_TYPES.items():
                for offset, scale_type in ((0.0, 1), (1.0, number)):
                    kernel = kernel_of(op_type, dtype, width, 1e-6, offset, scale_type, quant_type)
                    for architecture in (75, 89, 90, 100, 120):
                        found = layouts(kernel, architecture)
                        for index, config in enumerate(found):
                            defined = {"RMSNORM_NAME": kernel.op, **macros(kernel, config)}
                            expected = {f"-D{name}={value}" for name, value in defined.items()}
                            expected |= {f"--gpu-architecture=sm_{architecture}", "--std=c++17"}
                            expected |= {f"few={int(config.few)}"}
                            text = options(
                                kernel.adds, number, quant_type or 0, width, 1e-6, offset != 0, kernel.cast_first,
                                index, architecture,
                            )  # fmt: skip
                            assert set(text.decode().split()) == expected
                            count += 1
                        assert options(kernel.adds, number, 0, width, 1e-6, 0, 0, len(found), architecture) == b""
    assert count > len(widths) * 6 * 3 * 2 * 2 * 5


@needs_library
@pytest.mark.parametrize("op_type", contract.QUANTIZED)
def test_every_function_answers_as_tensorrt_expects(driver: HostDriver, op_type: str) -> None:
    inputs, outputs = len(contract.INPUTS[op_type]), len(contract.OUTPUTS[op_type])
    tensors = " ".join(["1 -1,-1,64"] * (inputs - 1) + ["1 64"])
    dims = " ".join(["2,3,64"] * (inputs - 1) + ["64"])
    total = inputs + outputs
    answers = driver.run([
        "creators",
        f"create {op_type} build epsilon=1e-5 scale_offset=1 scale_type=10",
        "describe",
        "types " + " ".join(["1"] * inputs),
        f"dims {dims}",
        "formats " + " ".join(["1 0"] * total),
        "formats " + " ".join(["1 4"] + ["1 0"] * (total - 1)),
        "formats " + " ".join(["7 0"] * total),
        "formats " + " ".join(["1 0"] + ["0 0"] * (total - 1)),
        "clone",
        f"configure {tensors}",
        "serialize",
        "attach",
        "clone",
        "describe",
    ])  # fmt: skip
    fields = "epsilon/1 scale_offset/1 scale_type/5"
    names = "".join(
        f"{name} 1 rmsnorm_deploy: {fields}{' quant_type/5' if name in contract.UNQUANTIZED else ''};"
        for name in contract.INPUTS
    )
    described = f"{op_type} 1 rmsnorm_deploy {outputs} 0 100 0 0 0x1.4f8b58p-17-1-10"
    assert answers[:5] == [names, "made", described, "0:" + " 1" * outputs, "0:" + " 2,3,64" * outputs]
    # All float16 and linear; x in another format; bfloat16, which the scale's type does not fit; one dtype only.
    assert answers[5:9] == ["1" * total, "0" + "1" * (total - 1), "0" + "1" * (total - 1), "1" + "0" * (total - 1)]
    assert answers[9:11] == ["made", "0"]
    *plain, kernels = answers[11].split()
    assert plain == ["epsilon/1/1", "scale_offset/1/1", "scale_type/5/1"]
    assert kernels.startswith("kernels/3/")
    assert answers[12:] == ["made", "made", described]


CASES = [
    # op, dtype, width, rows, offset, scale multiplied in x's dtype, GPU
    ("RMSNorm", "float32", 64, 3, 0, False, 89),
    ("RMSNorm", "float16", 4096, 2, 0, True, 86),
    ("RMSNorm", "bfloat16", 80, 9, 1, False, 89),
    ("RMSNorm", "float16", 33, 5, 1, True, 86),
    ("AddRMSNorm", "float32", 1000, 3, 1, False, 89),
    ("AddRMSNorm", "float16", 256, 7, 0, False, 89),
    ("AddRMSNorm", "bfloat16", 3072, 2, 0, True, 86),
]


def run_norm(
    driver: HostDriver, folder: Path, case: tuple[str, str, int, int, int, bool, int], **settings: str
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]:
    """Build, serialize, load again and launch; the answers, y, the sum, and what both should be."""
    op_type, dtype, width, rows, offset, cast_first, gpu = case
    rng = np.random.default_rng(width + rows)
    kind = NUMPY[dtype]
    adds = op_type == "AddRMSNorm"
    x = (rng.standard_normal((rows, width)) * 3).astype(kind)
    residual = rng.standard_normal((rows, width)).astype(kind) if adds else None
    scale = (rng.standard_normal(width) * 0.5 + 1).astype(kind)
    given = [array for array in (x, residual, scale) if array is not None]
    (folder / "in").write_bytes(b"".join(array.tobytes() for array in given))
    number = TENSORRT_TYPES[dtype]
    shapes = " ".join([f"{number} {rows},{width}"] * (1 + adds) + [f"{number} {width}"])
    fields = f"epsilon=1e-5 scale_offset={offset} scale_type={contract.ONNX_TYPES[dtype] if cast_first else 1}"
    answers = driver.run_engine_cycle(op_type, fields, shapes, folder, **{"RMSNORM_TEST_GPU": str(gpu), **settings})
    content = (folder / "out").read_bytes()
    size = rows * width * np.dtype(kind).itemsize
    y = np.frombuffer(content[:size], kind).reshape(rows, width)
    total = np.frombuffer(content[size:], kind).reshape(rows, width) if adds else None
    expected_y, expected_total = reference(x, scale, residual, 1e-5, offset, cast_first)
    return answers, y, expected_y, total, expected_total, x


def ulps(a: np.ndarray, b: np.ndarray) -> float:
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    bits = {"float32": 23, "float16": 10, "bfloat16": 7}[a.dtype.name]
    spacing = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(wide_b), 1e-4))) - bits)
    return float((np.abs(wide_a - wide_b) / spacing).max())


@needs_library
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_an_engines_norm_computes_the_contracts_formula(driver: HostDriver, tmp_path: Path, case: tuple) -> None:
    op_type, dtype, width, _, _, cast_first, gpu = case
    answers, y, expected, total, expected_total, _ = run_norm(driver, tmp_path, case)
    assert answers[:2] == ["made", "0"]
    assert answers[4:6] == ["made", "made"]
    assert answers[6] == f"load sm_{gpu}\n0"
    launched, status = answers[7].splitlines()
    assert status == "0"
    assert launched.startswith(f"launch {contract.KERNEL_OPS[op_type]} grid ")
    assert launched.endswith("stream 0x5eed")
    assert answers[8] == ""
    # A rounding that falls to the other side before the scale multiplies moves the product by two ULP at most.
    assert ulps(y, expected) <= (2.01 if cast_first else 4.0 if dtype == "float32" else 1.01)
    assert total is None or np.array_equal(total, expected_total)
    (row,) = json.loads(answers[3])
    assert (row["operator"], row["width"], row["dtype"]) == (op_type, width, dtype)
    assert (row["architectures"], row["generic"]) == ([86, 89], False)


@needs_library
@pytest.mark.parametrize("case", [case for case in CASES if case[2] < 2000], ids=lambda c: "-".join(map(str, c)))
def test_without_nvrtc_the_generic_kernel_runs(driver: HostDriver, tmp_path: Path, case: tuple) -> None:
    answers, y, expected, total, expected_total, _ = run_norm(driver, tmp_path, case, nvrtc=False)  # type: ignore[arg-type]
    assert json.loads(answers[3])[0]["generic"] is True
    assert answers[6] == "load generic\n0"
    assert answers[7].startswith(f"launch generic_{contract.KERNEL_OPS[case[0]]}_{case[1]} grid {case[3]} block 256")
    assert ulps(y, expected) <= (2.01 if case[5] else 4.0 if case[1] == "float32" else 1.01)
    assert total is None or np.array_equal(total, expected_total)


@needs_library
def test_a_gpu_that_the_engine_has_no_kernel_for_gets_the_generic_one(driver: HostDriver, tmp_path: Path) -> None:
    answers, y, expected, *_ = run_norm(driver, tmp_path, CASES[0], RMSNORM_TEST_GPU="80")
    assert answers[6] == "load generic\n0"
    assert ulps(y, expected) <= 4.0
    later, y, expected, *_ = run_norm(driver, tmp_path, CASES[0], RMSNORM_TEST_GPU="120")
    assert later[6] == "load sm_89\n0"  # PTX runs on what came later
    assert ulps(y, expected) <= 4.0


@needs_library
def test_the_layout_follows_the_rows(driver: HostDriver, tmp_path: Path) -> None:
    """The host's GPU has 4 multiprocessors, and a block has 4 rows: 16 rows are few and 17 are many."""
    launches = {}
    for rows in (16, 17):
        answers, y, expected, *_ = run_norm(driver, tmp_path, ("RMSNorm", "float16", 64, rows, 0, False, 89))
        launches[rows] = answers[7].splitlines()[0]
        assert ulps(y, expected) <= 1.01
    kernel = kernel_of("RMSNorm", "float16", 64, 1e-5, 0.0, 1)
    for rows, few in ((16, 1), (17, None)):
        config = choose(kernel, few, 89)
        assert f"grid {config.grid(rows)} block {config.block} " in launches[rows]


@needs_library
@pytest.mark.parametrize(("gpu", "overlapping"), [("86", ""), ("90", "overlapping ")])
def test_kernels_that_wait_for_the_one_before_may_overlap_with_it(
    driver: HostDriver, tmp_path: Path, gpu: str, overlapping: str
) -> None:
    case = ("AddRMSNorm", "float16", 8192, 1, 0, False, int(gpu))
    answers, y, expected, *_ = run_norm(driver, tmp_path, case, RMSNORM_DEPLOY_ARCHITECTURES=gpu)
    config = choose(kernel_of("AddRMSNorm", "float16", 8192, 1e-5, 0.0, 1), 1, int(gpu), multiprocessors=4)
    launched = f"{overlapping}launch add_rms_norm grid {config.grid(1)} block {config.block} cluster {config.cluster} "
    assert answers[7].startswith(launched)
    assert ulps(y, expected) <= 1.01


@needs_library
def test_no_rows_launch_nothing(driver: HostDriver, tmp_path: Path) -> None:
    answers, y, *_ = run_norm(driver, tmp_path, ("RMSNorm", "float16", 64, 0, 0, False, 89))
    assert answers[7] == "0"
    assert y.size == 0


@needs_library
def test_kernels_are_loaded_once_for_equal_norms(driver: HostDriver, tmp_path: Path) -> None:
    shapes = "1 2,64 1 64"
    (tmp_path / "in").write_bytes(bytes(2 * 64 * 2 + 64 * 2))
    norm = [f"create RMSNorm runtime {FIELDS} kernels=saved", f"shape {shapes}",
            f"enqueue {shapes} {tmp_path / 'in'} {tmp_path / 'out'}"]  # fmt: skip
    answers = driver.run([f"create RMSNorm build {FIELDS}", f"configure {shapes}", "serialize", *norm, *norm])
    assert "\n".join(answers).count("load ") == 1
    assert "\n".join(answers).count("launch ") == 2


@needs_library
def test_equal_norms_are_compiled_once(driver: HostDriver) -> None:
    one = [f"create RMSNorm build {FIELDS}", "configure 1 -1,64 1 64", "configure 1 -1,64 1 64", "serialize"]
    answers = driver.run([*one, *one, "create RMSNorm build epsilon=1e-6 scale_offset=0 scale_type=1",
                          "configure 1 -1,64 1 64", "kernels"])  # fmt: skip
    assert len(json.loads(answers[-1])) == 2


@needs_library
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("scale_offset=0 scale_type=1", "attribute epsilon is missing"),
        ("epsilon=1e-5 scale_type=1", "attribute scale_offset is missing"),
        ("epsilon=1e-5 scale_offset=0", "attribute scale_type is missing"),
        ("epsilon=-1 scale_offset=0 scale_type=1", "epsilon: expected a finite number of at least 0, got -1"),
        ("epsilon=nan scale_offset=0 scale_type=1", "epsilon: expected a finite number of at least 0, got"),
        ("epsilon=inf scale_offset=0 scale_type=1", "epsilon: expected a finite number of at least 0, got inf"),
        ("epsilon=1e-5 scale_offset=0.5 scale_type=1", "scale_offset: expected 0 or 1, got 0.5"),
        ("epsilon=1e-5 scale_offset=0 scale_type=11", "scale_type: expected one of 1 (float32), 10 (float16), 16 (bf"),
    ],
)
def test_wrong_attributes_are_refused(driver: HostDriver, fields: str, message: str) -> None:
    made, error = driver.run([f"create RMSNorm build {fields}", "error"])
    assert made == "refused"
    assert error.startswith("a_node (RMSNorm): " + message)


@needs_library
@pytest.mark.parametrize(
    ("op_type", "command", "failed", "message"),
    [
        ("RMSNorm", "types 1 0", "-1: 0", "expected inputs of one dtype"),
        ("RMSNorm", "types 8 8", "-1: 0", "x: expected float32, float16 or bfloat16, got TensorRT's data type 8"),
        ("RMSNorm", "types 1", "-1: 0", "expected 2 inputs and 1 outputs, got 1 and 1"),
        ("RMSNorm", "dims scalar 64", "-1:", "x: expected at least one dim, got none"),
        ("RMSNorm", "dims 2,64 1,64", "-1:", "scale: expected one dim, got 2"),
        ("AddRMSNorm", "dims 2,64 64 64", "-1:", "residual: expected x's 2 dims, got 1"),
        ("RMSNorm", "configure 1 2,-1 1 64", "-1", "x: expected a static last dim when the engine is built"),
        ("RMSNorm", "configure 1 2,64 1 63", "-1", "scale: expected shape (64), got (63)"),
        ("RMSNorm", "configure 1 2,65537 1 65537", "-1", "x: expected a width of at most 65536, got 65537"),
        ("AddRMSNorm", "configure 1 2,64 1 3,64 1 64", "-1", "residual: expected x's shape (2, 64), got (3, 64)"),
        ("RMSNorm", "shape 1 2,64 1 64", "-1", "the engine has no kernels"),
        ("RMSNorm", "enqueue 1 2,64 1 64 /dev/null /dev/null", "-1", "the engine has no kernels"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(
    driver: HostDriver, op_type: str, command: str, failed: str, message: str
) -> None:
    _, answer, error = driver.run([f"create {op_type} build {FIELDS}", command, "error"])
    assert answer.startswith(failed)
    assert message in error


@needs_library
def test_a_scale_type_that_does_not_fit_x_is_refused(driver: HostDriver) -> None:
    fields = "epsilon=1e-5 scale_offset=0 scale_type=16"
    _, types, configured, error = driver.run(
        [f"create RMSNorm build {fields}", "types 1 1", "configure 1 2,64 1 64", "error"]
    )
    assert types.startswith("-1")
    assert configured == "-1"
    assert "scale_type: expected 1 or 10 for x of float16, got 16" in error


@needs_library
@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ("", "field kernels is missing, so the engine has no kernel"),
        ("kernels=RMSNORM1abc", "packed kernels: expected 4 more bytes, got 3"),
        ("kernels=somethingelse", "packed kernels: expected RMSNORM1 at the beginning"),
    ],
)
def test_an_engine_with_damaged_kernels_is_refused(driver: HostDriver, kernels: str, message: str) -> None:
    made, error = driver.run([f"create RMSNorm runtime {FIELDS} {kernels}", "error"])
    assert made == "refused"
    assert message in error


@needs_library
def test_an_engine_for_another_width_is_refused(driver: HostDriver) -> None:
    answers = driver.run([
        f"create RMSNorm build {FIELDS}", "configure 1 2,64 1 64", "serialize",
        f"create RMSNorm runtime {FIELDS} kernels=saved", "shape 1 2,32 1 32", "error",
    ])  # fmt: skip
    assert answers[4] == "-1"
    assert "the engine has kernels for width 64 of float16, and x has width 32 of float16" in answers[5]


@needs_library
def test_failures_of_compiler_and_driver_are_reported(driver: HostDriver, tmp_path: Path) -> None:
    build = [f"create RMSNorm build {FIELDS}", "configure 1 2,64 1 64", "error"]
    failed = driver.run(build, RMSNORM_TEST_FAIL_COMPILE="1")
    assert failed[1] == "-1"
    assert "NVRTC failed to compile rms_norm of width 64 for sm_86: a planted error" in failed[2]
    unknown = driver.run(build, RMSNORM_DEPLOY_ARCHITECTURES="86,91")
    assert unknown[1] == "-1"
    assert "NVRTC 13.0 does not support sm_91" in unknown[2]
    run = ["serialize", f"create RMSNorm runtime {FIELDS} kernels=saved", "shape 1 2,64 1 64", "error"]
    unloaded = driver.run([*build[:2], *run], RMSNORM_TEST_FAIL_LOAD="1")
    assert unloaded[4] == "-1"
    assert "loading the engine's kernel: the CUDA driver returned CUDA_ERROR_NO_BINARY_FOR_GPU" in unloaded[5]
    no_context = driver.run([*build[:2], *run], RMSNORM_TEST_CONTEXT="0")
    assert no_context[4] == "-1"
    assert "no CUDA context is current" in no_context[5]


@needs_library
def test_the_registering_library_says_what_is_missing(built_library: BuiltLibrary) -> None:
    """Without TensorRT in the process, and with one of another major version, it registers nothing and says so."""
    opened = f"print(ctypes.CDLL({str(built_library.registering)!r}).rmsnorm_deploy_registered())"
    alone = subprocess.run(
        [sys.executable, "-c", f"import ctypes; {opened}"], capture_output=True, text=True, check=True
    )
    assert alone.stdout.strip() == "0"
    assert "TensorRT is not loaded in this process" in alone.stderr
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install 'rmsnorm-deploy[rtx]'")
    # RTX 1.7 is another major version than the headers' 10.14.
    command = [sys.executable, "-c", f"import ctypes, tensorrt_rtx; {opened}"]
    other = subprocess.run(command, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == "0"
    assert "[rmsnorm_deploy] error: registering: " in other.stderr


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(library, "_HEADER_PLACES", ())
    monkeypatch.setattr(library, "_find_nvcc", lambda: None)
    with pytest.raises(EnvironmentMissingError, match=r"missing: TensorRT's headers .*, nvcc, cmake, a C.. compiler"):
        library.build_library(tmp_path / "out")
    with pytest.raises(UsageError, match=r"--tensorrt-include: expected a folder with NvInferRuntime\.h"):
        library.find_toolchain(tmp_path)
    with pytest.raises(UsageError, match="--nvcc: expected the CUDA compiler"):
        library.find_toolchain(nvcc=tmp_path / "nvcc")
    assert not (tmp_path / "out").exists()


def test_other_files_are_no_library(tmp_path: Path) -> None:
    file = tmp_path / "x.so"
    with pytest.raises(UsageError, match=r"x\.so does not exist"):
        library.read_library(file)
    file.write_text("no library")
    with pytest.raises(UsageError, match="not a library of rmsnorm-deploy"):
        library.read_library(file)
