"""Norms with a quantized output in TensorRT: the library's numbers on the host, its refusals, and real builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from rmsnorm_deploy.models.errors import RmsnormDeployError, UnsupportedError, UsageError
from rmsnorm_deploy.plugins import contract
from rmsnorm_deploy.plugins.kernel.compiler import compile_kernel
from rmsnorm_deploy.plugins.kernel.launch_config import choose
from rmsnorm_deploy.plugins.tensorrt.images import KernelImages, compile_images, kernel_of, unpack
from rmsnorm_deploy.runtime.rewriting.rewrite_file import rewrite_model
from rmsnorm_deploy.runtime.tensorrt.build import build_engine
from tests.helpers.plugins import plugin_library
from tests.helpers.plugins.plugin_library import NUMPY, TENSORRT_TYPES, BuiltLibrary, HostDriver, reference

needs_library = pytest.mark.skipif(plugin_library.missing() is not None, reason=str(plugin_library.missing()))
Array = NDArray[Any]
# TensorRT's numbers of data types.
QUANT_TYPES = {"int8": 2, "float8_e4m3": 6}
QUANT_NUMPY: dict[str, Any] = {"int8": np.int8, "float8_e4m3": ml_dtypes.float8_e4m3fn}
FIELDS = "epsilon=1e-5 scale_offset=0 scale_type=1"
# ULPs of y that the kernel may be off before y is quantized.
LIMITS = {"float32": 4, "float16": 1, "bfloat16": 1}
QUANTIZED = list(contract.UNQUANTIZED)


@pytest.fixture(scope="module")
def driver(built_library: BuiltLibrary, tmp_path_factory: pytest.TempPathFactory) -> HostDriver:
    return HostDriver(built_library, tmp_path_factory.mktemp("host"))


def quantized(y: Array, scale: np.float32, quant: str) -> Array:
    """QuantizeLinear of the cast to float32, in float64's view of the result."""
    with np.errstate(over="ignore"):
        ratio = y.astype(np.float32) / scale
    if quant == "int8":
        return np.clip(np.rint(ratio), -128, 127).astype(np.int8)
    return np.clip(ratio, -448, 448).astype(ml_dtypes.float8_e4m3fn)


def moved(y: Array, ulps: int, towards: float) -> Array:
    """y as its dtype has it some steps further up or down."""
    for _ in range(ulps):
        y = np.nextafter(y, np.asarray(towards, y.dtype))
    return y


# The library on the host ------------------------------------------------------------------------------------------

CASES = [
    # op, dtype, width, rows, offset, scale multiplied in x's dtype
    ("RMSNormQuant", "float32", 64, 3, 0, False),
    ("RMSNormQuant", "float16", 4096, 2, 0, True),
    ("RMSNormQuant", "bfloat16", 80, 9, 1, False),
    ("RMSNormQuant", "float16", 33, 5, 1, True),
    ("AddRMSNormQuant", "float32", 1000, 3, 1, False),
    ("AddRMSNormQuant", "float16", 256, 7, 0, False),
    ("AddRMSNormQuant", "bfloat16", 3072, 2, 0, True),
]


def run_norm(
    driver: HostDriver, folder: Path, case: tuple[Any, ...], quant: str, y_scale: float, **settings: Any
) -> tuple[list[str], Array, Array, Array | None, Array]:
    """Build, serialize, load again and launch: the answers, q, y as it should be, the sum, and what that should be."""
    op_type, dtype, width, rows, offset, cast_first = case
    rng = np.random.default_rng(width + rows)
    kind = NUMPY[dtype]
    adds = op_type == "AddRMSNormQuant"
    x = (rng.standard_normal((rows, width)) * 3).astype(kind)
    residual = rng.standard_normal((rows, width)).astype(kind) if adds else None
    scale = (rng.standard_normal(width) * 0.5 + 1).astype(kind)
    given = [array for array in (x, residual, scale, np.array(y_scale, np.float32)) if array is not None]
    (folder / "in").write_bytes(b"".join(array.tobytes() for array in given))
    number = TENSORRT_TYPES[dtype]
    shapes = " ".join([f"{number} {rows},{width}"] * (1 + adds) + [f"{number} {width}", "0 scalar"])
    scale_type = contract.ONNX_TYPES[dtype] if cast_first else 1
    fields = f"epsilon=1e-5 scale_offset={offset} scale_type={scale_type} quant_type={contract.QUANT_TYPES[quant]}"
    answers = driver.run_engine_cycle(op_type, fields, shapes, folder, **settings)
    content = (folder / "out").read_bytes() if (folder / "out").exists() else b""
    size = rows * width
    q = np.frombuffer(content[:size], QUANT_NUMPY[quant]).reshape(-1, width)
    total = np.frombuffer(content[size:], kind).reshape(-1, width) if adds else None
    y, expected_total = reference(x, scale, residual, 1e-5, offset, cast_first)
    return answers, q, y, total, expected_total


