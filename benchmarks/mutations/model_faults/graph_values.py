"""Values of an exported graph for conditional faults: sizes, conditions, masks and positions, and ways to rewire them.

A fault of a model is planted by replacing a value by a function of it, `rewired`, or the mask of a layer's attention,
`attention`. `Where` with a condition on sizes makes a fault that only some inputs show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..faults import Plant
from ..surgery import Edit

INT64, BOOL, FLOAT = (int(ir.DataType[name]) for name in ("INT64", "BOOL", "FLOAT"))
_MASKED = -3.0e38

Make = Callable[[Edit, ir.Value], ir.Value]
Condition = Callable[[Edit], ir.Value]


def number(edit: Edit, *values: int) -> ir.Value:
    """An int64 constant: a scalar for one value, else a vector."""
    return edit.constant(np.array(values[0] if len(values) == 1 else values, np.int64))


def real(edit: Edit, value: float, like: ir.Value | None = None) -> ir.Value:
    """A scalar constant in the dtype of a value, float32 by default."""
    dtype = like.dtype if like is not None and like.dtype is not None else ir.DataType.FLOAT
    return edit.constant(np.asarray(value, dtype.numpy()))


def size(edit: Edit, name: str, dim: int) -> ir.Value:
    """The size of a dim of a value, an int64 scalar."""
    return edit.op("Gather", edit.op("Shape", edit.value(name)), number(edit, dim), axis=0)


def past_size(edit: Edit) -> ir.Value:
    """The number of tokens in the KV cache that the model reads; 0 without one."""
    names = {str(value.name) for value in edit.graph.inputs}
    return size(edit, "past_key_values.0.key", 2) if "past_key_values.0.key" in names else number(edit, 0)


def count(edit: Edit, start: ir.Value, end: ir.Value) -> ir.Value:
    """start, start + 1, ..., end - 1: int64[end - start]."""
    return edit.op("Range", start, end, number(edit, 1))


def unsqueezed(edit: Edit, value: ir.Value, *axes: int) -> ir.Value:
    return edit.op("Unsqueeze", value, edit.constant(np.array(axes, np.int64)))


def sliced(edit: Edit, value: ir.Value, start: int, end: int, axis: int) -> ir.Value:
    bounds = (edit.constant(np.array([n], np.int64)) for n in (start, end, axis))
    return edit.op("Slice", value, *bounds)


def joined(edit: Edit, axis: int, *values: ir.Value) -> ir.Value:
    return edit.op("Concat", *values, axis=axis)


def truth(edit: Edit, value: ir.Value) -> ir.Value:
    return edit.op("Cast", value, to=BOOL)


def integer(edit: Edit, value: ir.Value) -> ir.Value:
    return edit.op("Cast", value, to=INT64)


def has(name: str, dim: int, op_type: str, wanted: int) -> Condition:
    """Whether the size of a dim is `Equal` to, `Greater` or `Less` than a number."""
    return lambda edit: edit.op(op_type, size(edit, name, dim), number(edit, wanted))


def divides(name: str, dim: int, divisor: int, rest: int) -> Condition:
    """Whether the size of a dim leaves a rest when it is divided."""
    return lambda edit: edit.op(
        "Equal", edit.op("Mod", size(edit, name, dim), number(edit, divisor)), number(edit, rest)
    )


def later(steps: int = 1) -> Condition:
    """Whether the KV cache contains at least so many tokens."""
    return lambda edit: edit.op("GreaterOrEqual", past_size(edit), number(edit, steps))


def both(*conditions: Condition) -> Condition:
    """Whether two conditions hold."""
    first, second = conditions
    return lambda edit: edit.op("And", first(edit), second(edit))


def when(condition: Condition, make: Make) -> Make:
    """The change if a condition on sizes holds."""
    return lambda edit, value: edit.op("Where", condition(edit), make(edit, value), value)


def at_rows(first: int, make: Make, axis: int = 0) -> Make:
    """The change from an index of an axis on."""

    def change(edit: Edit, value: ir.Value) -> ir.Value:
        changed = make(edit, value)
        end = np.iinfo(np.int64).max
        return joined(edit, axis, sliced(edit, value, 0, first, axis), sliced(edit, changed, first, end, axis))

    return change


def at_last(make: Make, axis: int = 1) -> Make:
    """The change at the last index of an axis."""

    def change(edit: Edit, value: ir.Value) -> ir.Value:
        changed, end = make(edit, value), np.iinfo(np.int64).max
        return joined(edit, axis, sliced(edit, value, 0, -1, axis), sliced(edit, changed, -1, end, axis))

    return change


def times(factor: float) -> Make:
    """A multiple of the value."""
    return lambda edit, value: edit.op("Mul", value, real(edit, factor, value))


def chained(*makes: Make) -> Make:
    """One change after the other."""

    def change(edit: Edit, value: ir.Value) -> ir.Value:
        for make in makes:
            value = make(edit, value)
        return value

    return change


def rewired(name: str, make: Make, readers: Callable[[ir.Node], bool] = lambda node: True) -> Plant:
    """Replace a value by a function of it, for its readers and as an output of the graph; its shape is still its own.

    Args:
        name: of the value.
        make: writes the function.
        readers: which readers get the new value.
    """

    def plant(edit: Edit) -> None:
        replace(edit, edit.value(name), make, readers)

    return plant


def replace(edit: Edit, value: ir.Value, make: Make, readers: Callable[[ir.Node], bool] = lambda node: True) -> None:
    """Replace a value by a function of it; see `rewired`."""
    name = str(value.name)
    uses = list(value.uses())
    new = make(edit, value)
    new.type, new.shape = value.type, value.shape
    for node, index in uses:
        if node.op_type != "Shape" and readers(node):
            node.replace_input_with(index, new)
    for index, output in enumerate(edit.graph.outputs):
        if output is value:
            value.name = f"{name}.replaced"
            new.name = name
            edit.graph.outputs[index] = new


# ------------------------------------------------------------------------------------------------------------ attention


@dataclass(frozen=True, slots=True)
class Seen:
    """What the mask of a layer's attention depends on.

    Attributes:
        given: which keys each query reads in the fault-free file, bool[batch or 1, 1, queries, keys].
        queries: positions of the queries, int64[queries, 1].
        keys: positions of the keys, int64[keys].
        mask: the attention mask, bool[batch, 1, 1, keys].
        scores: the scores, float[batch, heads, queries, keys].
    """

    given: ir.Value
    queries: ir.Value
    keys: ir.Value
    mask: ir.Value
    scores: ir.Value


Rule = Callable[[Edit, Seen], ir.Value]


def attention(rule: Rule, *layers: int) -> Plant:
    """Another mask in the attention of some layers, or of all.

    Args:
        rule: writes which keys each query reads.
        layers: numbers of the layers.
    """

    def plant(edit: Edit) -> None:
        adds = scores_of(edit)
        for layer in layers or range(len(adds)):
            add = adds[layer]
            bias = add.inputs[1]
            assert bias is not None
            assert add.inputs[0] is not None
            given = edit.op("Greater", bias, real(edit, -1e30))
            past = past_size(edit)
            queries = count(edit, past, edit.op("Add", past, size(edit, "input_ids", 1)))
            keys = count(edit, number(edit, 0), size(edit, "attention_mask", 1))
            mask = truth(edit, unsqueezed(edit, edit.value("attention_mask"), 1, 2))
            seen = Seen(given, unsqueezed(edit, queries, 1), keys, mask, add.inputs[0])
            allowed = rule(edit, seen)
            add.replace_input_with(1, edit.op("Where", allowed, real(edit, 0.0), real(edit, _MASKED)))

    return plant


def scores_of(edit: Edit) -> list[ir.Node]:
    """The nodes that add the mask to the scores of each layer's attention."""
    softmaxes = [node for node in edit.graph if node.op_type == "Softmax"]
    adds = [value.producer() for node in softmaxes for value in node.inputs if value is not None]
    return [node for node in adds if node is not None and node.op_type == "Add"]


