"""Rewrite the norms of any ONNX graph in a target's form; all other nodes are unchanged."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from ...models.dtypes import onnx_name
from ...models.errors import UnsupportedError, UsageError
from ..graph.infer_types import Filled, fill_types
from ..graph.metadata import REQUIRES_KEY
from ..graph.plugin_nodes import is_plugin_node
from ..graph.requirements import merged_requirements
from ..graph.site import GraphRefusal, GraphSite
from ..lowering.attention_table import OPERATOR_OPSET, AttentionMode, required_versions
from ..lowering.norm_writer import LoweredSite, NormWriter, Written
from ..lowering.plugin_functions import QUANTIZED_OPSET, move_to_contract_domain, style_plugin_nodes
from ..lowering.quantized_norms import (
    QuantizedOutput,
    fuse_quantized_outputs,
    is_quantized_norm,
    split_quantized_outputs,
)
from ..lowering.table import HIGHEST_OPSET, cell, refuse_other_epsilon
from ..onnx_io.raise_opset import raise_opset
from ..recognition.find_attentions import FoundAttentions
from ..recognition.find_norms import find_norms
from ..recognition.separate_biases import has_bias, separate_biases
from .inline_functions import inline_norm_functions
from .rewrite_attentions import (
    AttentionRewriter,
    RewrittenAttention,
    check_rewriting,
    masked_notes,
    proven_attentions,
)

# In earlier IR versions every initializer must also be a graph input.
_CONSTANTS_SINCE = 4


@dataclass(frozen=True, slots=True, eq=False)
class RewrittenSite:
    """One norm, before and after the rewrite.

    Attributes:
        before: the norm in the original model.
        lowered: the written norm; None where the norm was refused or skipped.
        changed: False where the norm was in the target's form already.
        x: the normalized value in the rewritten model; None where one operator adds, normalizes and does not output
            the sum.
        y: the result in the rewritten model.
        gate: the gate in the rewritten model, or None.
        sum_of: the operands of the residual add in the rewritten model, or None.
    """

    before: GraphSite
    lowered: LoweredSite | None
    changed: bool
    x: ir.Value | None
    y: ir.Value
    gate: ir.Value | None
    sum_of: tuple[ir.Value, ir.Value] | None

    @property
    def stood(self) -> bool:
        """Whether the norm was in the target's form already."""
        return not self.changed and (self.lowered is not None or self.before.target is not None)


@dataclass(slots=True)
class Rewritten:
    """A rewritten model.

    Attributes:
        model: the rewritten model.
        original: the given model, in which functions that contain norms are inlined.
        sites: every norm, in graph order.
        refusals: norms, and what looks like a norm, that were not rewritten, with the reason.
        notes: other changes, for the user.
        quantized: norms whose result is quantized; filled by `fuse_quantized`.
        split: number of operators with a quantized output that were split.
        attentions: the attentions that were rewritten, in graph order.
        attention_refusals: what looks like an attention and was not rewritten, with the reason.
    """

    model: ir.Model
    original: ir.Model
    sites: list[RewrittenSite]
    refusals: list[GraphRefusal]
    notes: list[str] = field(default_factory=list)
    quantized: list[QuantizedOutput] = field(default_factory=list)
    split: int = 0
    attentions: list[RewrittenAttention] = field(default_factory=list)
    attention_refusals: list[GraphRefusal] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        """Whether any norm or attention was rewritten, or a norm split or fused with its quantization."""
        return (
            bool(self.split or self.attentions)
            or any(site.changed for site in self.sites)
            or any(q.dtype for q in self.quantized)
        )


