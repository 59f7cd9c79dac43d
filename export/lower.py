"""Lower a captured graph: every norm node becomes what the target wants, every other node stays as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from ..models.spec import NormSpec
from ..plugins import contract
from .builder import Builder
from .emit import Emitted, NormInputs, emit
from .lowerings import Deviation, Environment, Form, LoweringRefusal, deviations, opset_for, resolve
from .opset import raise_opset
from .plugin_functions import plugin_function
from .swap import CAPTURE_DOMAIN, CAPTURE_OP

METADATA_PREFIX = "rmsnorm_deploy."
PATH_KEY = METADATA_PREFIX + "path"
SPEC_KEY = METADATA_PREFIX + "spec"
TARGET_KEY = METADATA_PREFIX + "target"
FORM_KEY = METADATA_PREFIX + "form"
# On the main node: names of the values that go in and come out of the whole norm, as JSON.
VALUES_KEY = METADATA_PREFIX + "values"
# The exporter's notes hold the source paths of the machine that exported; the module names stay.
_DROPPED_METADATA = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")


@dataclass(frozen=True, slots=True)
class LoweredSite:
    """One norm of the finished graph.

    Attributes:
        path: the module it came from.
        spec: what it computes, as called here (a gated norm called without a gate has none).
        form: `plain`, or `add` when a residual add stands in front.
        node: name of its main node.
        dtype: dtype of its input.
        deviations: where the target is not exact for it.
    """

    path: str
    spec: NormSpec
    form: Form
    node: str
    dtype: str
    deviations: list[Deviation] = field(default_factory=list)


def lower(model: ir.Model, target: str, opset: int | None = None) -> tuple[ir.Model, list[LoweredSite]]:
    """Lower every captured norm of `model` for `target`.

    Args:
        model: a captured graph; it is copied (weights are shared) and stays as it is.
        target: one of the lowering table's targets.
        opset: the opset import of the result, or None for the target's default.

    Returns:
        The lowered model and its norms in graph order.

    Raises:
        UsageError: unknown target.
        UnsupportedError: the target cannot do one of the norms, or the opset.
    """
    wanted = opset_for(target, opset)
    lowered = model.clone()
    raise_opset(lowered, wanted)
    shared = _Shared({}, {node.name for node in lowered.graph.all_nodes() if node.name})
    sites = [_lower_node(lowered.graph, node, target, wanted, shared) for node in list(_captured(lowered.graph))]
    _finish(lowered, target)
    return lowered, sites


@dataclass(frozen=True, slots=True)
class _Shared:
    """What the norms of one model share: constants by value, and the node names already taken."""

    constants: dict[Any, ir.Value]
    names: set[str]


def _captured(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if node.domain == CAPTURE_DOMAIN and node.op_type == CAPTURE_OP:
            yield node


def _lower_node(root: ir.Graph, node: ir.Node, target: str, opset: int, shared: _Shared) -> LoweredSite:
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        raise ValueError("a captured norm stands outside any graph")
    spec = NormSpec.from_json(node.attributes["spec"].as_string())
    path = node.attributes["path"].as_string()
    x, weight, bias, gate = (*node.inputs, None, None, None)[:4]
    if x is None or x.dtype is None:
        raise ValueError(f"norm {path!r} has no typed input")
    # A fused node stands where the Add stood, and a weight that is computed may come after that.
    add = _residual_add(x) if weight is None or weight.is_initializer() else None
    _fix_width(x, node)
    form: Form = "add" if add is not None else "plain"
    dtype = _dtype_name(x.dtype)
    environment = Environment(opset=opset, dtype=dtype, top_level=graph is root)
    cell = resolve(spec, form, target, environment)
    if isinstance(cell, LoweringRefusal):
        raise cell.to_error()
    metadata = {**_kept(node), PATH_KEY: path, TARGET_KEY: target, FORM_KEY: form}
    builder = Builder(graph, root, metadata, shared.constants)
    operands = (add.inputs[0], add.inputs[1]) if add is not None and target == "plugin" else None
    inputs = NormInputs(x, weight, bias, gate, operands)  # type: ignore[arg-type]
    emitted = emit(builder, spec, inputs, target, path)
    emitted.core.metadata_props[SPEC_KEY] = spec.to_json()
    if operands is not None and emitted.total is None:  # a gate or a bias stands between the add and the plugin
        form = "plain"
        for written in builder.nodes:
            written.metadata_props[FORM_KEY] = form
    _name(builder, path, shared.names)
    _replace(builder, node, add, emitted)
    values = {"x": emitted.total or x, "y": emitted.output, "gate": gate}
    names = {role: value.name for role, value in values.items() if value is not None}
    emitted.core.metadata_props[VALUES_KEY] = json.dumps(names, sort_keys=True)
    return LoweredSite(path, spec, form, emitted.core.name or "", dtype, deviations(cell, spec, dtype))


def _fix_width(x: ir.Value, node: ir.Node) -> None:
    """The normalised dims are those that the module was recognised with, also where the graph lost track of them."""
    width = node.attributes["width"].as_string() if "width" in node.attributes else ""
    sizes = [int(size) for size in width.split("x") if size]
    if sizes and x.shape is not None and len(x.shape) >= len(sizes):
        x.shape = ir.Shape([*x.shape[: len(x.shape) - len(sizes)], *sizes])


def _residual_add(x: ir.Value) -> ir.Node | None:
    """The Add that makes x, when it adds two values of x's own shape: broadcasts are no residual."""
    add = x.producer()
    if add is None or add.op_type != "Add" or add.domain != "" or x.shape is None:
        return None
    for operand in add.inputs:
        if operand is None or operand.dtype != x.dtype or operand.shape is None or operand.is_initializer():
            return None
        if list(operand.shape) != list(x.shape) or any(_unknown(dim) for dim in x.shape):
            return None
    return add


