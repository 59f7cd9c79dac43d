"""One weight at a time gives what ONNX Runtime's quantizer makes of a whole model, byte for byte."""

from __future__ import annotations

import logging
import sys
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from rmsnorm_deploy.export.lowering import weight_quantizer
from rmsnorm_deploy.export.lowering.weight_quantizer import (
    SCHEMES,
    QuantizedMatrix,
    Scheme,
    check_quantize,
    import_quantizer,
    parse_quantize,
)
from rmsnorm_deploy.models.errors import EnvironmentMissingError, UnsupportedError, UsageError


def whole(matrix: np.ndarray, scheme: Scheme) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The attributes and constants of the node that the quantizer makes of a model with this weight."""
    x = helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(matrix.dtype), [None, matrix.shape[0]])
    y = helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(matrix.dtype), [None, matrix.shape[1]])
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(matrix, "w")])
    quantizer = MatMulNBitsQuantizer(
        helper.make_model(graph), bits=scheme.bits, block_size=scheme.block_size, is_symmetric=scheme.symmetric,
        accuracy_level=scheme.accuracy_level,
    )  # fmt: skip
    quantizer.process()
    made: onnx.GraphProto = quantizer.model.model.graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.initializer}
    attributes = {row.name: helper.get_attribute_value(row) for row in made.node[0].attribute}
    return attributes, [tensors[name] for name in made.node[0].input[1:]]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("scheme", [*SCHEMES.values(), Scheme("zero points", 4, symmetric=False)], ids=lambda s: s.name)
@pytest.mark.parametrize("shape", [(64, 10), (50, 7), (5, 3)], ids=str)
def test_slices_of_a_weight_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], scheme: Scheme, dtype: type
) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    monkeypatch.setattr(weight_quantizer, "_SLICE", 3 * matrix[:, 0].nbytes)
    found = QuantizedMatrix("w", lambda: matrix.T.copy().T, scheme)
    attributes, constants = whole(matrix, scheme)
    assert found.attributes == attributes
    for (suffix, (kind, size)), wanted in zip(found.parts.items(), constants, strict=True):
        got = found.read(suffix)
        assert (got.dtype, got.shape, kind, size) == (wanted.dtype, wanted.shape, wanted.dtype, wanted.shape)
        np.testing.assert_array_equal(got, wanted)


def test_parts_can_be_read_again() -> None:
    matrix = np.random.default_rng(0).standard_normal((32, 4)).astype(np.float32)
    found = QuantizedMatrix("w", lambda: matrix, SCHEMES["int4"])
    first = [found.read(suffix) for suffix in found.parts]
    again = [found.read(suffix) for suffix in reversed(found.parts)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_failing_quantizer_is_named_with_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no\n luck")

    monkeypatch.setattr(MatMulNBitsQuantizer, "process", fail)
    with pytest.raises(UnsupportedError, match=r"onnxruntime \S+ failed on the weight head \(32x1, float32\): no luck"):
        QuantizedMatrix("head", lambda: np.ones((32, 4), np.float32), SCHEMES["int4"])


def test_the_import_does_not_set_up_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    monkeypatch.delitem(sys.modules, "onnxruntime.quantization.matmul_nbits_quantizer")
    monkeypatch.setattr(root, "handlers", [])
    import_quantizer()
    assert (root.handlers, root.level) == ([], level)
    monkeypatch.undo()
    assert root.handlers == before


def test_a_missing_quantizer_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization.matmul_nbits_quantizer", None)
    with pytest.raises(EnvironmentMissingError, match=r"cannot be imported.*pip install \"rmsnorm-deploy\[cpu\]\""):
        check_quantize(SCHEMES["int4"], ["ort"])


def test_what_cannot_be_quantized_is_refused() -> None:
    assert parse_quantize(None) is None
    with pytest.raises(UsageError, match=r"quantize: expected one of int4, int8, got 'int3'\."):
        parse_quantize("int3")
    with pytest.raises(UnsupportedError, match=r"which TensorRT does not have.*Use --target ort"):
        check_quantize(SCHEMES["int8"], ["ort", "plugin"])
    with pytest.raises(UnsupportedError, match=r"no MatMulNBits for bfloat16, expected float32 or float16"):
        check_quantize(SCHEMES["int8"], ["ort"], "bfloat16")
    check_quantize(SCHEMES["int4"], ["primitives", "standard", "ort"], "float16")
