"""The heads of a token in one row, `[B, S, H D]` (`rows_of`, `read_rows`), as projections have them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ..graph.constants import dims, same_dims
from .rotary import OPERATOR as ROTARY

if TYPE_CHECKING:
    from .builder import Builder
    from .norm_writer import NormWriter

# Of a Transpose between the two, in both directions.
_TURN = (0, 2, 1, 3)


def rows_of(value: ir.Value, builder: Builder) -> ir.Value:
    """The value `[B, H, S, D]` as `[B, S, H D]`, and a rotary embedding in front of it too.

    A projection has its result so, and the Reshape, Transpose and RotaryEmbedding behind it need not be read then.
    """
    rotary = value.producer()
    if rotary is not None and rotary.op_type == ROTARY and rotary.domain == "" and value.dtype is not None:
        x, *caches = rotary.inputs
        shape = dims(x)
        rows = None if x is None else _before_turn(x, builder)
        if rows is not None and shape is not None and isinstance(shape[1], int):
            attributes = {name: one.value for name, one in rotary.attributes.items()} | {"num_heads": shape[1]}
            inputs = [rows, *(one for one in caches if one is not None)]
            return builder.op(ROTARY, inputs, attributes, dtype=value.dtype, shape=rows.shape)
    own = _before_turn(value, builder)
    if own is not None:
        return own
    assert value.dtype is not None
    turned = builder.op("Transpose", [value], {"perm": _TURN}, dtype=value.dtype, shape=None)
    return _joined(turned, builder)


def _before_turn(value: ir.Value, builder: Builder) -> ir.Value | None:
    """`[B, S, H D]` of a value that a Transpose made of `[B, S, H, D]`, or None."""
    turn = value.producer()
    if turn is None or turn.op_type != "Transpose" or turn.domain != "":
        return None
    perm, heads = turn.attributes.get("perm"), turn.inputs[0]
    if perm is None or tuple(perm.as_ints()) != _TURN or heads is None:
        return None
    split = heads.producer()
    if split is not None and split.op_type == "Reshape" and split.domain == "":
        rows = split.inputs[0]
        if rows is not None and _is_joined(rows, heads):
            return rows
    return _joined(heads, builder)


def _joined(heads: ir.Value, builder: Builder) -> ir.Value:
    """`[B, S, H, D]` as `[B, S, H D]`."""
    assert heads.dtype is not None
    shape = builder.constant(np.array([0, 0, -1]), ir.DataType.INT64, "heads")
    return builder.op("Reshape", [heads, shape], dtype=heads.dtype, shape=None)


def _is_joined(rows: ir.Value, heads: ir.Value) -> bool:
    """Whether one is `[B, S, H D]` and the other `[B, S, H, D]`, so that a Reshape between them keeps rows apart."""
    flat, split = dims(rows), dims(heads)
    if flat is None or split is None or len(flat) != 3 or len(split) != 4 or not same_dims(flat[:2], split[:2]):
        return False
    count, width = split[2:]
    return isinstance(count, int) and isinstance(width, int) and flat[2] == count * width


def read_rows(heads: ir.Value, rows: ir.Value, norms: NormWriter) -> None:
    """Let the Reshape that joins the heads again be replaced by `rows`.

    Args:
        heads: `[B, S, H, D]`.
        rows: the same as `[B, S, H D]`.
        norms: knows what replaced what.
    """
    uses = list(heads.uses())
    if len(uses) != 1 or heads.is_graph_output():
        return
    node = uses[0].node
    if node.op_type == "Reshape" and node.domain == "" and _is_joined(node.outputs[0], heads):
        norms.take_over(node.outputs[0], rows)
        norms.remove_unread([node])
