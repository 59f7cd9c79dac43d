"""ONNX Runtime's own quantizer of the weights of matrix products, for one weight at a time (`QuantizedMatrix`).

The quantizer takes a whole model, whose weights are then all in memory, and writes nodes with subgraphs anew without
their metadata. Here it gets models of one MatMul with some columns of one weight. Columns are quantized independently,
so that the result is that of the whole weight, byte for byte.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ...models.errors import EnvironmentMissingError, UnsupportedError, UsageError
from ...models.versions import installed_version, too_old
from ...models.weights.mapped_file import release_pages

OPERATOR: Final = "MatMulNBits"
DOMAIN: Final = "com.microsoft"
# The lowest version that runs the operator with 4 and 8 bits on the CPU, of those that this package supports.
LOWEST_ONNXRUNTIME: Final = "1.23"
# The dtypes of the other factor for which ONNX Runtime's CPU provider has a kernel.
DTYPES: Final = ("float32", "float16")
# Bytes of a weight that are quantized at a time.
_SLICE = 32 << 20
_MODULE = "onnxruntime.quantization.matmul_nbits_quantizer"
_OPSET = 21


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights are quantized.

    Attributes:
        name: the name on the command line, and of the profile that limits what the file may lose.
        bits: of each element.
        block_size: the number of elements of a column that have a scale together.
        symmetric: without zero points.
        accuracy_level: 4 quantizes the other factor to int8 in blocks, when the product is computed.
    """

    name: str
    bits: int
    block_size: int = 32
    symmetric: bool = True
    accuracy_level: int = 4


SCHEMES: Final[dict[str, Scheme]] = {row.name: row for row in (Scheme("int4", 4), Scheme("int8", 8))}


def parse_quantize(text: str | None) -> Scheme | None:
    """The scheme that a text names; None for None.

    Raises:
        UsageError: it names none.
    """
    if text is None or text in SCHEMES:
        return None if text is None else SCHEMES[text]
    raise UsageError(f"quantize: expected one of {', '.join(SCHEMES)}, got {text!r}.")


def check_quantize(scheme: Scheme | None, targets: Iterable[str], dtype: str | None = None) -> None:
    """Refuse what cannot be quantized, before slow work.

    Args:
        scheme: how; nothing is checked when None.
        targets: the targets of the export.
        dtype: the dtype of the model, or None where it is not known yet.

    Raises:
        UnsupportedError: a target is for TensorRT, or ONNX Runtime has no kernel for the dtype.
        EnvironmentMissingError: ONNX Runtime's quantizer cannot be imported.
    """
    if scheme is None:
        return
    if "plugin" in targets:
        raise UnsupportedError(
            f"quantize: {scheme.name} weights are read by {DOMAIN}::{OPERATOR}, which TensorRT does not have, and "
            "target plugin is for TensorRT. Use --target ort for ONNX Runtime; for TensorRT, omit --quantize and "
            "quantize the exported file with QuantizeLinear and DequantizeLinear (NVIDIA's Model Optimizer)."
        )
    if dtype is not None and dtype not in DTYPES:
        raise UnsupportedError(
            f"quantize: ONNX Runtime's CPU provider has no {OPERATOR} for {dtype}, expected {' or '.join(DTYPES)}. "
            "Export with --dtype float32."
        )
    import_quantizer()


def import_quantizer() -> Any:
    """The module of the class `MatMulNBitsQuantizer`.

    Raises:
        EnvironmentMissingError: it cannot be imported.
    """
    for distribution in ("onnxruntime", "onnxruntime-gpu"):
        if problem := too_old(distribution):
            raise EnvironmentMissingError(problem)
    try:
        with _unchanged_logging():
            return importlib.import_module(_MODULE)
    except ImportError as error:
        raise EnvironmentMissingError(
            f"quantize: ONNX Runtime's quantizer cannot be imported ({error}). Install it with: "
            'pip install "rmsnorm-deploy[cpu]"'
        ) from error


