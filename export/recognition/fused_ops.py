"""Operators that are a whole norm: those of ONNX, of ONNX Runtime and of this package."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir

from ...plugins import contract
from ..graph.constants import dims, is_floating, is_half, widens
from ..graph.plugin_nodes import PLUGIN_DOMAINS, is_plugin_node
from ..graph.shape_checks import is_ones, may_fit
from .terms import Normed, Step

# x is the first input, the scale the second.
FUSED = {
    ("", "RMSNormalization"),
    ("", "SimplifiedLayerNormalization"),
    ("com.microsoft", "SimplifiedLayerNormalization"),
    *((domain, op_type) for domain in PLUGIN_DOMAINS for op_type in (contract.RMS_NORM, *contract.UNQUANTIZED)),
}
OTHER_PLUGIN = f"its plugin is not in namespace {contract.PLUGIN_NAMESPACE!r}"
QUANTIZED_OUTPUT = "its output is quantized"
# A norm has at most this many trailing dims.
_MOST_DIMS = 8
_FLOAT = ir.DataType.FLOAT


def is_read(value: ir.Value) -> bool:
    """Whether a value is read by a node or is an output of its graph."""
    return bool(value.uses()) or value.is_graph_output()


def wrong_epsilon(epsilon: float) -> str | None:
    """Why an operator with this epsilon is not a norm; None if it is one."""
    if math.isfinite(epsilon) and epsilon >= 0:
        return None
    return f"its epsilon is {epsilon:g}, expected a finite number of at least 0"


def fused_norm(node: ir.Node, root: Callable[[ir.Value], ir.Value]) -> Normed | str | None:
    """The norm of an operator; or why it is refused; or None where the dtype of its input is not one of norms."""
    ours = is_plugin_node(node)
    if node.domain in PLUGIN_DOMAINS and not ours:
        return OTHER_PLUGIN
    if node.op_type in contract.UNQUANTIZED:
        return QUANTIZED_OUTPUT
    x, out = node.inputs[0], node.outputs[0]
    scale = node.inputs[1] if len(node.inputs) > 1 else None
    if x is None or not is_floating(x.dtype) or x.dtype is None:
        return None
    attributes, shape = node.attributes, dims(x)
    axis = attributes["axis"].as_int() if "axis" in attributes else -1
    if axis >= 0:
        if shape is None:
            return "the rank of its input is unknown, so its axis is unknown"
        axis -= len(shape)
    if not -_MOST_DIMS <= axis < 0 or (shape is not None and -axis > len(shape)):
        return "its axis is out of range for the rank of its input"
    epsilon = attributes["epsilon"].as_float() if "epsilon" in attributes else 1e-5
    problem = wrong_epsilon(epsilon)
    if problem is not None:
        return problem
    if scale is not None and not may_fit(scale, x, -axis):
        return "the shape of its scale differs from the dims that it normalizes"
    offset = attributes["scale_offset"].as_float() if "scale_offset" in attributes else 0.0
    stash, scale_type = (
        ir.DataType(attributes[name].as_int()) if name in attributes else _FLOAT
        for name in ("stash_type", "scale_type")
    )  # fmt: skip
    dtype: ir.DataType = x.dtype
    if offset not in (0.0, 1.0):
        return f"it adds {offset:g} to its scale"
    if is_half(stash) or (len(node.outputs) > 1 and any(is_read(extra) for extra in node.outputs[1:])):
        return "its statistics have a half type, or are used elsewhere"
    if out.dtype is None:
        out.type = scale.type if scale is not None and node.op_type == "RMSNormalization" else x.type
    wide = stash if widens(dtype, stash) else dtype
    rounds_first = is_half(dtype) and (
        node.op_type == "RMSNormalization" and (scale is None or scale.dtype == dtype)
        if not ours
        else is_half(scale_type)
    )
    steps: list[Step] = [Step("cast", dtype)] if rounds_first else []
    if scale is not None and not (offset == 0.0 and is_ones(scale)):
        steps.append(Step("scale", dtype if rounds_first else wide, scale))
    if is_half(dtype) and out.dtype == dtype and not rounds_first:
        steps.append(Step("cast", dtype))
    return Normed(
        out, root(x), x, wide, epsilon, 1.0, -axis, True, False, False, node, tuple(steps),
        (node,), offset=offset,
    )  # fmt: skip