def any_of(edit: Edit, values: Sequence[ir.Value]) -> ir.Value:
    result = values[0]
    for value in values[1:]:
        result = edit.op("Or", result, value)
    return result


def all_of(edit: Edit, values: Sequence[ir.Value]) -> ir.Value:
    result = values[0]
    for value in values[1:]:
        result = edit.op("And", result, value)
    return result


# ---------------------------------------------------------------------------------------------------------------- masks


def after_first(edit: Edit, mask: ir.Value) -> ir.Value:
    """Whether a token is at or after the first unmasked one of its row, bool[batch, tokens]."""
    return edit.op("Greater", edit.op("CumSum", mask, number(edit, 1)), number(edit, 0))


def before_last(edit: Edit, mask: ir.Value) -> ir.Value:
    """Whether a token is at or before the last unmasked one of its row, bool[batch, tokens]."""
    return edit.op("Greater", edit.op("CumSum", mask, number(edit, 1), reverse=1), number(edit, 0))


def left_ignored(edit: Edit, mask: ir.Value) -> ir.Value:
    """A mask in which padding on the left is not masked."""
    return integer(edit, edit.op("Or", truth(edit, mask), edit.op("Not", after_first(edit, mask))))


def right_ignored(edit: Edit, mask: ir.Value) -> ir.Value:
    """A mask in which padding on the right is not masked."""
    return integer(edit, edit.op("Or", truth(edit, mask), edit.op("Not", before_last(edit, mask))))


def holes_ignored(edit: Edit, mask: ir.Value) -> ir.Value:
    """A mask in which only padding on the left and on the right is masked."""
    return integer(edit, edit.op("And", after_first(edit, mask), before_last(edit, mask)))


def all_ones(edit: Edit, mask: ir.Value) -> ir.Value:
    """A mask of ones."""
    return edit.op("Add", edit.op("Mul", mask, number(edit, 0)), number(edit, 1))


def in_layer(layer: int, change: Make) -> Plant:
    """A changed attention mask in one layer: causal attention to the keys that the changed mask allows."""

    def rule(edit: Edit, seen: Seen) -> ir.Value:
        mask = truth(edit, unsqueezed(edit, change(edit, edit.value("attention_mask")), 1, 2))
        return edit.op("And", edit.op("LessOrEqual", seen.keys, seen.queries), mask)

    return attention(rule, layer)