def _unknown(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, ir.SymbolicDim) and dim.value is None


def _replace(builder: Builder, node: ir.Node, add: ir.Node | None, emitted: Emitted) -> None:
    """Put the new nodes in, and hand the uses of the old values over."""
    output = node.outputs[0]
    if emitted.total is not None and add is not None:
        # The sum is needed from the Add on, so the fused node stands where the Add stood.
        old = add.outputs[0]
        builder.insert_before(add)
        _take_over(old, emitted.total)
        _take_over(output, emitted.output)
        builder.graph.remove(node, safe=True)
        builder.graph.remove(add, safe=True)
        return
    builder.insert_before(node)
    _take_over(output, emitted.output)
    builder.graph.remove(node, safe=True)


def _take_over(old: ir.Value, new: ir.Value) -> None:
    name, shape = old.name, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = None, name
    if new.shape is None:
        new.shape = shape


def _name(builder: Builder, path: str, taken: set[str]) -> None:
    """Nodes are called after the module they came from, so that a profile or an engine can be read.

    A norm called several times has nodes of several numbers: node names are unique.
    """
    for node in builder.nodes:
        base = name = f"{path or 'norm'}/{node.op_type}"
        number = 1
        while name in taken:
            name, number = f"{base}_{number}", number + 1
        taken.add(name)
        node.name = name


def _kept(node: ir.Node) -> dict[str, str]:
    return {key: value for key, value in node.metadata_props.items() if key not in _DROPPED_METADATA}


def _finish(model: ir.Model, target: str) -> None:
    for graph in model.graphs():
        for node in graph:
            for key in _DROPPED_METADATA:
                node.metadata_props.pop(key, None)
    model.graph.opset_imports.pop(CAPTURE_DOMAIN, None)
    if target == "plugin":
        used = {node.op_type for node in model.graph if node.domain == contract.DOMAIN}
        for op_type in sorted(used):
            function = plugin_function(op_type)
            function.opset_imports[""] = model.graph.opset_imports[""]
            model.functions[function.identifier()] = function
        if used:
            model.graph.opset_imports[contract.DOMAIN] = contract.DOMAIN_VERSION
    _drop_unused_initializers(model.graph)


def _drop_unused_initializers(graph: ir.Graph) -> None:
    for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        if not graph.initializers[name].is_graph_input():
            del graph.initializers[name]


def _dtype_name(dtype: ir.DataType) -> str:
    names = {ir.DataType.FLOAT: "float32", ir.DataType.DOUBLE: "float64"}
    return names.get(dtype, dtype.name.lower())
