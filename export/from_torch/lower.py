"""Lower a captured graph: replace every norm node by the operators of the target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir

from ...models.recognition.site import Recognition
from ...models.spec import NormSpec
from ..capture.swap import CAPTURE_DOMAIN, CAPTURE_OP
from ..graph.metadata import Form
from ..graph.residual import residual_operands
from ..graph.site import GraphSite
from ..lowering.norm_writer import LoweredSite, NormWriter
from ..lowering.plugin_functions import PluginStyle, check_style, style_plugin_nodes
from ..lowering.quantized_norms import fuse_quantized_outputs
from ..lowering.table import opset_for
from ..onnx_io.raise_opset import raise_opset

# This metadata of the exporter contains source paths of the exporting machine; module names are kept.
_DROPPED_METADATA = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")


def lower(
    model: ir.Model, target: str, opset: int | None = None, style: PluginStyle = "function"
) -> tuple[ir.Model, list[LoweredSite]]:
    """Lower every captured norm of `model` for `target`.

    Args:
        model: a captured graph; it is copied (weights are shared) and not changed.
        target: one of the lowering table's targets.
        opset: the opset import of the result, or None for the target's default.
        style: how the file contains the custom operators of target `plugin`. A QuantizeLinear behind a norm is fused
            into its operator; this raises the opset import to 21, unless `opset` is given.

    Returns:
        The lowered model and its norms in graph order.

    Raises:
        UsageError: the target is unknown, or a style was given for another target than `plugin`.
        UnsupportedError: the target does not support one of the norms, or the opset.
    """
    wanted = opset_for(target, opset)
    check_style(style, [target])
    lowered = model.clone()
    raise_opset(lowered, wanted)
    writer = NormWriter(lowered.graph, target, wanted)
    sites = [writer.write(_site(node), _kept(node)).lowered for node in list(_captured(lowered.graph))]
    if target == "plugin":
        fuse_quantized_outputs(lowered, may_raise_opset=opset is None)
    _finish(lowered, style)
    return lowered, sites


def _captured(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if node.domain == CAPTURE_DOMAIN and node.op_type == CAPTURE_OP:
            yield node


def _site(node: ir.Node) -> GraphSite:
    """The norm of a captured node."""
    spec = NormSpec.from_json(node.attributes["spec"].as_string())
    path = node.attributes["path"].as_string()
    x, weight, bias, gate = (*node.inputs, None, None, None)[:4]
    if x is None or x.dtype is None:
        raise ValueError(f"norm {path!r}: expected an input with a known dtype")
    _fix_width(x, node)
    operands = residual_operands(x, node.outputs[0])
    if weight is not None and weight.producer() is not None:
        operands = None
    form: Form = "residual_add" if operands is not None else "plain"
    return GraphSite(
        path, spec, form, x, weight, bias, gate, node.outputs[0], operands, (node,), node.name or "", None, x.dtype
    )


def _fix_width(x: ir.Value, node: ir.Node) -> None:
    """Set the normalized dims of x to those of the recognized module, because the graph may not contain them."""
    width = node.attributes["width"].as_string() if "width" in node.attributes else ""
    sizes = [int(size) for size in width.split("x") if size]
    if sizes and x.shape is not None and len(x.shape) >= len(sizes):
        x.shape = ir.Shape([*x.shape[: len(x.shape) - len(sizes)], *sizes])


def _kept(node: ir.Node) -> dict[str, str]:
    return {key: value for key, value in node.metadata_props.items() if key not in _DROPPED_METADATA}


def _finish(model: ir.Model, style: PluginStyle) -> None:
    for graph in model.graphs():
        for node in graph:
            for key in _DROPPED_METADATA:
                node.metadata_props.pop(key, None)
    model.graph.opset_imports.pop(CAPTURE_DOMAIN, None)
    style_plugin_nodes(model, style)
    for name in [n for n, v in model.graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        if not model.graph.initializers[name].is_graph_input():
            del model.graph.initializers[name]


def site_rows(recognition: Recognition, lowered: Sequence[LoweredSite]) -> list[dict[str, Any]]:
    """Each recognized norm for the manifest, with the nodes it became; `calls` is empty for one that never ran."""
    return [
        {**site.to_dict(), "calls": [call.to_dict() for call in lowered if call.path == site.path]}
        for site in recognition.sites
    ]
