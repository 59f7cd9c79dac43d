"""The residual add in front of a norm."""

from __future__ import annotations

import onnx_ir as ir

from .constants import DEFAULT_DOMAINS, dims, same_dims


def residual_operands(x: ir.Value, y: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The operands of the residual add that computes x, or None. Both must have x's shape, without broadcasting.

    Args:
        x: the value that a norm normalizes.
        y: the norm's result, which must be in the same graph as the Add.
    """
    add, last = x.producer(), y.producer()
    if add is None or last is None or add.op_type != "Add" or add.domain not in DEFAULT_DOMAINS:
        return None
    if add.graph is not last.graph:
        return None
    a, b = add.inputs
    if a is None or b is None:
        return None
    for operand in (a, b):
        if operand.dtype != x.dtype or operand.is_initializer() or not same_dims(dims(operand), dims(x)):
            return None
        producer = operand.producer()
        if producer is not None and producer.op_type == "Constant":
            return None
    return a, b
