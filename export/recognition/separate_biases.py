"""Make an Add of the bias of ONNX Runtime's SkipSimplifiedLayerNormalization, which no other operator has."""

from __future__ import annotations

import onnx_ir as ir

from ..graph.site import node_name
from .find_norms import SKIP


def has_bias(node: ir.Node) -> bool:
    """Whether a node is that operator with a bias."""
    return (node.domain, node.op_type) == SKIP and len(node.inputs) > 3 and node.inputs[3] is not None


def separate_biases(model: ir.Model) -> list[str]:
    """Replace the bias of each such operator by an Add of its first input and the bias, in place.

    The operator computes input + skip + bias; its sum then is (input + bias) + skip, which is the order before ONNX
    Runtime's fusion, and differs from the operator's in rounding only.

    Returns:
        Names of the nodes that were changed.
    """
    changed = []
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        x = node.inputs[0] if has_bias(node) else None
        if x is None or node.graph is None:
            continue
        add = ir.node("Add", [x, node.inputs[3]], num_outputs=1)
        total = add.outputs[0]
        total.shape, total.type = x.shape, x.type
        node.graph.insert_before(node, add)
        node.replace_input_with(0, total)
        node.resize_inputs(3)
        changed.append(node_name(node))
    return changed
