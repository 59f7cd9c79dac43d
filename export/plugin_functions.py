"""Local functions that stand in for the plugin where it is not registered: the contract's formula in primitives."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..plugins import contract

# Cast, Pow, ReduceMean with axes as input, CastLike: all there from opset 18.
_FUNCTION_OPSET = 18
# The first IR version with model-local functions.
_FUNCTIONS_SINCE = 8


def plugin_function(op_type: str, opset: int = _FUNCTION_OPSET) -> ir.Function:
    """The function of `RMSNorm` or `AddRMSNorm`, with every attribute of the contract.

    ONNX Runtime inlines it, folds what is constant and fuses what is left into one kernel. TensorRT uses it only when
    the plugin is not registered.
    """
    inputs = [ir.Value(name=name) for name in contract.INPUTS[op_type]]
    nodes: list[ir.Node] = []
    x = inputs[0]
    if op_type == contract.ADD_RMS_NORM:
        x = _add(nodes, "Add", [inputs[0], inputs[1]], "sum")
    scale = inputs[-1]
    float32 = int(ir.DataType.FLOAT)
    wide = _add(nodes, "Cast", [x], "x32", to=float32)
    squares = _add(nodes, "Pow", [wide, _constant(nodes, np.array(2.0, np.float32), "two")], "squares")
    axes = _constant(nodes, np.array([-1], np.int64), "axes")
    mean = _add(nodes, "ReduceMean", [squares, axes], "mean", keepdims=1)
    under_root = _add(nodes, "Add", [mean, _attribute(nodes, "epsilon")], "under_root")
    root = _add(nodes, "Sqrt", [under_root], "root")
    normalised = _add(nodes, "Div", [wide, root], "normalised")
    wide_scale = _add(nodes, "Cast", [scale], "scale32", to=float32)
    shifted = _add(nodes, "Add", [wide_scale, _attribute(nodes, "scale_offset")], "shifted")
    scaled = _add(nodes, "Mul", [_cast_to_scale_type(nodes, normalised), _cast_to_scale_type(nodes, shifted)], "scaled")
    y = _add(nodes, "CastLike", [scaled, x], "Y")
    outputs = [y, x] if op_type == contract.ADD_RMS_NORM else [y]
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": opset}, name=op_type)
    attributes = [ir.Attr(name, _attribute_type(name), None) for name in contract.ATTRIBUTES]
    return ir.Function(contract.DOMAIN, op_type, graph=graph, attributes=attributes)


def add_plugin_functions(model: ir.Model) -> None:
    """Give the model the functions of the custom operators in its main graph, in its own opset."""
    used = {node.op_type for node in model.graph if node.domain == contract.DOMAIN} & set(contract.INPUTS)
    for op_type in sorted(used):
        function = plugin_function(op_type)
        imports = model.graph.opset_imports
        function.opset_imports[""] = imports[""] if "" in imports else imports["ai.onnx"]
        model.functions[function.identifier()] = function
    if used:
        model.ir_version = max(model.ir_version, _FUNCTIONS_SINCE)
        model.graph.opset_imports[contract.DOMAIN] = contract.DOMAIN_VERSION


def _add(nodes: list[ir.Node], op_type: str, inputs: list[ir.Value], name: str, **attributes: int) -> ir.Value:
    node = ir.node(op_type, inputs, attributes, num_outputs=1)
    node.outputs[0].name = name
    nodes.append(node)
    return node.outputs[0]


def _constant(nodes: list[ir.Node], array: np.ndarray, name: str) -> ir.Value:
    node = ir.node("Constant", [], {"value": ir.Tensor(array, name=name)}, num_outputs=1)
    node.outputs[0].name = name
    nodes.append(node)
    return node.outputs[0]


def _attribute(nodes: list[ir.Node], name: str) -> ir.Value:
    """A float attribute of the function as a value."""
    attribute = ir.RefAttr("value_float", name, ir.AttributeType.FLOAT)
    node = ir.Node("", "Constant", [], [attribute], num_outputs=1)
    node.outputs[0].name = f"{name}_value"
    nodes.append(node)
    return node.outputs[0]


def _cast_to_scale_type(nodes: list[ir.Node], value: ir.Value) -> ir.Value:
    node = ir.Node("", "Cast", [value], [ir.RefAttr("to", "scale_type", ir.AttributeType.INT)], num_outputs=1)
    node.outputs[0].name = f"{value.name}_in_scale_type"
    nodes.append(node)
    return node.outputs[0]


def _attribute_type(name: str) -> ir.AttributeType:
    return ir.AttributeType[contract.KERNEL_ATTRIBUTES.get(name, "STRING")]