@needs_library
@pytest.mark.parametrize("quant", contract.QUANT_TYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_an_engines_norm_is_quantized_as_by_quantize_linear(
    driver: HostDriver, tmp_path: Path, case: tuple[Any, ...], quant: str
) -> None:
    op_type, dtype, width, _, _, cast_first = case
    y_scale = 0.021 if quant == "int8" else 0.0071  # the largest values are out of range
    answers, q, y, total, expected_total = run_norm(driver, tmp_path, case, quant, y_scale)
    assert answers[:2] == ["made", "0"]
    assert answers[4:7] == ["made", "made", "load sm_89\n0"]
    launched, status = answers[7].splitlines()
    assert (launched.split()[1], status, answers[8]) == (contract.KERNEL_OPS[op_type], "0", "")
    scale = np.float32(y_scale)
    expected = quantized(y, scale, quant)
    ulps = LIMITS[dtype] + cast_first
    lowest, highest = (quantized(moved(y, ulps, end), scale, quant).astype(np.float32) for end in (-np.inf, np.inf))
    values = q.astype(np.float32)
    sure = lowest == highest  # elsewhere y is within its rounding of a tie
    assert np.array_equal(values[sure], expected.astype(np.float32)[sure])
    assert np.all((lowest <= values) & (values <= highest))
    assert np.mean(values == expected.astype(np.float32)) > (0.95 if dtype == "bfloat16" else 0.99)
    assert np.abs(values).max() == (448 if quant == "float8_e4m3" else 128 if values.min() == -128 else 127)
    assert total is None or np.array_equal(total, expected_total)
    (row,) = json.loads(answers[3])
    assert (row["operator"], row["width"], row["dtype"], row["quantized"]) == (op_type, width, dtype, quant)
    assert (row["architectures"], row["generic"]) == ([86, 89], False)


@needs_library
@pytest.mark.parametrize("op_type", QUANTIZED)
@pytest.mark.parametrize("quant", contract.QUANT_TYPES)
def test_every_function_answers_for_a_quantized_output(driver: HostDriver, op_type: str, quant: str) -> None:
    inputs, outputs = len(contract.INPUTS[op_type]), len(contract.OUTPUTS[op_type])
    like_x, number, kind = inputs - 1, contract.QUANT_TYPES[quant], QUANT_TYPES[quant]
    rest = ["1 0"] * (outputs - 1)
    tensors = " ".join(["1 -1,-1,64"] * (like_x - 1) + ["1 64", "0 scalar"])
    dims = " ".join(["2,3,64"] * (like_x - 1) + ["64", "scalar"])
    answers = driver.run([
        f"create {op_type} build epsilon=1e-5 scale_offset=1 scale_type=10 quant_type={number}",
        "describe",
        "types " + " ".join(["1"] * like_x + ["0"]),
        f"dims {dims}",
        "formats " + " ".join(["1 0"] * like_x + ["0 0", f"{kind} 0", *rest]),
        "formats " + " ".join(["1 0"] * like_x + ["1 0", "1 0", *rest]),
        "formats " + " ".join(["1 0"] * like_x + ["0 4", f"{kind} 4", *rest]),
        "clone",
        f"configure {tensors}",
        "serialize",
        "attach",
        "describe",
    ])  # fmt: skip
    described = f"{op_type} 1 rmsnorm_deploy {outputs} 0 100 0 0 0x1.4f8b58p-17-1-10-{number}"
    assert answers[:4] == ["made", described, f"0: {kind}" + " 1" * (outputs - 1), "0:" + " 2,3,64" * outputs]
    good, tail = "1" * like_x, "1" * (outputs - 1)
    assert answers[4:7] == [good + "11" + tail, good + "00" + tail, good + "00" + tail]
    assert answers[7:9] == ["made", "0"]
    *plain, kernels = answers[9].split()
    assert plain == ["epsilon/1/1", "scale_offset/1/1", "scale_type/5/1", "quant_type/5/1"]
    assert kernels.startswith("kernels/3/")
    assert answers[10:] == ["made", described]


@needs_library
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (FIELDS, "attribute quant_type is missing"),
        (f"{FIELDS} quant_type=2", "quant_type: expected one of 3 (int8), 17 (float8_e4m3), got 2"),
        ("scale_offset=0 scale_type=1 quant_type=3", "attribute epsilon is missing"),
    ],
)
def test_wrong_attributes_are_refused(driver: HostDriver, fields: str, message: str) -> None:
    made, error = driver.run([f"create RMSNormQuant build {fields}", "error"])
    assert made == "refused"
    assert error == f"a_node (RMSNormQuant): {message}"


