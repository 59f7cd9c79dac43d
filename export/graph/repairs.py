"""Nodes that torch's exporter writes and that ONNX or ONNX Runtime does not take, in another form (`repair`)."""

from __future__ import annotations

import onnx_ir as ir

from .constants import integers


def repair(program: ir.Model) -> None:
    """Replace such nodes in place; the results do not change."""
    for node in list(program.graph.all_nodes()):
        if node.op_type == "Squeeze":
            _drop_false_squeeze(node)
        elif node.op_type == "Where":
            _write_where_of_bools(node)


def _drop_false_squeeze(node: ir.Node) -> None:
    """Remove a Squeeze of a dim that is not 1, which ONNX forbids and which in PyTorch changes nothing."""
    axes = integers(node.inputs[1]) if len(node.inputs) == 2 else None
    x = node.inputs[0] if axes else None
    if x is None or x.shape is None or not axes or len(axes) != 1 or node.graph is None:
        return
    dim = x.shape[axes[0]]
    if isinstance(dim, int) and dim != 1:
        node.outputs[0].replace_all_uses_with(x, replace_graph_outputs=True)
        node.graph.remove(node, safe=True)


def _write_where_of_bools(node: ir.Node) -> None:
    """Write a Where of booleans as Or(And(condition, a), And(Not(condition), b)): ONNX Runtime has no kernel for it."""
    condition, a, b = node.inputs
    result = node.outputs[0]
    if result.dtype != ir.DataType.BOOL or node.graph is None:
        return
    chosen = ir.node("And", [condition, a])
    refused = ir.node("Not", [condition])
    other = ir.node("And", [refused.outputs[0], b])
    either = ir.node("Or", [chosen.outputs[0], other.outputs[0]])
    either.outputs[0].shape, either.outputs[0].type = result.shape, result.type
    node.graph.insert_before(node, [chosen, refused, other, either])
    name = result.name
    result.replace_all_uses_with(either.outputs[0], replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
    either.outputs[0].name = name
