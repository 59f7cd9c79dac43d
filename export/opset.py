"""Raising the opset import of a graph without changing what any operator means."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from ..models.errors import UnsupportedError

# What the comparison of two definitions cannot see: scales per channel instead of per group, modes under other names,
# an axis that became an input with another default.
_MEANING_CHANGED = {"GroupNormalization": 21, "GridSample": 20, "DFT": 20}


def raise_opset(model: ir.Model, opset: int) -> None:
    """Set the default domain's import to `opset`, after checking every operator.

    An operator keeps its meaning when its newer definition takes the same inputs and every attribute it had keeps its
    default; new attributes must have a default, be optional, or be absent from the node.

    Raises:
        UnsupportedError: the import would have to be lowered, or an operator means something else at `opset`.
    """
    current = model.graph.opset_imports.get("", 1)
    if opset < current:
        raise UnsupportedError(f"the graph was captured at opset {current} and cannot be lowered to {opset}.")
    if opset == current:
        return
    changed = sorted({node.op_type for node in model.graph.all_nodes() if _changes(node, current, opset)})
    if changed:
        raise UnsupportedError(
            f"opset {current} cannot be raised to {opset}: {', '.join(changed)} would change in meaning. "
            f"Use a target that needs no newer opset, such as primitives."
        )
    model.graph.opset_imports[""] = opset


def _changes(node: ir.Node, current: int, opset: int) -> bool:
    if node.domain != "":
        return False
    try:
        old = onnx.defs.get_schema(node.op_type, current, "")
        new = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return False  # an operator that onnx does not know (ONNX Runtime's own) has no versions to differ
    if old.since_version == new.since_version:
        return False
    if new.deprecated or current < _MEANING_CHANGED.get(node.op_type, 0) <= opset:
        return True
    if [i.name for i in old.inputs] != [i.name for i in new.inputs[: len(old.inputs)]]:
        return True
    for name, attribute in old.attributes.items():
        successor = new.attributes.get(name)
        if successor is None:
            if name in node.attributes:
                return True
        elif attribute.default_value != successor.default_value and name not in node.attributes:
            return True
    return any(a.required and name not in node.attributes for name, a in new.attributes.items())