@needs_library
@pytest.mark.parametrize(
    ("op_type", "command", "failed", "message"),
    [
        ("RMSNormQuant", "types 1 1 1", "-1:", "y_scale: expected float32, got TensorRT's data type 1"),
        ("RMSNormQuant", "types 1 1", "-1:", "expected 3 inputs and 1 outputs, got 2 and 1"),
        ("AddRMSNormQuant", "types 1 0 1 0", "-1:", "expected inputs of one dtype"),
        ("RMSNormQuant", "dims 2,64 64 1,1", "-1:", "y_scale: expected one element, got 2 dims"),
        ("AddRMSNormQuant", "dims 2,64 64 64 scalar", "-1:", "residual: expected x's 2 dims, got 1"),
        ("RMSNormQuant", "configure 1 2,64 1 64 1 1", "-1", "y_scale: expected float32, got TensorRT's data type 1"),
        ("RMSNormQuant", "configure 1 2,64 1 64 0 64", "-1", "y_scale: expected one element, got shape (64)"),
        ("RMSNormQuant", "configure 1 2,64 1 63 0 1", "-1", "scale: expected shape (64), got (63)"),
        ("AddRMSNormQuant", "configure 1 2,64 1 3,64 1 64 0 1", "-1", "residual: expected x's shape (2, 64), got (3,"),
        ("RMSNormQuant", "shape 1 2,64 1 64 0 1", "-1", "the engine has no kernels"),
    ],
)  # fmt: skip
def test_what_the_kernel_cannot_do_is_refused(
    driver: HostDriver, op_type: str, command: str, failed: str, message: str
) -> None:
    _, answer, error = driver.run([f"create {op_type} build {FIELDS} quant_type=3", command, "error"])
    assert answer.startswith(failed)
    assert message in error


@needs_library
def test_no_generic_kernel_stands_in(driver: HostDriver, tmp_path: Path) -> None:
    """Without NVRTC, and for a GPU that no image fits, a quantized norm is refused."""
    create, shapes = f"create RMSNormQuant build {FIELDS} quant_type=3", "1 2,64 1 64 0 1"
    without = driver.run([create, f"configure {shapes}", "error"], nvrtc=False)
    assert without[1] == "-1"
    assert "NVRTC is not found" in without[2]
    assert "rms_norm of width 64 has a quantized output, which the generic kernel does not support" in without[2]
    answers, *_ = run_norm(driver, tmp_path, CASES[0], "int8", 0.02, RMSNORM_TEST_GPU="80")
    assert answers[6] == "-1"
    assert answers[7] == "-1"
    assert "no kernel for this GPU (sm_80), and the generic kernel does not support a quantized output" in answers[8]


@needs_library
def test_an_engine_for_another_quantized_type_is_refused(driver: HostDriver) -> None:
    shapes = "1 2,64 1 64 0 1"
    answers = driver.run([
        f"create RMSNormQuant build {FIELDS} quant_type=3", f"configure {shapes}", "serialize",
        f"create RMSNormQuant runtime {FIELDS} quant_type=17 kernels=saved", f"shape {shapes}", "error",
    ])  # fmt: skip
    assert answers[4] == "-1"
    assert "the engine has kernels for a quantized type of int8, and the plugin's is float8_e4m3" in answers[5]


