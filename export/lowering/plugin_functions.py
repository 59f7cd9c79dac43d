"""The custom operators in a file: their domain, and the local functions that replace them without a plugin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, Literal

import numpy as np
import onnx_ir as ir

from ...models.errors import UsageError
from ...plugins import contract
from ..graph.plugin_nodes import PLUGIN_DOMAINS, is_plugin_node

# How a file contains the custom operators: `function` with local functions, which ONNX Runtime runs; `bare` without
# them, for TensorRT up to 10.6, which prefers a function to the plugin; `ort_trt` without them, in the domain in which
# ONNX Runtime's TensorRT provider looks for plugins.
PluginStyle = Literal["function", "bare", "ort_trt"]
# The domain of the operators, and notes for the user of the file.
_DOMAINS: Final[dict[PluginStyle, str]] = {
    "function": contract.DOMAIN,
    "bare": contract.DOMAIN,
    "ort_trt": contract.ORT_DOMAIN,
}
_NOTES: Final[dict[PluginStyle, list[str]]] = {
    "function": [],
    "bare": [
        "the norms are plugin nodes without a local function (--no-function): TensorRT runs the file if the plugin is "
        "registered; ONNX Runtime cannot run it"
    ],
    "ort_trt": [
        f"the norms are plugin nodes of domain {contract.ORT_DOMAIN} without a local function (--ort-trt): ONNX "
        "Runtime runs the file only with its TensorRT provider and the plugin's library; TensorRT runs it if the "
        "plugin is registered"
    ],
}
# Prefix of the names of a function's nodes. TensorRT's parser repeats these names for every call.
FUNCTION_NODE_PREFIXES: Final = {op_type: f"{contract.DOMAIN}::{op_type}/" for op_type in contract.INPUTS}

# Cast, Pow, ReduceMean with axes as input, CastLike: all exist since opset 18.
_FUNCTION_OPSET = 18
# The first opset in which QuantizeLinear has output_dtype, which the function of a quantized norm requires.
QUANTIZED_OPSET = 21
# The first IR version with model-local functions.
_FUNCTIONS_SINCE = 8


def plugin_function(op_type: str, opset: int | None = None) -> ir.Function:
    """The local function of one of the contract's operators, with all its attributes.

    ONNX Runtime inlines it, folds its constants and fuses the remaining nodes into one kernel. TensorRT uses it only if
    the plugin is not registered.

    Args:
        op_type: the operator.
        opset: opset import of the function; None for the lowest possible one.
    """
    given = {name: ir.Value(name=name) for name in contract.INPUTS[op_type]}
    quantized = op_type in contract.UNQUANTIZED
    nodes: list[ir.Node] = []
    x, scale = given["X"], given["scale"]
    if "residual" in given:
        x = _add(nodes, "Add", [x, given["residual"]], "sum")
    float32 = int(ir.DataType.FLOAT)
    wide = _add(nodes, "Cast", [x], "x32", to=float32)
    squares = _add(nodes, "Pow", [wide, _constant(nodes, np.array(2.0, np.float32), "two")], "squares")
    axes = _constant(nodes, np.array([-1], np.int64), "axes")
    mean = _add(nodes, "ReduceMean", [squares, axes], "mean", keepdims=1)
    under_root = _add(nodes, "Add", [mean, _attribute(nodes, "epsilon")], "under_root")
    root = _add(nodes, "Sqrt", [under_root], "root")
    normalized = _add(nodes, "Div", [wide, root], "normalized")
    wide_scale = _add(nodes, "Cast", [scale], "scale32", to=float32)
    shifted = _add(nodes, "Add", [wide_scale, _attribute(nodes, "scale_offset")], "shifted")
    scaled = _add(nodes, "Mul", [_cast_to_scale_type(nodes, normalized), _cast_to_scale_type(nodes, shifted)], "scaled")
    y = _add(nodes, "CastLike", [scaled, x], "normed" if quantized else "Y")
    if quantized:
        wide_y = _add(nodes, "Cast", [y], "normed32", to=float32)
        y = _referring(nodes, "QuantizeLinear", [wide_y, given["y_scale"]], "Y", output_dtype="quant_type")
    outputs = [y, x] if "residual" in given else [y]
    for node in nodes:
        node.name = f"{FUNCTION_NODE_PREFIXES[op_type]}{node.outputs[0].name}"
    wanted = opset or (QUANTIZED_OPSET if quantized else _FUNCTION_OPSET)
    graph = ir.Graph(list(given.values()), outputs, nodes=nodes, opset_imports={"": wanted}, name=op_type)
    kinds = {**contract.OPERATOR_ATTRIBUTES[op_type], **dict.fromkeys(contract.PARSER_ATTRIBUTES, "STRING")}
    attributes = [ir.Attr(name, ir.AttributeType[kind], None) for name, kind in kinds.items()]
    return ir.Function(contract.DOMAIN, op_type, graph=graph, attributes=attributes)


def plugin_style(function: bool, ort_trt: bool, targets: Iterable[str]) -> PluginStyle:
    """The style that the options of the same names select.

    Raises:
        UsageError: a style was selected, and `plugin` is not among the targets.
    """
    style: PluginStyle = "ort_trt" if ort_trt else "function" if function else "bare"
    check_style(style, targets)
    return style


def check_style(style: PluginStyle, targets: Iterable[str]) -> None:
    """Refuse a style for targets without custom operators.

    Raises:
        UsageError: the style is unknown, or is not `function` and `plugin` is not among the targets.
    """
    if style not in _DOMAINS:
        raise UsageError(f"plugin style: expected one of {', '.join(_DOMAINS)}, got {style!r}.")
    if style != "function" and "plugin" not in (targets := list(targets)):
        option = {"bare": "--no-function", "ort_trt": "--ort-trt"}[style]
        raise UsageError(f"{option} requires --target plugin, whose file has plugin nodes; got {', '.join(targets)}.")


def move_to_contract_domain(model: ir.Model, nodes: Iterable[ir.Node]) -> bool:
    """Move custom operators from ONNX Runtime's domain to the domain of their local functions.

    Returns:
        Whether any was in another domain, or does not have a function yet.
    """
    missing = False
    for node in nodes:
        missing |= node.domain != contract.DOMAIN or node.op_identifier() not in model.functions
        node.domain = contract.DOMAIN
    return missing


def style_plugin_nodes(model: ir.Model, style: PluginStyle) -> None:
    """Move the custom operators of the main graph to the style's domain, and add or remove their functions.

    Functions of the contract that nothing calls are removed, and so are imports of its domains that no node uses.
    """
    nodes = [node for node in model.graph if is_plugin_node(node)]
    for node in nodes:
        node.domain = _DOMAINS[style]
    imports = model.graph.opset_imports
    if nodes:
        imports[_DOMAINS[style]] = contract.DOMAIN_VERSION
    if style == "function":
        for op_type in sorted({node.op_type for node in nodes}):
            function = plugin_function(op_type)
            function.opset_imports[""] = imports[""] if "" in imports else imports["ai.onnx"]
            model.functions[function.identifier()] = function
        if nodes:
            model.ir_version = max(model.ir_version, _FUNCTIONS_SINCE)
    called = {(node.domain, node.op_type) for node in _all_nodes(model)}
    for identifier in [key for key in model.functions if key[0] in PLUGIN_DOMAINS and key[1] in contract.INPUTS]:
        if identifier[:2] not in called or (style != "function" and identifier[0] == contract.DOMAIN):
            del model.functions[identifier]
    for domain in PLUGIN_DOMAINS:
        if not any(used == domain for used, _ in called):
            imports.pop(domain, None)


def style_notes(model: ir.Model, style: PluginStyle) -> list[str]:
    """Notes for the user of the file; empty if it has no custom operator."""
    nodes = [node for node in model.graph if is_plugin_node(node)]
    quantized = sum(node.op_type in contract.UNQUANTIZED for node in nodes)
    notes = [f"{quantized} of its norms have a quantized output: the QuantizeLinear behind them is part of the plugin"]
    return [*_NOTES[style], *notes * bool(quantized)] if nodes else []


def stands_in_for_plugin(function: ir.Function) -> bool:
    """Whether a local function is that of one of the contract's operators."""
    return function.domain in PLUGIN_DOMAINS and function.name in contract.INPUTS


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from ir.traversal.RecursiveGraphIterator(model.graph)
    for function in model.functions.values():
        yield from ir.traversal.RecursiveGraphIterator(function)


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
    """A value that holds a float attribute of the function."""
    attribute = ir.RefAttr("value_float", name, ir.AttributeType.FLOAT)
    node = ir.Node("", "Constant", [], [attribute], num_outputs=1)
    node.outputs[0].name = f"{name}_value"
    nodes.append(node)
    return node.outputs[0]


def _cast_to_scale_type(nodes: list[ir.Node], value: ir.Value) -> ir.Value:
    return _referring(nodes, "Cast", [value], f"{value.name}_in_scale_type", to="scale_type")


def _referring(nodes: list[ir.Node], op_type: str, inputs: list[ir.Value], name: str, **attributes: str) -> ir.Value:
    """A node whose integer attributes refer to attributes of the function, by name."""
    refs = [ir.RefAttr(own, of_function, ir.AttributeType.INT) for own, of_function in attributes.items()]
    node = ir.Node("", op_type, inputs, refs, num_outputs=1)
    node.outputs[0].name = name
    nodes.append(node)
    return node.outputs[0]
