"""Replace the attentions that a graph spells out by a target's operator (`AttentionRewriter`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ...models.dtypes import onnx_name
from ...models.errors import UsageError
from ..graph.captured_nodes import ATTENTION_OP, CAPTURE_DOMAIN
from ..graph.constants import DEFAULT_DOMAINS, HALF_TYPES, Dim, constant, dims, same_dims, scalar
from ..graph.site import GraphRefusal, node_name
from ..lowering.attention_table import AttentionMode, attention_cell, attention_form
from ..lowering.attention_writer import AttentionWriter, LoweredAttention
from ..lowering.builder import Builder
from ..lowering.norm_writer import NormWriter
from ..lowering.table import TARGETS, Environment
from ..recognition.attention_proof import difference
from ..recognition.find_attentions import FoundAttention, FoundAttentions, MaskPart, find_attentions

_HEADS_LAST = (0, 2, 1, 3)
# Operators whose result has no other numbers than their inputs; those that are floating are at these places.
_MOVES = {
    "Where": (1, 2), "Expand": (0,), "Unsqueeze": (0,), "Squeeze": (0,), "Reshape": (0,), "Slice": (0,),
    "Transpose": (0,), "Identity": (0,), "Concat": None,
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class RewrittenAttention:
    """One attention, before and after the rewrite.

    Attributes:
        before: the attention in the original model.
        lowered: the attention that was written.
        original: the result in the original model, with the heads before or behind the queries.
        result: the same in the rewritten model.
        infinite: its mask may be minus infinity.
        inputs: what `before.inputs` are in the rewritten model.
    """

    before: FoundAttention
    lowered: LoweredAttention
    original: ir.Value
    result: ir.Value
    infinite: bool
    inputs: tuple[ir.Value, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _Bias:
    """What is added to the scores: finite and as large as these; before that, and whether that may be infinite."""

    value: ir.Value
    total: ir.Value
    infinite: bool


def check_rewriting(mode: AttentionMode, target: str) -> None:
    """Refuse a way of writing attention that a rewrite does not have.

    Raises:
        UsageError: the mode is `in-place`, or the target has no operator for attention.
    """
    if mode == "in-place":
        raise UsageError("attention: expected node or decomposed for a file, got in-place, which exports alone have.")
    if mode == "node" and not attention_cell(target, "plain").is_operator:
        able = [name for name in TARGETS if attention_cell(name, "plain").is_operator]
        reason = attention_cell(target, "plain").note
        raise UsageError(
            f"attention: node is for target {' or '.join(able)}, which has an operator for attention, got target "
            f"{target} ({reason})."
        )


def proven_attentions(
    model: ir.Model, target: str, opset: int | None, failed: Mapping[int, str] | None = None
) -> FoundAttentions:
    """The attentions of a model that the target has an operator for, each proven by running its nodes in float64.

    Args:
        model: a model whose types are known; it does not change.
        target: one of `TARGETS`.
        opset: opset import of the finished file, or None where it can be raised.
        failed: the numbers of proven attentions that are left alone all the same, with the reason.
    """
    found = find_attentions(model)
    order = {node: number for number, node in enumerate(model.graph)}
    proven = FoundAttentions(refusals=list(found.refusals))
    for site in sorted(found.sites, key=lambda site: order[_producer(site.y)]):
        assert site.query.dtype is not None
        environment = Environment(opset=opset, dtype=onnx_name(site.query.dtype))
        cell, reason = attention_form(site.spec, target, environment)
        if not cell.is_operator:
            reason = reason or cell.note
        problem = reason or difference(site, model)
        if problem is None:
            proven.sites.append(site)
        else:
            proven.refusals.append(GraphRefusal(node_name(site.softmax), site.path, problem, site.softmax.op_type))
    for number in sorted(failed or {}, reverse=True):
        site = proven.sites.pop(number)
        reason = f"its proof fails: {(failed or {})[number]}"
        proven.refusals.append(GraphRefusal(node_name(site.softmax), site.path, reason, site.softmax.op_type))
    return proven


class AttentionRewriter:
    """Writes attentions of a copied model.

    Args:
        root: the main graph of the copy.
        copies: the values of the original model, mapped to their copies.
        target: one of `TARGETS`.
        opset: opset import of the finished file.
        norms: the writer of the copy's norms.
    """

    def __init__(
        self, root: ir.Graph, copies: Mapping[ir.Value, ir.Value], target: str, opset: int, norms: NormWriter
    ) -> None:
        self._root, self._copies, self._opset, self._norms = root, copies, opset, norms
        self._writer = AttentionWriter(root, target, opset, norms)
        self._constants: dict[Any, ir.Value] = {}
        self._biases: dict[tuple[Any, ...], _Bias] = {}

    def write(self, sites: Sequence[FoundAttention]) -> list[RewrittenAttention]:
        """Write the attentions, which are in the order of the graph."""
        rows = [self._written(site) for site in sites]
        return [dataclasses.replace(row, inputs=tuple(map(self._now, row.before.inputs))) for row in rows]

    def _written(self, site: FoundAttention) -> RewrittenAttention:
        product = _producer(self._now(site.y))
        query, source, value = (self._now(one) for one in (site.query, site.key.source, site.value))
        builder = Builder(self._root, self._root, {}, self._constants, self._opset)
        bias = self._bias(builder, site, query, source)
        key, dtype = source, query.dtype
        assert dtype is not None
        if site.key.perm is not None:
            key = builder.op(
                "Transpose", [source], {"perm": list(site.key.perm)}, dtype=dtype, shape=ir.Shape(site.key.shape)
            )
        attributes = {
            "spec": site.spec.to_json(), "path": site.path, "heads": site.heads[0], "groups": site.heads[1]
        }  # fmt: skip
        whole, last = dims(query), dims(value)
        assert whole is not None
        assert last is not None
        shape = ir.Shape([whole[0], whole[2], whole[1], last[3]])
        given = [query, key, value, *([] if bias is None else [bias.value])]
        y = builder.op(ATTENTION_OP, given, attributes, dtype=dtype, shape=shape, domain=CAPTURE_DOMAIN)
        captured = _producer(y)
        old, original = self._now(site.y), site.y
        readers = [use.node for use in old.uses()]
        zeros = site.zeros and bias is not None and bias.infinite
        if len(readers) == 1 and not zeros and not old.is_graph_output() and _puts_heads_last(readers[0]):
            product, old = readers[0], readers[0].outputs[0]
            original = next(use.node for use in site.y.uses()).outputs[0]
        else:
            y = builder.op("Transpose", [y], {"perm": list(_HEADS_LAST)}, dtype=dtype, shape=old.shape)
            y = self._zeros(builder, bias, y) if zeros and bias is not None else y
        self._norms.name_nodes(builder.nodes, site.path or "attention")
        builder.insert_before(_producer(self._now(site.y)))
        self._norms.take_over(old, y)
        self._norms.remove_unread([product])
        lowered = self._writer.write(captured)
        result = self._norms.current(y)
        assert result is not None
        return RewrittenAttention(site, lowered, original, result, bias is not None and bias.infinite)

    def _now(self, value: ir.Value) -> ir.Value:
        current = self._norms.current(self._copies.get(value, value))
        assert current is not None
        return current

    def _bias(self, builder: Builder, site: FoundAttention, query: ir.Value, key: ir.Value) -> _Bias | None:
        """What is added to the scores, once for all attentions that add the same."""
        if not site.parts:
            return None
        dtype = query.dtype
        assert dtype is not None
        ends = (dims(query) or [])[2:3] + site.key.shape[2:3]
        open_ends = [dim for dim in ends if not isinstance(dim, int) and dim.value is None]
        where = (query, key) if open_ends else tuple(map(str, ends))
        marks = tuple((part.kind, part.number, self._now(part.value)) for part in site.parts)
        name = (marks, dtype, where)
        if name not in self._biases:
            total, least = self._sum(builder, site.parts, dtype)
            floor = _floor(dtype)
            bias = total
            if least < floor:
                assert bias.dtype is not None
                number = builder.constant(np.array(floor), bias.dtype, "lowest")
                bias = builder.op("Max", [bias, number], dtype=bias.dtype, shape=bias.shape)
            bias = self._whole(builder, builder.cast(bias, dtype), site, (query, key), ends)
            self._biases[name] = _Bias(bias, total, least == -np.inf)
        return self._biases[name]

    def _sum(self, builder: Builder, parts: tuple[MaskPart, ...], dtype: ir.DataType) -> tuple[ir.Value, float]:
        """The sum of what is added, and a number that it is not below."""
        total, least = None, 0.0
        for part in parts:
            term = self._now(part.value)
            if part.kind == "add":
                least += lower_bound(term)
            else:
                number = part.number if np.isinf(part.number) else max(part.number, _floor(dtype))
                hidden, shown = (builder.constant(np.array(one), dtype, "mask") for one in (number, 0.0))
                choices = [shown, hidden] if part.kind == "keep" else [hidden, shown]
                term = builder.op("Where", [term, *choices], dtype=dtype, shape=term.shape)
                least += number
            total = term if total is None else builder.binary("Add", total, term, None)
        assert total is not None
        return total, least

    def _zeros(self, builder: Builder, bias: _Bias, y: ir.Value) -> ir.Value:
        """The result `[B, H, S, Dv]`, with zeros where the mask of every key is minus infinity."""
        kind, dtype, boolean = bias.total.dtype, y.dtype, ir.DataType.BOOL
        assert kind is not None
        assert dtype is not None
        last = builder.constant(np.array([-1]), ir.DataType.INT64, "axis")
        most = builder.op("ReduceMax", [bias.total, last], {"keepdims": 1}, dtype=kind, shape=None)
        infinite = builder.constant(np.array(-np.inf), kind, "infinite")
        shown = builder.op("Greater", [most, infinite], dtype=boolean, shape=None)
        zero = builder.constant(np.array(0.0), dtype, "zero")
        return builder.op("Where", [shown, y, zero], dtype=dtype, shape=y.shape)

    def _whole(
        self,
        builder: Builder,
        bias: ir.Value,
        site: FoundAttention,
        sides: tuple[ir.Value, ir.Value],
        ends: list[Dim],
    ) -> ir.Value:
        """The bias with a row for each query and a column for each key, as the operator requires."""
        shapes = [dims(self._now(part.value)) or [] for part in site.parts]
        if any(len(shape) == len(_HEADS_LAST) and same_dims(shape[2:], ends) for shape in shapes):
            return bias
        kind = ir.DataType.INT64
        axes = (2, 2 if site.key.perm is None else site.key.perm[2])
        sizes = [
            builder.op("Shape", [value], {"start": axis, "end": axis + 1}, dtype=kind, shape=ir.Shape([1]))
            for value, axis in zip(sides, axes, strict=True)
        ]
        ones = builder.constant(np.array([1, 1]), kind, "ones")
        target = builder.op("Concat", [ones, *sizes], {"axis": 0}, dtype=kind, shape=ir.Shape([4]))
        assert bias.dtype is not None
        return builder.op("Expand", [bias, target], dtype=bias.dtype, shape=None)


def lower_bound(value: ir.Value | None) -> float:
    """A number that a value is not below, from constants that are moved, selected or times a flag; else -infinity."""
    least = np.inf
    seen: set[ir.Value] = set()
    pending = [value]
    while pending:
        current = pending.pop()
        if current is None:
            return -np.inf
        if current in seen:
            continue
        seen.add(current)
        array, node = constant(current), current.producer()
        if array is not None:
            number = float(np.min(array.astype(np.float64), initial=np.inf))
            least = -np.inf if np.isnan(number) else min(least, number)
        elif node is None or node.domain not in DEFAULT_DOMAINS:
            return -np.inf
        elif (factor := _times_flag(node)) is not None:
            least = min(least, factor, 0.0)
        elif node.op_type not in _MOVES:
            return -np.inf
        else:
            places = _MOVES[node.op_type]
            pending += node.inputs if places is None else [node.inputs[place] for place in places]
    return least


def _times_flag(node: ir.Node) -> float | None:
    """The constant factor of a product with a bool that was cast, or None."""
    for number, flag in (node.inputs, node.inputs[::-1]) if node.op_type == "Mul" else ():
        cast = None if flag is None else flag.producer()
        if cast is not None and cast.op_type == "Cast" and cast.domain in DEFAULT_DOMAINS:
            given = cast.inputs[0]
            if given is not None and given.dtype == ir.DataType.BOOL:
                return scalar(number)
    return None


def masked_notes(written: list[RewrittenAttention]) -> list[str]:
    """What changes for queries that attend to nothing."""
    notes = []
    narrow = sum(bool(row.before.parts) and row.before.query.dtype in HALF_TYPES for row in written)
    if narrow:
        notes.append(
            f"{narrow} attention{'s' * (narrow != 1)} of a half type: a query that attends to nothing gets another "
            "average of the values, because a mask of that type does not absorb the scores"
        )
    count = sum(row.infinite and not row.before.zeros for row in written)
    if count:
        notes.append(
            f"the mask of {count} attention{'s' * (count != 1)} may be minus infinity: a query that attends to nothing "
            "gets an average of the values, where the original gives it NaN"
        )
    return notes


def _floor(dtype: ir.DataType) -> float:
    """The lowest number that is added to scores: half the lowest of the dtype.

    ONNX Runtime 1.32 returns zeros for a query whose scores all have the lowest number, and 1.27 an average of the
    values. For half of it both return the average, as the primitives do for any mask that absorbs the scores.
    """
    return float(ml_dtypes.finfo(dtype.numpy()).min) / 2


def _puts_heads_last(node: ir.Node) -> bool:
    perm = tuple(node.attributes.get_ints("perm", ()))
    return node.op_type == "Transpose" and node.domain in DEFAULT_DOMAINS and perm == _HEADS_LAST


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node