# The kernels in Python --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", contract.QUANT_TYPES)
@pytest.mark.parametrize("op_type", QUANTIZED)
def test_kernels_are_packed_with_their_quantized_type(op_type: str, quant: str) -> None:
    pytest.importorskip("cuda.bindings", reason="needs NVRTC: pip install 'rmsnorm-deploy[kernel]'")
    number = contract.QUANT_TYPES[quant]
    kernel = kernel_of(op_type, "float16", 4096, 1e-6, 1.0, 10, number)
    assert (kernel.quantized, kernel.quantization, kernel.op) == (quant, "static", contract.KERNEL_OPS[op_type])
    images = compile_images(kernel, (80, 89))
    assert images.quant_type == number
    assert unpack(images.pack()) == images


@pytest.mark.parametrize("architecture", [75, 80, 86, 89, 90, 100, 120])
def test_float8_compiles_for_every_architecture(architecture: int) -> None:
    pytest.importorskip("cuda.bindings", reason="needs NVRTC: pip install 'rmsnorm-deploy[kernel]'")
    kernel = kernel_of("AddRMSNormQuant", "bfloat16", 4096, 1e-6, 0.0, 16, contract.QUANT_TYPES["float8_e4m3"])
    compiled = compile_kernel(kernel, choose(kernel, None, architecture), architecture, "cubin")
    assert compiled.image.startswith(b"\x7fELF")


def test_packed_kernels_of_an_unknown_quantized_type_are_refused() -> None:
    with pytest.raises(UsageError, match="packed kernels: unknown quantized data type 5"):
        unpack(KernelImages(64, "float16", (), 5).pack())


def test_a_quantized_type_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match=r"RMSNormQuant: quant_type: expected one of 3 \(int8\), 17 .*, got 2"):
        kernel_of("RMSNormQuant", "float16", 64, 1e-6, 0.0, 1, 2)
    with pytest.raises(UsageError, match="RMSNormQuant: attribute quant_type is missing"):
        kernel_of("RMSNormQuant", "float16", 64, 1e-6, 0.0, 1)
    assert kernel_of("RMSNorm", "float16", 64, 1e-6, 0.0, 1).quantized == "none"


# Real builds ------------------------------------------------------------------------------------------------------

WIDTH = 64


def layer(quant: str, path: Path, y_scale: Array | None = None, kind: int = TensorProto.FLOAT16) -> Path:
    """Residual add + norm + QuantizeLinear, DequantizeLinear, MatMul, the norm in the plugin's form already."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    rng = np.random.default_rng(1)
    zero = np.zeros((), QUANT_NUMPY[quant])
    weights = {
        "scale": rng.uniform(0.5, 1.5, WIDTH).astype(dtype), "zero": zero, "s": np.array(0.03, dtype),
        "w": rng.standard_normal((WIDTH, WIDTH)).astype(dtype),
    }  # fmt: skip
    values = {"epsilon": 1e-5, "scale_offset": 0.0, "scale_type": 1, **contract.PARSER_ATTRIBUTES}
    if y_scale is None:
        norms = [
            helper.make_node("AddRMSNorm", ["x", "r", "scale"], ["n", "sum"], "norm", domain=contract.DOMAIN, **values),
            helper.make_node("QuantizeLinear", ["n", "s", "zero"], ["q"], "quantize"),
        ]
    else:
        weights |= {"y_scale": y_scale} if y_scale.size else {}
        values["quant_type"] = contract.QUANT_TYPES[quant]
        inputs = ["x", "r", "scale", "y_scale"]
        norms = [helper.make_node("AddRMSNormQuant", inputs, ["q", "sum"], "norm", domain=contract.DOMAIN, **values)]
    nodes = [
        *norms,
        helper.make_node("DequantizeLinear", ["q", "s"], ["d"], "dequantize"),
        helper.make_node("MatMul", ["d", "w"], ["m"], "matmul"),
        helper.make_node("Add", ["m", "sum"], ["y"], "add"),
    ]
    rows = [helper.make_tensor_value_info(name, kind, ["rows", WIDTH]) for name in ("x", "r", "y")]
    if y_scale is not None and not y_scale.size:  # it comes at run time
        rows.insert(2, helper.make_tensor_value_info("y_scale", TensorProto.FLOAT, []))
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "graph", rows[:-1], rows[-1:], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(contract.DOMAIN, contract.DOMAIN_VERSION)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.fixture(scope="module", params=list(contract.QUANT_TYPES))
def fused(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A file whose norm was made one operator with its quantization."""
    folder = tmp_path_factory.mktemp(request.param)
    source = layer(request.param, folder / "model.onnx")
    return request.param, rewrite_model(source, folder / "out", target="plugin", verify=False).model