@contextmanager
def _unchanged_logging() -> Iterator[None]:
    """The quantizer's module sets the root logger up to print its progress."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.setLevel(level)
        for handler in [handler for handler in root.handlers if handler not in handlers]:
            root.removeHandler(handler)


@dataclass(slots=True)
class QuantizedMatrix:
    """A weight of a MatMul, which is quantized when its parts are read.

    Attributes:
        name: the weight's name, for messages.
        matrix: returns the weight, `[inputs, outputs]`, in float32 or float16; it may be a view of a file.
        scheme: how it is quantized.
        attributes: the attributes of the operator.
        parts: dtype and shape of the operator's inputs behind the first, in their order, by a suffix for their names.
    """

    name: str
    matrix: Callable[[], np.ndarray[Any, Any]]
    scheme: Scheme
    attributes: Mapping[str, Any] = field(init=False)
    parts: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = field(init=False)
    _made: dict[str, np.ndarray[Any, Any]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        matrix = self.matrix()
        columns = matrix.shape[1]
        self.attributes, first = self._quantized(matrix[:, :1])
        self.attributes = {**self.attributes, "N": columns}
        self.parts = {
            suffix: (array.dtype, (array.shape[0] * columns, *array.shape[1:])) for suffix, array in first.items()
        }

    def read(self, suffix: str) -> np.ndarray[Any, Any]:
        """A part. The others are kept until they have been read too, because all are computed together."""
        if suffix not in self._made:
            self._made = self._compute()
        return self._made.pop(suffix)

    def _compute(self) -> dict[str, np.ndarray[Any, Any]]:
        matrix = self.matrix()
        rows, columns = matrix.shape
        parts = {suffix: np.empty(shape, dtype) for suffix, (dtype, shape) in self.parts.items()}
        step = max(1, _SLICE // (rows * matrix.itemsize))
        for start in range(0, columns, step):
            end = min(start + step, columns)
            _, found = self._quantized(matrix[:, start:end])
            for suffix, array in found.items():
                each = len(parts[suffix]) // columns
                parts[suffix][start * each : end * each] = array
        release_pages()
        return parts

    def _quantized(self, matrix: np.ndarray[Any, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
        """The attributes and parts of the operator that ONNX Runtime's quantizer makes of a MatMul."""
        scheme = self.scheme
        try:
            module = import_quantizer()
            config = module.DefaultWeightOnlyQuantConfig(
                bits=scheme.bits,
                block_size=scheme.block_size,
                is_symmetric=scheme.symmetric,
                accuracy_level=scheme.accuracy_level,
            )
            quantizer = module.MatMulNBitsQuantizer(_product(matrix), algo_config=config)
            quantizer.process()
            graph = quantizer.model.model.graph
            (node,) = graph.node
            if node.op_type != OPERATOR or node.domain != DOMAIN:
                raise ValueError(f"expected one {DOMAIN}::{OPERATOR}, got {node.domain}::{node.op_type}")
            tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
            attributes = {row.name: helper.get_attribute_value(row) for row in node.attribute}
            return attributes, {name.removeprefix(_WEIGHT): tensors[name] for name in node.input[1:]}
        except EnvironmentMissingError:
            raise
        except Exception as error:
            version = installed_version("onnxruntime") or installed_version("onnxruntime-gpu")
            raise UnsupportedError(
                f"quantize: the quantizer of onnxruntime {version} failed on the weight {self.name} "
                f"({'x'.join(map(str, matrix.shape))}, {matrix.dtype}): {' '.join(str(error).split())[:300]}"
            ) from error


_WEIGHT = "weight"


def _product(matrix: np.ndarray[Any, Any]) -> onnx.ModelProto:
    """A model of one MatMul."""
    weight = numpy_helper.from_array(np.ascontiguousarray(matrix), _WEIGHT)
    rows, columns = matrix.shape
    x = helper.make_tensor_value_info("x", weight.data_type, ["tokens", rows])
    y = helper.make_tensor_value_info("y", weight.data_type, ["tokens", columns])
    node = helper.make_node("MatMul", ["x", _WEIGHT], ["y"], name="product")
    graph = helper.make_graph([node], "product", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)])
