"""Find the attentions that an ONNX graph spells out: MatMul, scale, mask, Softmax, MatMul (`find_attentions`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from ...models.attention.spec import AttentionSpec
from ..graph.constants import DEFAULT_DOMAINS, constant, dims, same_dims, scalar
from ..graph.site import GraphRefusal, node_name
from .attention_values import KeySide, Repeated, key_side, repeated, scaled
from .find_norms import module_path

_RANK = 4
_KINDS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
# What may stand between a Softmax and the product with the values, so that the Softmax may belong to an attention.
_BEHIND = ("Cast", "Where", "IsNaN", "Dropout", "Identity", "Slice", "Mul")
_FARTHEST = 5
_LAST_AXIS_SINCE = 13  # the opset from which on a Softmax without an axis has the last one
# A score that is replaced by a number at most this high has no weight; a higher one depends on the score.
_HIDDEN = {ir.DataType.FLOAT16: -6e4}
_HIDDEN_WIDE = -1e30

PartKind = Literal["add", "keep", "hide"]


@dataclass(frozen=True, slots=True, eq=False)
class MaskPart:
    """What is done to the scores of an attention.

    Attributes:
        kind: `add` for a bias that is added; `keep` for a bool mask of the scores that are not replaced, `hide` for one
            of those that are.
        value: the bias or the mask.
        number: what scores are replaced by; 0 where none are.
    """

    kind: PartKind
    value: ir.Value
    number: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class FoundAttention:
    """One attention of a graph.

    Attributes:
        path: the path of its module, from the metadata or the names of its nodes.
        spec: what it computes.
        heads: the numbers of heads of the query, and of the key and the value.
        query: `[B, H, S, D]`, before a constant factor.
        key: where the key `[B, Hk, T, D]` is read.
        value: `[B, Hk, T, Dv]`.
        repeats: how key and value are repeated for the heads of the query; empty if they are not.
        parts: what is added to the scores, in order.
        zeros: weights that are not a number become zero.
        softmax: the node.
        y: the result, `[B, H, S, Dv]`.
    """

    path: str
    spec: AttentionSpec
    heads: tuple[int, int]
    query: ir.Value
    key: KeySide
    value: ir.Value
    repeats: tuple[Repeated, ...]
    parts: tuple[MaskPart, ...]
    zeros: bool
    softmax: ir.Node
    y: ir.Value

    @property
    def inputs(self) -> list[ir.Value]:
        """The values that it reads: query, key, value and its masks."""
        return [self.query, self.key.source, self.value, *(part.value for part in self.parts)]

    @property
    def targets(self) -> list[ir.Value]:
        """The shapes to which key and value are repeated, where they are not constant."""
        targets = dict.fromkeys(target for row in self.repeats for target in row.targets)
        return [target for target in targets if constant(target) is None]


@dataclass(slots=True)
class FoundAttentions:
    """The attentions of a graph in its order, and what looks like one, with the reason why it is not."""

    sites: list[FoundAttention] = field(default_factory=list)
    refusals: list[GraphRefusal] = field(default_factory=list)


class _RefusedError(Exception):
    """Why a Softmax is not that of an attention."""


def find_attentions(model: ir.Model) -> FoundAttentions:
    """The attentions of a model that are spelled out.

    Args:
        model: a model whose types are known (`fill_types`); it does not change.
    """
    found = FoundAttentions()
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if not _is(node, "Softmax") or not _may_be_attention(node):
            continue
        try:
            if node.graph is not model.graph:
                raise _RefusedError("it is in a subgraph of control flow")
            found.sites.append(_read(node, opset))
        except _RefusedError as error:
            found.refusals.append(GraphRefusal(node_name(node), module_path((node,), None, {}), str(error), "Softmax"))
    return found


def _may_be_attention(softmax: ir.Node) -> bool:
    """Whether the weights reach a product."""
    reached = [softmax.outputs[0]]
    for _ in range(_FARTHEST):
        readers = [use.node for value in reached for use in value.uses()]
        if any(node.op_type in ("MatMul", "FusedMatMul", "Einsum") for node in readers):
            return True
        reached = [node.outputs[0] for node in readers if node.op_type in _BEHIND]
    return False


def _read(softmax: ir.Node, opset: int) -> FoundAttention:
    scores = softmax.inputs[0]
    shape = dims(scores)
    if scores is None or shape is None:
        raise _RefusedError("the number of dims of its scores is unknown")
    if len(shape) > _RANK:
        raise _RefusedError(f"its scores or its mask have {len(shape)} dims, expected {_RANK}")
    if len(shape) != _RANK:
        raise _RefusedError(f"its scores have {len(shape)} dims, expected {_RANK}: batch, heads, queries and keys")
    axis = softmax.attributes.get_int("axis", -1 if opset >= _LAST_AXIS_SINCE else 1)
    if axis not in (-1, _RANK - 1):
        raise _RefusedError(f"its Softmax is over axis {axis}, expected the last")
    product, value, zeros = _behind(softmax)
    scores, parts = _masks(scores)
    dot, scale, softcap = _product(scores)
    query, key = dot.inputs
    if query is None or key is None:
        raise _RefusedError("its scores are not a product")
    query, factor = scaled(query)
    scale *= factor
    side = key_side(key)
    if side is None:
        raise _RefusedError(_no_keys(key))
    scale *= side.factor
    if not np.isfinite(scale) or scale <= 0:
        raise _RefusedError(f"the factor of its scores is {scale:g}, expected a positive number")
    heads, groups = _heads(query, side.shape, value)
    repeats = _repeats(side, value, heads)
    if repeats is not None:
        side, value = side.at(repeats[0]), repeats[1].source
    _check_types(query, side.source, value, product.outputs[0])
    groups = groups if repeats is None else heads // repeats[0].count
    _check_batch(query, side.shape, value)
    for part in parts:
        _check_mask(part, query, side.shape, heads)
    return FoundAttention(
        module_path((softmax,), None, {}), AttentionSpec(scale, softcap), (heads, groups), query, side, value,
        repeats or (), tuple(parts), zeros, softmax, product.outputs[0],
    )  # fmt: skip


def _behind(softmax: ir.Node) -> tuple[ir.Node, ir.Value, bool]:
    """The product with the values, the values, and whether weights that are not a number become zero."""
    current, zeros = softmax.outputs[0], False
    while True:
        if current.is_graph_output():
            raise _RefusedError(f"its weights {current.name} are an output of the graph")
        readers = list(dict.fromkeys(use.node for use in current.uses()))
        if len(readers) == 2 and not zeros and {node.op_type for node in readers} == {"IsNaN", "Where"}:
            is_nan, where = sorted(readers, key=lambda node: node.op_type)
            flags = is_nan.outputs[0]
            if flags.is_graph_output() or [use.node for use in flags.uses()] != [where]:
                raise _RefusedError("its weights are used elsewhere")
            if not (where.inputs[0] is flags and scalar(where.inputs[1]) == 0.0 and where.inputs[2] is current):
                raise _RefusedError("its weights that are not a number become others than zero")
            current, zeros = where.outputs[0], True
            continue
        if len(current.uses()) != 1:
            raise _RefusedError(f"its weights {current.name} are used elsewhere")
        (node,) = readers
        if _is(node, "Cast") or _is(node, "Identity"):
            current = node.outputs[0]
            continue
        if not _is(node, "MatMul") or node.inputs[0] is not current:
            raise _RefusedError(f"its weights are read by {node.op_type}, expected a product with the values")
        value = node.inputs[1]
        if value is None or len(dims(value) or ()) != _RANK:
            raise _RefusedError("its values do not have four dims")
        return node, value, zeros


def _masks(scores: ir.Value) -> tuple[ir.Value, list[MaskPart]]:
    """The scores before the masks, and the masks."""
    parts: list[MaskPart] = []
    while True:
        node = _alone(scores)
        if _is(node, "Cast") or _is(node, "Identity"):
            scores = _operand(node, 0)
        elif _is(node, "Add"):
            inner = [index for index in (0, 1) if _from_product(node.inputs[index])]
            if len(inner) != 1:
                raise _RefusedError("an Add in front of its Softmax is not that of scores and a mask")
            scores = _operand(node, inner[0])
            parts.append(MaskPart("add", _operand(node, 1 - inner[0])))
        elif _is(node, "Where"):
            inner = [index for index in (1, 2) if _from_product(node.inputs[index])]
            if len(inner) != 1:
                raise _RefusedError("a Where in front of its Softmax is not that of scores and a number")
            number = scalar(node.inputs[3 - inner[0]])
            most = _HIDDEN.get(node.outputs[0].dtype or ir.DataType.FLOAT, _HIDDEN_WIDE)
            if number is None or number > most:
                shown = "a value that is not constant" if number is None else f"{number:g}"
                raise _RefusedError(f"scores are replaced by {shown}, expected the lowest number")
            scores = _operand(node, inner[0])
            parts.append(MaskPart("keep" if inner[0] == 1 else "hide", _operand(node, 0), number))
        else:
            return scores, parts[::-1]


def _from_product(value: ir.Value | None) -> bool:
    """Whether a value is computed from a product of four dims by what may stand behind it."""
    for _ in range(12):
        node = None if value is None else value.producer()
        if node is None or node.domain not in DEFAULT_DOMAINS:
            return False
        if node.op_type == "MatMul":
            return len(dims(node.outputs[0]) or ()) == _RANK
        if node.op_type in ("Cast", "Identity", "Tanh"):
            value = node.inputs[0]
        elif node.op_type in ("Mul", "Div"):
            value = node.inputs[1] if node.op_type == "Mul" and scalar(node.inputs[0]) is not None else node.inputs[0]
        elif node.op_type == "Add":
            first = _from_product(node.inputs[0])
            return first or _from_product(node.inputs[1])
        elif node.op_type == "Where":
            return any(map(_from_product, node.inputs[1:]))
        else:
            return False
    return False


def _product(scores: ir.Value) -> tuple[ir.Node, float, float | None]:
    """The product of query and key, the scale and the softcap."""
    scores, factor = _factors(scores)
    node, softcap = _alone(scores), None
    if _is(node, "Tanh"):
        if not np.isfinite(factor) or factor <= 0:
            raise _RefusedError(f"its softcap is {factor:g}, expected a positive number")
        softcap = factor
        scores, inner = _factors(_operand(node, 0))
        factor *= inner
        node = _alone(scores)
    if not _is(node, "MatMul"):
        raise _RefusedError(
            f"its scores are computed by {node.op_type}{_operands(node)}, expected a product and a scale"
        )
    return node, factor, softcap


def _no_keys(key: ir.Value) -> str:
    node = key.producer()
    if node is not None and node.op_type in ("Mul", "Div"):
        return "a factor of its keys is not one constant number, or they are not transposed behind it"
    return "its keys are not known to be transposed as [batch, heads, width, keys]"


def _operands(node: ir.Node) -> str:
    """What is unusual in a scale."""
    return " with a factor that is not one constant number" if node.op_type in ("Mul", "Div") else ""


def _factors(scores: ir.Value) -> tuple[ir.Value, float]:
    """The scores before constant factors, and the product of these."""
    factor = 1.0
    while True:
        node = _alone(scores)
        if _is(node, "Cast") or _is(node, "Identity"):
            scores = _operand(node, 0)
            continue
        before, own = scaled(scores)
        if before is scores:
            return scores, factor
        scores, factor = before, factor * own


def _alone(value: ir.Value) -> ir.Node:
    """The node that computes a value that one node reads."""
    node = value.producer()
    if node is None:
        raise _RefusedError("its scores are not a product")
    if value.is_graph_output():
        raise _RefusedError(f"its scores {value.name} are an output of the graph")
    if len(value.uses()) != 1:
        raise _RefusedError(f"its scores {value.name} are used elsewhere")
    return node


def _heads(query: ir.Value, key: list[ir.SymbolicDim | int], value: ir.Value) -> tuple[int, int]:
    """The numbers of heads of the query, and of key and value, which may have one that all queries read."""
    shapes = [dims(query), key, dims(value)]
    counts = [shape[1] if shape is not None and len(shape) == _RANK else None for shape in shapes]
    first, second, _ = counts
    if not isinstance(first, int) or not isinstance(second, int) or not isinstance(counts[2], int):
        raise _RefusedError("the numbers of its heads are unknown")
    if second not in (1, first) or counts[2] != second:
        raise _RefusedError(
            f"its query, key and value have {counts[0]}, {counts[1]} and {counts[2]} heads, expected as many"
        )
    return first, second


def _repeats(side: KeySide, value: ir.Value, heads: int) -> tuple[Repeated, Repeated] | None:
    """How key and value are repeated, if both are in the same way."""
    key = repeated(side.source) if side.perm is None else None
    other = repeated(value)
    if key is None or other is None or key.count != other.count or heads % key.count:
        return None
    return key, other


def _check_types(*values: ir.Value) -> None:
    kinds = {value.dtype for value in values}
    if len(kinds) != 1 or not kinds <= set(_KINDS):
        names = ", ".join(sorted("unknown" if kind is None else kind.name.lower() for kind in kinds))
        raise _RefusedError(f"its query, key, value and result have the dtypes {names}, expected one")


def _check_batch(query: ir.Value, key: list[ir.SymbolicDim | int], value: ir.Value) -> None:
    first = [dims(query), key, dims(value)]
    batches = [None if shape is None else shape[:1] for shape in first]
    if not same_dims(batches[0], batches[1]) or not same_dims(batches[0], batches[2]):
        raise _RefusedError("its query, key and value are not known to have one batch")


def _check_mask(part: MaskPart, query: ir.Value, key: list[ir.SymbolicDim | int], heads: int) -> None:
    shape, whole = dims(part.value), dims(query)
    assert whole is not None
    if shape is None:
        raise _RefusedError("the number of dims of its mask is unknown")
    if len(shape) > _RANK:
        raise _RefusedError(f"its mask has {len(shape)} dims, expected at most {_RANK}")
    own = [1] * (_RANK - len(shape)) + list(shape)
    if not (own[0] == 1 or same_dims(own[:1], whole[:1])):
        raise _RefusedError("its mask is not known to have the batch of the query")
    if own[1] not in (1, heads):
        raise _RefusedError(f"its mask has {own[1]} heads, expected 1 or {heads}")
    for dim, size, what in ((own[2], whole[2], "queries"), (own[3], key[2], "keys")):
        if isinstance(dim, int) and isinstance(size, int) and dim not in (1, size):
            raise _RefusedError(f"its mask has {dim} {what}, expected 1 or {size}")


def _is(node: ir.Node, op_type: str) -> bool:
    return node.op_type == op_type and node.domain in DEFAULT_DOMAINS


def _operand(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise _RefusedError(f"its {node.op_type} lacks an input")
    return value
