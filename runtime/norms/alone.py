"""One norm by itself: as an ONNX model, and how far off it is in a dtype or as a target writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...models.dtypes import numpy_dtype, onnx_dtype
from ...models.spec import NormSpec
from ..accuracy.float_formats import format_of, ulp_size
from ..runners.base import Array
from ..runners.onnxruntime import OrtRunner

if TYPE_CHECKING:
    import onnx_ir as ir

_X, _GATE, _Y = "x", "gate", "y"


@dataclass(frozen=True, slots=True)
class NormRows:
    """A norm's tensors and some rows that it is called with.

    Attributes:
        spec: what it computes.
        x: `[rows, *normalized dims]`, any floating dtype.
        weight: broadcastable to x's trailing dims, or None.
        bias: like weight.
        gate: x's shape, or None.
    """

    spec: NormSpec
    x: Array
    weight: Array | None = None
    bias: Array | None = None
    gate: Array | None = None

    def cast(self, dtype: str) -> NormRows:
        """The same, with every array rounded to `dtype`."""
        arrays = (self.x, self.weight, self.bias, self.gate)
        with np.errstate(over="ignore"):
            return NormRows(self.spec, *(a if a is None else a.astype(numpy_dtype(dtype)) for a in arrays))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class NormError:
    """How far a norm's result is from the truth.

    Attributes:
        max_relative: largest error, relative to the root mean square of the truth's row.
        mean_relative: mean of the same.
        max_units: largest error in units of eps(dtype) x max(|truth|, RMS of the truth's row); a few for a norm that
            does nothing but round.
        max_ulp: largest error in ULPs of the dtype at the truth.
        nonfinite: elements that are not finite where the truth is.

    A result that is not finite makes the first four infinite.
    """

    max_relative: float
    mean_relative: float
    max_units: float
    max_ulp: float
    nonfinite: int


def norm_model(
    spec: NormSpec,
    width: Sequence[int],
    dtype: str,
    target: str,
    weight: Array | None = None,
    bias: Array | None = None,
) -> bytes:
    """An ONNX model with one norm and nothing else, lowered for `target`.

    Its inputs are `x` and, where the spec has a gate, `gate`, both `[rows, *width]`; its output is `y`.

    Args:
        spec: what the norm computes.
        width: the normalized trailing dims.
        dtype: of x, gate and y: `float32`, `float16`, `bfloat16` or `float64`.
        target: one of the lowering table's targets.
        weight: of `dtype`, broadcastable to `width`; needed exactly when the spec has a weight.
        bias: like weight; needed exactly when the spec has a bias.

    Returns:
        The model as the bytes of an .onnx file.

    Raises:
        UsageError: unknown target.
        UnsupportedError: the target cannot do this norm.
    """
    import onnx_ir as ir

    from ...export.from_torch.lower import lower
    from ...export.from_torch.swap import CAPTURE_DOMAIN, CAPTURE_OP
    from ...export.lowering.table import LOWEST_OPSET

    kind = onnx_dtype(dtype)
    dims: list[int | str] = ["rows", *width]
    x, y = _value(_X, kind, dims), _value(_Y, kind, dims)
    gate = _value(_GATE, kind, dims) if spec.has_gate else None
    constants = [_constant(name, array) for name, array in (("weight", weight), ("bias", bias))]
    inputs = [x, *constants, gate]
    while inputs[-1] is None:
        inputs.pop()
    attributes = {"spec": spec.to_json(), "path": "norm", "width": "x".join(map(str, width))}
    node = ir.node(CAPTURE_OP, inputs, attributes, domain=CAPTURE_DOMAIN, outputs=[y], name="norm")
    graph = ir.Graph(
        [value for value in (x, gate) if value is not None],
        [y],
        nodes=[node],
        initializers=[value for value in constants if value is not None],
        opset_imports={"": LOWEST_OPSET, CAPTURE_DOMAIN: 1},
        name="norm",
    )
    lowered, _ = lower(ir.Model(graph, ir_version=10), target)
    return ir.to_proto(lowered).SerializeToString()


def reference_of(rows: NormRows) -> NDArray[np.float64]:
    """The norm in float64 on the rows as they are, x's shape."""
    from ...models.reference import reference

    arrays = (rows.x, rows.weight, rows.bias, rows.gate)
    return reference(rows.spec, *(a if a is None else a.astype(np.float64) for a in arrays))  # type: ignore[arg-type]


def error_in_torch(rows: NormRows, dtype: str, expected: NDArray[np.float64]) -> NormError:
    """How far PyTorch in `dtype` is off, with x and the weights rounded to it first."""
    from ...models.eager import eager
    from ..runners.torch import to_numpy, to_torch

    cast = rows.cast(dtype)
    tensors = (None if a is None else to_torch(a) for a in (cast.weight, cast.bias, cast.gate))
    return _error(to_numpy(eager(cast.spec, to_torch(cast.x), *tensors)), expected, dtype)


def error_in_onnxruntime(rows: NormRows, dtype: str, target: str, expected: NDArray[np.float64]) -> NormError:
    """How far ONNX Runtime on the CPU is off in `dtype` with what `target` writes.

    Raises:
        UnsupportedError: the target or ONNX Runtime cannot do this norm in this dtype.
        EnvironmentMissingError: onnxruntime is not installed.
    """
    cast = rows.cast(dtype)
    data = norm_model(cast.spec, cast.x.shape[1:], dtype, target, cast.weight, cast.bias)
    feeds = {_X: cast.x, **({_GATE: cast.gate} if cast.gate is not None else {})}
    with OrtRunner(data, session_options={"intra_op_num_threads": 1}) as runner:
        return _error(runner.run(feeds)[_Y], expected, dtype)


def _error(result: Array, expected: NDArray[np.float64], dtype: str) -> NormError:
    """The result may be wider than `dtype`, where a wider scale promoted it; it is measured in `dtype` all the same."""
    due = np.isfinite(expected)
    if not due.any():
        return NormError(0.0, 0.0, 0.0, 0.0, 0)
    values = result.astype(np.float64)
    exact = np.where(due, expected, 0.0)
    axes = tuple(range(1, exact.ndim))
    rms = np.broadcast_to(np.sqrt(np.mean(np.square(exact), axis=axes, keepdims=True)), exact.shape)[due]
    exact, values = exact[due], values[due]
    finite = np.isfinite(values)
    size = np.where(finite, np.abs(np.where(finite, values, 0.0) - exact), np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative, units, ulps = (
            np.where(size == 0.0, 0.0, size / scale)  # where the truth is a row of zeros, so is a right result
            for scale in (
                rms,
                format_of(numpy_dtype(dtype)).eps * np.maximum(np.abs(exact), rms),
                ulp_size(exact, numpy_dtype(dtype)),
            )
        )
    return NormError(
        float(relative.max()), float(relative.mean()), float(units.max()), float(ulps.max()), int(np.sum(~finite))
    )


def _value(name: str, dtype: ir.DataType, dims: Sequence[int | str]) -> ir.Value:
    import onnx_ir as ir

    return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))


def _constant(name: str, array: Array | None) -> Any:
    import onnx_ir as ir

    if array is None:
        return None
    value = _value(name, ir.DataType.from_numpy(array.dtype), array.shape)
    value.const_value = ir.Tensor(array, name=name)
    return value