def options(kind: str, request: pytest.FixtureRequest, *architectures: int) -> dict[str, Any]:
    pytest.importorskip("tensorrt_rtx", reason="needs the builder: pip install 'rmsnorm-deploy[rtx]'")
    if kind == "python":
        return {"architectures": architectures, "plugin": "python"}
    built: BuiltLibrary = request.getfixturevalue("built_library")
    return {"architectures": architectures, "plugin": "library", "plugin_library": str(built.path)}


@pytest.mark.parametrize("kind", ["python", "library"])
def test_an_engine_runs_the_norm_with_a_quantized_output(
    fused: tuple[str, Path], kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    quant, source = fused
    assert next(node.op_type for node in onnx.load(source).graph.node) == "AddRMSNormQuant"
    record = build_engine(source, tmp_path / "x.engine", **options(kind, request, 89)).record
    (norm,) = record["norms"]
    assert record["plugin_layers"] == len(record["norms"]) == 1
    assert (norm["plugin"], norm["form"], norm["precision"], norm["statistics"]) == (
        True,
        "residual_add",
        quant,
        "float32",
    )
    (kernel,) = record["kernels"]
    assert (kernel["operator"], kernel["quantized"], kernel["architectures"]) == ("AddRMSNormQuant", quant, [89])


def test_tensorrts_own_layers_run_the_function(
    fused: tuple[str, Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """With the plugin or without, the result is quantized: the parser knows the function's data type."""
    quant, source = fused
    record = build_engine(source, tmp_path / "x.engine", norm="native", **options("python", request, 89)).record
    (norm,) = record["norms"]
    assert (record["plugin_layers"], norm["plugin"]) == (0, False)
    assert (norm["precision"], norm["statistics"]) == (quant, "float32")


@pytest.mark.parametrize("kind", ["python", "library"])
def test_float8_below_ada_is_tensorrts_own_refusal(
    fused: tuple[str, Path], kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    quant, source = fused
    if quant == "int8":
        record = build_engine(source, tmp_path / "x.engine", **options(kind, request, 80)).record
        assert record["norms"][0]["precision"] == "int8"
        return
    with pytest.raises(RmsnormDeployError, match="Cannot compile for target"):
        build_engine(source, tmp_path / "x.engine", **options(kind, request, 80))


@pytest.mark.parametrize(
    ("y_scale", "message"),
    [
        (np.array(0.03, np.float16), "y_scale: expected float32, got ONNX data type 10"),
        (np.full(WIDTH, 0.03, np.float32), r"y_scale: expected one element, got shape \(64,\)"),
    ],
)
def test_another_scale_of_the_output_is_refused(
    y_scale: Array, message: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = layer("int8", tmp_path / "model.onnx", y_scale)
    with pytest.raises(UnsupportedError, match=message):
        build_engine(source, tmp_path / "x.engine", **options("python", request, 89))


@pytest.mark.parametrize("y_scale", [np.array([0.03], np.float32), np.zeros(0)], ids=["one element", "at run time"])
def test_a_file_without_notes_has_its_norm_in_the_record(
    y_scale: Array, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = layer("int8", tmp_path / "model.onnx", y_scale)
    record = build_engine(source, tmp_path / "x.engine", **options("python", request, 89)).record
    (norm,) = record["norms"]
    assert (record["plugin_layers"], norm["path"], norm["form"], norm["plugin"]) == (1, "norm", "residual_add", True)