def rewrite(
    model: ir.Model,
    target: str,
    opset: int | None = None,
    skip: Container[int] = (),
    attention: AttentionMode = "decomposed",
    failed: Mapping[int, str] | None = None,
) -> Rewritten:
    """Rewrite every norm of a graph in a target's form.

    For target `plugin` the result has local functions, so ONNX Runtime can run it; see `style_plugin_nodes`. Norms with
    a quantized output are split into a norm and a QuantizeLinear, in `original` too, so that each can be verified
    separately; `fuse_quantized` joins both into one operator again.

    Args:
        model: any model. Inferred dtypes and shapes are added to it, and its nodes are sorted topologically where they
            are not; nothing else changes. Of the weights, only those of norms are read.
        target: one of the lowering table's targets.
        opset: opset import of the result; None raises it only as far as the target requires.
        skip: indices of norms, in graph order, that are not rewritten.
        attention: `node` to replace attentions that are spelled out by the target's operator, `decomposed` to leave
            them as they are.
        failed: the indices of attentions, in `Rewritten.attentions` without this, that are left as they are, with the
            reason.

    Raises:
        UsageError: the target is unknown, or has no operator for attention.
        UnsupportedError: the opset cannot be raised without changing the meaning of another operator, or the target
            supports none of the norms.
    """
    lowest = cell(target, "plain").opset
    check_rewriting(attention, target)
    _sort(model)
    original, inlined = inline_norm_functions(model)
    notes = [f"inlined, because they contain norms: {', '.join(inlined)}"] if inlined else []
    split: list[str] = []
    if any(map(is_quantized_norm, original.graph)):
        original = original.clone() if original is model else original
        if _opset_import(original) < QUANTIZED_OPSET:  # then the file has no local functions
            notes.append(f"opset import raised from {_opset_import(original)} to {QUANTIZED_OPSET}")
            raise_opset(original, QUANTIZED_OPSET)
        split = split_quantized_outputs(original)
        style_plugin_nodes(original, "function")
    if target != "ort" and any(has_bias(node) for node in original.graph.all_nodes()):
        original = original.clone() if original is model else original
        names = separate_biases(original)
        notes.append(f"the biases of {len(names)} SkipSimplifiedLayerNormalization nodes are an Add of their own")
    filled = fill_types(original)
    found = find_norms(original)
    attentions = proven_attentions(original, target, opset, failed) if attention == "node" else FoundAttentions()
    rewritten = original.clone()
    copies = _copies(original.graph, rewritten.graph)
    current = _opset_import(rewritten)
    wanted = _wanted_opset(target, opset, current, lowest if found.sites else current)
    wanted = max(wanted, OPERATOR_OPSET) if attentions.sites else wanted
    # Plugin nodes of another style are in the target's form as soon as they have their local functions.
    restyled = target == "plugin" and move_to_contract_domain(rewritten, _plugin_nodes(found.sites, copies))
    writer = NormWriter(rewritten.graph, target, wanted)
    refusals = list(found.refusals)
    done: list[tuple[GraphSite, GraphSite, Written | None]] = []
    for number, before in enumerate(found.sites):
        site, written = _copied(before, copies), None
        if number not in skip and not (site.target == target == "ort"):
            try:
                refuse_other_epsilon(site.spec, site.form, onnx_name(site.dtype), target)
                written = writer.write(site)
            except UnsupportedError as error:
                refusals.append(GraphRefusal(site.node, site.path, str(error)))
        done.append((before, site, written))
    attention_writer = AttentionRewriter(rewritten.graph, copies, target, wanted, writer)
    written_attentions = attention_writer.write(attentions.sites)
    writer.finish()
    sites = [_rewritten(writer, *row) for row in done]
    result = Rewritten(
        rewritten, original, sites, refusals, notes, split=len(split), attentions=written_attentions,
        attention_refusals=attentions.refusals,
    )  # fmt: skip
    _note_attentions(result)
    if (
        sites
        and refusals
        and not skip
        and not written_attentions
        and not any(s.lowered for s in sites)
        and any(not s.before.target for s in sites)
    ):
        raise UnsupportedError(f"none of the {len(sites)} norms can be written: {refusals[-1].reason}")
    if result.changed or restyled or (opset is not None and opset > current):
        raise_opset(rewritten, wanted)
        if wanted > current:
            notes.append(f"opset import raised from {current} to {wanted}")
    if result.changed or restyled:
        rewritten.ir_version = max(rewritten.ir_version, _CONSTANTS_SINCE)
        style_plugin_nodes(rewritten, "function")
    _untype(result, [(copies[row.value], row) for row in filled])
    return result


def _note_attentions(result: Rewritten) -> None:
    """Record what the operators of attention require of a runtime, and what they change."""
    versions = required_versions([row.lowered.cell for row in result.attentions])
    if versions:
        metadata = result.model.metadata_props
        metadata[REQUIRES_KEY] = merged_requirements(metadata.get(REQUIRES_KEY), versions)
    result.notes.extend(masked_notes(result.attentions))


def fuse_quantized(result: Rewritten, target: str, opset: int | None = None) -> None:
    """Fuse each norm with the QuantizeLinear behind it, where the target has an operator for both.

    `result.sites` keeps the values from before the fusion, so verify the norms first.

    Args:
        result: the result of `rewrite`; it is changed.
        target: the target that `rewrite` was called with.
        opset: the opset that `rewrite` was called with.
    """
    if target != "plugin":
        return
    before = _opset_import(result.model)
    result.quantized = fuse_quantized_outputs(result.model, may_raise_opset=opset is None)
    for row in result.quantized:
        if row.dtype is None:
            result.notes.append(f"the quantization of {row.path or row.node} remains a separate node: {row.reason}")
    if any(row.dtype for row in result.quantized):
        style_plugin_nodes(result.model, "function")
        after = _opset_import(result.model)
        if after > before:
            result.notes.append(f"opset import raised from {before} to {after}, for norms with a quantized output")


def _opset_import(model: ir.Model) -> int:
    imports = model.graph.opset_imports
    return imports.get("", imports.get("ai.onnx", 1))


