"""Determine whether a graph already contains the nodes that are to be written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

from ..graph.constants import DEFAULT_DOMAINS, constant


def counterparts(written: Sequence[ir.Node], new: ir.Value, old: ir.Value) -> dict[ir.Node, ir.Node] | None:
    """The nodes of the graph that are equal to the written nodes, if the graph contains all of them.

    Args:
        written: new nodes, which are not in a graph yet.
        new: the result of the last new node.
        old: the value in the graph that `new` would replace.

    Returns:
        The counterpart of each written node; None if one is missing.
    """
    inside = set(written)
    found: dict[ir.Node, ir.Node] = {}
    pending = [(new, old)]
    while pending:
        a, b = pending.pop()
        node, other = a.producer(), b.producer()
        if node not in inside:
            if a is not b and not _same_constant(a, b):
                return None
            continue
        if node is None or other is None or a.index() != b.index() or found.get(node, other) is not other:
            return None
        if node in found:
            continue
        if not _same_operator(node, other) or len(node.inputs) != len(other.inputs):
            return None
        found[node] = other
        for x, y in zip(node.inputs, other.inputs, strict=True):
            if (x is None) != (y is None):
                return None
            if x is not None and y is not None:
                pending.append((x, y))
    return found if len(found) == len(inside) else None


def _same_operator(a: ir.Node, b: ir.Node) -> bool:
    same_domain = a.domain == b.domain or (a.domain in DEFAULT_DOMAINS and b.domain in DEFAULT_DOMAINS)
    if not same_domain or a.op_type != b.op_type:
        return False
    names = {*a.attributes, *b.attributes}
    return all(_attribute(a, name) == _attribute(b, name) for name in names)


def _attribute(node: ir.Node, name: str) -> object:
    """An attribute's value, or its default where the node does not have it."""
    if name in node.attributes:
        value = node.attributes[name].value
        return float(np.float32(value)) if isinstance(value, float) else value
    try:
        schema = onnx.defs.get_schema(node.op_type, onnx.defs.onnx_opset_version(), "")
    except onnx.defs.SchemaError:
        return None
    default = schema.attributes[name].default_value if name in schema.attributes else None
    return onnx.helper.get_attribute_value(default) if default is not None and default.name else None


def _same_constant(a: ir.Value, b: ir.Value) -> bool:
    one, other = constant(a), constant(b)
    if one is None or other is None or one.dtype != other.dtype:
        return False
    return one.shape == other.shape and one.tobytes() == other.tobytes()
