"""Lower a captured graph: replace every norm node by the operators of the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ...models.attention.find_attention import AttentionRecognition
from ...models.attention.spec import AttentionSpec
from ...models.dtypes import onnx_name
from ...models.errors import UnsupportedError
from ...models.recognition.site import Recognition
from ...models.spec import NormSpec
from ..graph.captured_nodes import ATTENTION_OP, CAPTURE_DOMAIN, NORM_OP
from ..graph.metadata import Form
from ..graph.residual import residual_operands
from ..graph.site import GraphRefusal, GraphSite, node_name
from ..lowering.attention_table import AttentionMode, attention_form, required_versions
from ..lowering.attention_writer import AttentionWriter, LoweredAttention
from ..lowering.norm_writer import LoweredSite, NormWriter
from ..lowering.plugin_functions import PluginStyle, check_style, style_plugin_nodes
from ..lowering.quantized_norms import fuse_quantized_outputs
from ..lowering.rotary import LOWEST_PARTIAL, Rotary, find_rotary, write_rotary
from ..lowering.rotary import OPERATOR_OPSET as ROTARY_OPSET
from ..lowering.table import Environment, opset_for, refuse_other_epsilon
from ..onnx_io.raise_opset import raise_opset
from .graph_norms import UnswappedNorms, marked, unmark

# This metadata of the exporter contains source paths of the exporting machine; module names are kept.
_DROPPED_METADATA = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")


@dataclass(frozen=True, slots=True)
class Lowered:
    """A lowered graph.

    Attributes:
        model: the graph.
        sites: its norms, in graph order.
        attentions: its attentions that were captured as nodes, in graph order.
        rotaries: its rotary embeddings that became one operator each, in graph order.
        refusals: norms that are not modules and that the target does not support; they stay as they are.
        in_place: the inputs of the cache that attentions write in place.
    """

    model: ir.Model
    sites: list[LoweredSite]
    attentions: list[LoweredAttention]
    rotaries: list[Rotary]
    refusals: list[GraphRefusal]
    in_place: list[str]

    @property
    def requires(self) -> dict[str, str]:
        """The lowest version of each runtime that computes the graph right, where not every supported one does."""
        partial = any(rotary.rotated != rotary.width for rotary in self.rotaries)
        found = required_versions([attention.cell for attention in self.attentions])
        return {**(LOWEST_PARTIAL if partial else {}), **found}


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
    lowered = lower_graph(model, target, opset, style)
    return lowered.model, lowered.sites


def lower_graph(
    model: ir.Model,
    target: str,
    opset: int | None = None,
    style: PluginStyle = "function",
    attention: AttentionMode = "node",
) -> Lowered:
    """`lower`, which also returns the norms that are not modules and that the target does not support.

    Args:
        attention: `in-place` for attentions that write the cache in place where they can.
    """
    wanted = opset_for(target, opset)
    check_style(style, [target])
    lowered = model.clone()
    has_rotary = _may_have_rotary(lowered, target)
    if opset is None:
        wanted = max(wanted, _attention_opset(lowered, target))
        if has_rotary and find_rotary(lowered.graph):
            wanted = max(wanted, ROTARY_OPSET)
    found = dict(marked(lowered))
    raise_opset(lowered, wanted)
    writer = NormWriter(lowered.graph, target, wanted)
    rotaries = write_rotary(lowered.graph, wanted, writer) if has_rotary else []
    mode: AttentionMode = "in-place" if attention == "in-place" else "node"
    attention_writer = AttentionWriter(lowered.graph, target, wanted, writer, mode)
    sites, attentions, refusals = [], [], []
    for node in list(ir.traversal.RecursiveGraphIterator(lowered.graph)):
        if node.domain == CAPTURE_DOMAIN and node.op_type == NORM_OP:
            sites.append(writer.write(_site(node), _kept(node)).lowered)
        elif node.domain == CAPTURE_DOMAIN and node.op_type == ATTENTION_OP:
            attentions.append(attention_writer.write(node))
        elif node in found:
            site = found[node]
            try:
                refuse_other_epsilon(site.spec, site.form, onnx_name(site.dtype), target)
                sites.append(writer.write(site, _kept(node)).lowered)
            except UnsupportedError as error:
                refusals.append(GraphRefusal(node_name(node), site.path, str(error), node.op_type))
                unmark(node)
    attention_writer.cache.finish()
    writer.finish()
    if target == "plugin":
        fuse_quantized_outputs(lowered, may_raise_opset=opset is None)
    _finish(lowered, style)
    return Lowered(lowered, sites, attentions, rotaries, refusals, attention_writer.cache.names)


def _may_have_rotary(model: ir.Model, target: str) -> bool:
    """Whether the target has an operator for rotary embeddings, which is used where attention is captured as nodes."""
    return target == "ort" and any(
        node.domain == CAPTURE_DOMAIN and node.op_type == ATTENTION_OP for node in model.graph
    )


def _attention_opset(model: ir.Model, target: str) -> int:
    """The opset that the target's forms of the captured attentions require, 0 without attentions."""
    lowest = 0
    for node in model.graph.all_nodes():
        if node.domain == CAPTURE_DOMAIN and node.op_type == ATTENTION_OP:
            spec, query = AttentionSpec.from_json(node.attributes["spec"].as_string()), node.inputs[0]
            if query is not None and query.dtype is not None:
                cell, _ = attention_form(spec, target, Environment(dtype=onnx_name(query.dtype)))
                lowest = max(lowest, cell.opset)
    return lowest


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


def site_rows(
    recognition: Recognition, lowered: Sequence[LoweredSite], unswapped: UnswappedNorms | None = None
) -> list[dict[str, Any]]:
    """Each norm for the manifest, with the nodes it became; `calls` is empty for a module that never ran.

    `found` is `graph` for a norm that is not a module that was recognized, and was found in the captured graph.
    """
    calls: dict[str, list[dict[str, Any]]] = {}
    for call in lowered:
        calls.setdefault(call.path, []).append(call.to_dict())
    rows = [{**site.to_dict(), "calls": calls.get(site.path, [])} for site in recognition.sites]
    graph = unswapped.rows if unswapped is not None else []
    return [*rows, *({**row, "calls": calls[row["path"]]} for row in graph if row["path"] in calls)]


def attention_rows(recognition: AttentionRecognition, lowered: Sequence[LoweredAttention]) -> list[dict[str, Any]]:
    """Each attention for the manifest: its spec and main node, or the reason why its function was not captured."""
    classes = {site.path: site.class_name for site in recognition.sites}
    refused = [{"path": r.path, "class": r.class_name, "reason": r.reason} for r in recognition.refusals]
    return [*({"class": classes.get(one.path, ""), **one.to_dict()} for one in lowered), *refused]