def _copies(graph: ir.Graph, clone: ir.Graph) -> dict[ir.Value, ir.Value]:
    """Each value of a graph and its subgraphs, mapped to its copy."""
    copies: dict[ir.Value, ir.Value] = {}
    pending = [(graph, clone)]
    while pending:
        one, other = pending.pop()
        copies.update(zip(one.inputs, other.inputs, strict=True))
        copies.update((value, other.initializers[name]) for name, value in one.initializers.items())
        for node, copy in zip(one, other, strict=True):
            copies.update(zip(node.outputs, copy.outputs, strict=True))
            pending.extend(zip(_bodies(node), _bodies(copy), strict=True))
    return copies


def _plugin_nodes(sites: list[GraphSite], copies: Mapping[ir.Value, ir.Value]) -> Iterator[ir.Node]:
    """The nodes of the copied model that are norms as custom operators."""
    for site in sites:
        for node in site.nodes:
            copy = copies[node.outputs[0]].producer() if is_plugin_node(node) else None
            if copy is not None:
                yield copy


def _copied(site: GraphSite, copies: Mapping[ir.Value, ir.Value]) -> GraphSite:
    """The site in the copied model. A constant outside of any graph is shared by both models."""

    def copy(value: ir.Value | None) -> ir.Value | None:
        return None if value is None else copies.get(value, value)

    operands = None if site.sum_of is None else (copies[site.sum_of[0]], copies[site.sum_of[1]])
    return dataclasses.replace(
        site, x=copy(site.x), weight=copy(site.weight), bias=copy(site.bias), gate=copy(site.gate),
        y=copies[site.y], sum_of=operands, nodes=(),
    )  # fmt: skip


def _rewritten(writer: NormWriter, before: GraphSite, site: GraphSite, written: Written | None) -> RewrittenSite:
    """The site with its values after all norms are written."""
    x, y = (site.x, site.y) if written is None else (written.x, written.y)
    lowered, changed = (None, False) if written is None else (written.lowered, written.changed)
    operands = [value for value in map(writer.current, site.sum_of or ()) if value is not None]
    sum_of = (operands[0], operands[1]) if len(operands) == 2 else None
    gate = writer.current(site.gate)
    return RewrittenSite(before, lowered, changed, writer.current(x), writer.current(y) or y, gate, sum_of)


def _wanted_opset(target: str, opset: int | None, current: int, lowest: int) -> int:
    if opset is None:
        return max(current, lowest)
    if opset > max(HIGHEST_OPSET, current):
        raise UnsupportedError(f"opset: expected at most {HIGHEST_OPSET}, got {opset}.")
    if opset < current:
        raise UsageError(f"opset: expected at least {current}, the opset of the file, got {opset}. Omit --opset.")
    if opset < lowest:
        raise UnsupportedError(f"target {target!r} requires opset {lowest}, got opset {opset}.")
    return opset


def _sort(model: ir.Model) -> None:
    """Sort the nodes topologically where they are not; `check_graph` has refused cycles before."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        made: set[ir.Value] = set()
        pending: list[Iterator[ir.Node]] = [iter(graph)]
        sorted_already = True
        while pending and sorted_already:
            node = next(pending[-1], None)
            if node is None:
                pending.pop()
                continue
            made.update(node.outputs)
            read = (v for v in node.inputs if v is not None and v.producer() is not None)
            sorted_already = all(v in made for v in read)
            pending.extend(iter(inner) for inner in _bodies(node))
        if not sorted_already:
            graph.sort()


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            yield from attribute.as_graphs()


def _untype(result: Rewritten, filled: list[tuple[ir.Value, Filled]]) -> None:
    """Remove the inferred dtypes and shapes, except those of the inputs and outputs of norms."""
    kept = {value for site in result.sites for value in (site.x, site.y, site.gate, *(site.sum_of or ()))}
    for value, before in filled:
        if value not in kept:
            value.type, value.shape = before.type, before.shape


def rewritten_attentions(rewritten: Rewritten) -> list[dict[str, Any]]:
    """Each attention of a rewritten file for the manifest; `node` is absent for those that were left alone."""
    refused = [{**row.to_dict(), "node": None, "softmax": row.node} for row in rewritten.attention_refusals]
    return [*({"class": "Softmax", **row.lowered.to_dict()} for row in rewritten.attentions), *refused]


def rewritten_rows(rewritten: Rewritten) -> list[dict[str, Any]]:
    """Each norm of a rewritten file for the manifest: norms of one path together, with the nodes they became."""
    rows: dict[str, dict[str, Any]] = {}
    for site in rewritten.sites:
        row = rows.setdefault(site.before.path, {**site.before.to_dict(), "calls": []})
        if site.lowered is not None:
            row["calls"].append({**site.lowered.to_dict(), "changed": site.changed})
    return list(rows.values())
