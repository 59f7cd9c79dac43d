"""An ONNX model of a single norm, lowered for a target (`norm_model`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...models.dtypes import onnx_dtype, torch_dtype, torch_name
from ...models.spec import NormSpec
from ..runners.base import Array
from .cut import NormPlace

if TYPE_CHECKING:
    import onnx_ir as ir

_X, _GATE, _Y = "x", "gate", "y"


def norm_model(
    spec: NormSpec,
    width: Sequence[int],
    dtype: str,
    target: str,
    weight: Array | None = None,
    bias: Array | None = None,
) -> tuple[ir.Model, NormPlace]:
    """An ONNX model of a single norm, lowered for `target`, and the norm's place in it.

    Its inputs are `x` and, if the spec has a gate, `gate`, both `[rows, *width]`; its output is `y`.

    Args:
        spec: what the norm computes.
        width: the normalized trailing dims.
        dtype: of x and gate: `float32`, `float16`, `bfloat16` or `float64`; y may be wider, see `result_dtype`.
        target: one of the lowering table's targets.
        weight: of `dtype`, broadcastable to `width`; required if and only if the spec has a weight.
        bias: like weight; required if and only if the spec has a bias.

    Returns:
        The model, and its norm, named `norm`.

    Raises:
        UsageError: the target is unknown.
        UnsupportedError: the target does not support this norm.
    """
    import onnx_ir as ir

    from ...export.from_torch.lower import lower
    from ...export.graph.captured_nodes import CAPTURE_DOMAIN, NORM_OP
    from ...export.lowering.table import LOWEST_OPSET
    from ...models.eager import result_dtype
    from ...models.tensors import to_torch

    kind = onnx_dtype(dtype)
    dims: list[int | str] = ["rows", *width]
    factors = (None if array is None else to_torch(array) for array in (weight, bias))
    result = onnx_dtype(torch_name(result_dtype(spec, torch_dtype(dtype), *factors)))
    x, y = _value(_X, kind, dims), _value(_Y, result, dims)
    gate = _value(_GATE, kind, dims) if spec.has_gate else None
    constants = [_constant(name, array) for name, array in (("weight", weight), ("bias", bias))]
    inputs = [x, *constants, gate]
    while inputs[-1] is None:
        inputs.pop()
    attributes = {"spec": spec.to_json(), "path": "norm", "width": "x".join(map(str, width))}
    node = ir.node(NORM_OP, inputs, attributes, domain=CAPTURE_DOMAIN, outputs=[y], name="norm")
    graph = ir.Graph(
        [value for value in (x, gate) if value is not None],
        [y],
        nodes=[node],
        initializers=[value for value in constants if value is not None],
        opset_imports={"": LOWEST_OPSET, CAPTURE_DOMAIN: 1},
        name="norm",
    )
    lowered, _ = lower(ir.Model(graph, ir_version=10), target)
    values = {value.name: value for value in (*lowered.graph.inputs, *lowered.graph.outputs)}
    place = NormPlace("norm", (values[_X],), values.get(_GATE), values[_Y])
    return lowered, place


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
