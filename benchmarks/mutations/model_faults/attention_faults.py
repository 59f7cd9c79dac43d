"""Faults of attention masks: the mask itself, padding on the left and right, holes, and the sliding window."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..faults import Fault, Plant
from ..surgery import Edit
from .graph_values import (
    Condition,
    Make,
    Rule,
    Seen,
    after_first,
    all_of,
    all_ones,
    any_of,
    at_rows,
    attention,
    before_last,
    has,
    holes_ignored,
    in_layer,
    integer,
    joined,
    later,
    left_ignored,
    number,
    real,
    rewired,
    right_ignored,
    size,
    sliced,
    truth,
    when,
)

MASK = "attention_mask"
_END = np.iinfo(np.int64).max
ONE_ROW = has("input_ids", 0, "Equal", 1)
MANY_ROWS = has("input_ids", 0, "Greater", 2)


def _mask(name: str, model: str, make: Make, variant: str = "plain", target: str = "ort") -> Fault:
    return Fault(name, model, target, rewired(MASK, make), variant=variant)


def _layers(name: str, model: str, plant: Plant, variant: str = "plain", target: str = "primitives") -> Fault:
    return Fault(name, model, target, plant, variant=variant)


# ------------------------------------------------------------------------------------------------------------- the mask


def _shifted(edit: Edit, mask: ir.Value) -> ir.Value:
    return joined(edit, 1, sliced(edit, mask, 1, _END, 1), sliced(edit, mask, -1, _END, 1))


def _of_first_row(edit: Edit, mask: ir.Value) -> ir.Value:
    return edit.op("Expand", sliced(edit, mask, 0, 1, 0), edit.op("Shape", mask))


def _rows_reversed(edit: Edit, mask: ir.Value) -> ir.Value:
    axes = (edit.constant(np.array([n], np.int64)) for n in (-1, -_END, 0, -1))
    return edit.op("Slice", mask, *axes)


def _reads_next(edit: Edit, seen: Seen) -> ir.Value:
    following = edit.op("Equal", seen.keys, edit.op("Add", seen.queries, number(edit, 1)))
    return any_of(edit, [seen.given, edit.op("And", following, seen.mask)])


def _not_itself(edit: Edit, seen: Seen) -> ir.Value:
    earlier = edit.op("Less", seen.keys, seen.queries)
    return all_of(edit, [seen.given, edit.op("Or", earlier, edit.op("Equal", seen.queries, number(edit, 0)))])


def _first_key_unread(edit: Edit, seen: Seen) -> ir.Value:
    first = edit.op("Equal", seen.queries, number(edit, 0))
    return all_of(edit, [seen.given, edit.op("Or", first, edit.op("Greater", seen.keys, number(edit, 0)))])


def _ignored_by_one_head(edit: Edit, seen: Seen) -> ir.Value:
    heads = edit.constant(np.arange(4, dtype=np.int64).reshape(1, 4, 1, 1))
    causal = edit.op("LessOrEqual", seen.keys, seen.queries)
    return any_of(edit, [seen.given, edit.op("And", edit.op("Equal", heads, number(edit, 2)), causal)])


def _finite(edit: Edit) -> None:
    """Masked keys get 2 less than others, in place of minus infinity."""
    softmaxes = [node for node in edit.graph if node.op_type == "Softmax"]
    for node in softmaxes:
        add = node.inputs[0].producer() if node.inputs[0] is not None else None
        assert add is not None
        bias = add.inputs[1]
        causal = edit.op("LessOrEqual", *_positions(edit))
        masked = edit.op("And", edit.op("Less", bias, real(edit, -1e30)), causal)
        add.replace_input_with(1, edit.op("Where", masked, real(edit, -2.0), bias))


def _positions(edit: Edit) -> tuple[ir.Value, ir.Value]:
    keys = edit.op("Range", number(edit, 0), size(edit, MASK, 1), number(edit, 1))
    return keys, edit.op("Unsqueeze", keys, edit.constant(np.array([1], np.int64)))


ATTENTION_MASK_FAULTS = (
    _mask("mask ignored", "qwen3", all_ones, "past"),
    _mask("mask ignored", "gemma2 w40", all_ones),
    _mask("mask ignored at batch 1", "llama", when(ONE_ROW, all_ones), target="standard"),
    _mask("mask ignored at batch 1", "llama", when(ONE_ROW, all_ones), "past"),
    _mask("mask ignored in decode steps", "llama", when(later(), all_ones), "past", "plugin"),
    _layers("mask ignored in the second layer", "llama", in_layer(1, all_ones)),
    _layers("mask ignored in the second layer", "qwen3", in_layer(1, all_ones), "past"),
    _layers("mask ignored by one head", "llama", attention(_ignored_by_one_head, 0), "past"),
    _mask("mask shifted by one", "llama", _shifted),
    _mask("mask of the first row for all rows", "llama", _of_first_row, target="plugin"),
    _mask("masks of the rows in reverse order", "qwen3", _rows_reversed, "past"),
    _layers("masked keys get a finite score", "llama", _finite),
    _layers("causal mask off by one: the next token is read", "llama", attention(_reads_next, 1)),
    _layers("causal mask off by one: a token does not read itself", "llama", attention(_not_itself, 0), "past"),
    _layers("the first key is not read", "mistral w40", attention(_first_key_unread, 1), "past"),
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- padding


def _only_first_masked(edit: Edit, mask: ir.Value) -> ir.Value:
    inner = sliced(edit, left_ignored(edit, mask), 1, _END, 1)
    return joined(edit, 1, sliced(edit, mask, 0, 1, 1), inner)


def _one_more_after_left(edit: Edit, mask: ir.Value) -> ir.Value:
    before = joined(edit, 1, sliced(edit, after_first(edit, mask), 0, 1, 1),
                    sliced(edit, after_first(edit, mask), 0, -1, 1))  # fmt: skip
    padded = edit.op("Equal", sliced(edit, mask, 0, 1, 1), number(edit, 0))
    return edit.op("Mul", mask, integer(edit, edit.op("Or", before, edit.op("Not", padded))))


def _longest_for_all(edit: Edit, mask: ir.Value) -> ir.Value:
    seen = integer(edit, after_first(edit, mask))
    return edit.op("Mul", mask, edit.op("ReduceMin", seen, edit.constant(np.array([0], np.int64)), keepdims=1))


def _shortest_for_all(edit: Edit, mask: ir.Value) -> ir.Value:
    seen = integer(edit, after_first(edit, mask))
    most = edit.op("ReduceMax", seen, edit.constant(np.array([0], np.int64)), keepdims=1)
    return edit.op("Mul", left_ignored(edit, mask), most)


LEFT_FAULTS = (
    _mask("left padding ignored", "llama", left_ignored, target="standard"),
    _mask("left padding ignored", "mistral w40", left_ignored, "past"),
    _mask("left padding ignored in decode steps", "qwen3", when(later(), left_ignored), "past"),
    _mask("left padding ignored in the prompt", "llama", when(has("input_ids", 1, "Greater", 3), left_ignored),
          "past"),
    _layers("left padding ignored in the second layer", "llama", in_layer(1, left_ignored)),
    _mask("left padding: only its first token is masked", "llama", _only_first_masked, target="plugin"),
    _mask("left padding: one token too many is masked", "qwen3", _one_more_after_left, "past"),
    _mask("left padding of the longest for all rows", "llama", _longest_for_all),
    _mask("left padding of the shortest for all rows", "llama", _shortest_for_all),
    _mask("left padding ignored above batch 2", "gemma2 w40", when(MANY_ROWS, left_ignored), "past"),
    _mask("left padding ignored at batch 1", "llama", when(ONE_ROW, left_ignored), target="plugin"),
)  # fmt: skip


def _only_last_masked(edit: Edit, mask: ir.Value) -> ir.Value:
    inner = sliced(edit, right_ignored(edit, mask), 0, -1, 1)
    return joined(edit, 1, inner, sliced(edit, mask, -1, _END, 1))


def _one_more_before_right(edit: Edit, mask: ir.Value) -> ir.Value:
    seen = before_last(edit, mask)
    after = joined(edit, 1, sliced(edit, seen, 1, _END, 1), sliced(edit, seen, -1, _END, 1))
    return edit.op("Mul", mask, integer(edit, after))


def _shortest_right_for_all(edit: Edit, mask: ir.Value) -> ir.Value:
    seen = integer(edit, before_last(edit, mask))
    return edit.op("Mul", mask, edit.op("ReduceMin", seen, edit.constant(np.array([0], np.int64)), keepdims=1))


RIGHT_FAULTS = (
    _mask("right padding ignored", "llama", right_ignored, target="plugin"),
    _mask("right padding ignored", "gemma2 w40", right_ignored, "past"),
    _mask("right padding ignored", "t5", right_ignored),
    _layers("right padding ignored in the second layer", "llama", in_layer(1, right_ignored), "past"),
    _mask("right padding: only its last token is masked", "llama", _only_last_masked, target="standard"),
    _mask("right padding: one token too many is masked", "mistral w40", _one_more_before_right),
    _mask("right padding of the longest for all rows", "t5", _shortest_right_for_all, target="standard"),
    _mask("right padding ignored above batch 2", "llama", when(MANY_ROWS, right_ignored)),
    _mask("right padding ignored at batch 1", "t5", when(ONE_ROW, right_ignored)),
    _mask("right padding ignored from the second row on", "t5", at_rows(1, right_ignored), target="primitives"),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- holes


def _all_before_hole_masked(edit: Edit, mask: ir.Value) -> ir.Value:
    """Only the tokens after the last hole are read."""
    open_ = edit.op("Or", truth(edit, mask), edit.op("Not", holes(edit, mask)))
    gaps = integer(edit, edit.op("Not", open_))
    behind = edit.op("CumSum", gaps, number(edit, 1), reverse=1)
    return edit.op("Mul", mask, integer(edit, edit.op("Equal", behind, number(edit, 0))))


def holes(edit: Edit, mask: ir.Value) -> ir.Value:
    """Whether a token is between the first and the last unmasked one, bool[batch, tokens]."""
    return edit.op("And", after_first(edit, mask), before_last(edit, mask))


def _all_after_hole_masked(edit: Edit, mask: ir.Value) -> ir.Value:
    gaps = integer(edit, edit.op("And", edit.op("Not", truth(edit, mask)), holes(edit, mask)))
    before = edit.op("CumSum", gaps, number(edit, 1))
    return edit.op("Mul", mask, integer(edit, edit.op("Equal", before, number(edit, 0))))


def _count_only(edit: Edit, mask: ir.Value) -> ir.Value:
    """A mask that reads only the number of unmasked tokens of a row, as kernels that take lengths do."""
    total = edit.op("ReduceSum", mask, edit.constant(np.array([1], np.int64)), keepdims=1)
    places = edit.op("Range", number(edit, 0), size(edit, MASK, 1), number(edit, 1))
    return integer(edit, edit.op("Less", places, total))


HOLE_FAULTS = (
    _mask("hole ignored", "llama", holes_ignored),
    _mask("hole ignored", "qwen3", holes_ignored, "past"),
    _mask("hole ignored", "t5", holes_ignored),
    _mask("hole ignored in decode steps", "llama", when(later(), holes_ignored), "past", "standard"),
    _mask("hole ignored at batch 1", "llama", when(ONE_ROW, holes_ignored), target="plugin"),
    _layers("hole ignored in the second layer", "llama", in_layer(1, holes_ignored)),
    _mask("everything before a hole is masked", "mistral w40", _all_before_hole_masked),
    _mask("everything after a hole is masked", "llama", _all_after_hole_masked, "past", "plugin"),
    _mask("only the number of unmasked tokens is read", "llama", _count_only, target="standard"),
    _mask("only the number of unmasked tokens is read", "t5", _count_only),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ sliding window


def window(width: int | None) -> Rule:
    """Causal attention to the last `width` tokens, or to all."""

    def rule(edit: Edit, seen: Seen) -> ir.Value:
        parts = [edit.op("LessOrEqual", seen.keys, seen.queries), seen.mask]
        if width is not None:
            parts.append(edit.op("Greater", seen.keys, edit.op("Sub", seen.queries, number(edit, width))))
        return all_of(edit, parts)

    return rule


def _window_if(condition: Condition, width: int | None) -> Rule:
    def rule(edit: Edit, seen: Seen) -> ir.Value:
        flag = condition(edit)
        return edit.op("Or", edit.op("And", flag, window(width)(edit, seen)),
                       edit.op("And", edit.op("Not", flag), seen.given))  # fmt: skip

    return rule


def chunks(width: int) -> Rule:
    """Causal attention within chunks of `width` tokens."""

    def rule(edit: Edit, seen: Seen) -> ir.Value:
        same = edit.op("Equal", *(edit.op("Div", v, number(edit, width)) for v in (seen.keys, seen.queries)))
        return all_of(edit, [edit.op("LessOrEqual", seen.keys, seen.queries), seen.mask, same])

    return rule


def _slid(name: str, model: str, rule: Rule, *layers: int, variant: str = "past", target: str = "ort") -> Fault:
    return Fault(name, model, target, attention(rule, *layers), variant=variant)


SLIDING_FAULTS = (
    _slid("window ignored", "mistral w40", window(None)),
    _slid("window ignored", "mistral w40", window(None), variant="plain", target="plugin"),
    _slid("window ignored in the second layer", "mistral w40", window(None), 1, target="standard"),
    _slid("window one shorter", "mistral w40", window(39), target="primitives"),
    _slid("window one longer", "mistral w40", window(41)),
    _slid("window one longer in one layer", "mistral w40", window(41), 0, variant="plain"),
    _slid("window half as long", "gemma2 w40", window(20), 0),
    _slid("window of the sliding layer ignored", "gemma2 w40", window(None), 0, variant="plain"),
    _slid("window one longer", "gemma2 w40", window(41), 0, target="plugin"),
    _slid("window in the layer that has none", "gemma2 w40", window(40), 1),
    _slid("window ignored in decode steps", "mistral w40", _window_if(later(), None)),
    _slid("window only in decode steps", "mistral w40", _window_if(has("input_ids", 1, "Greater", 3), None)),
    _slid("chunks in place of a sliding window", "mistral w40", chunks(40), variant="plain"),
)  # fmt: skip

ATTENTION_FAULTS: dict[str, tuple[Fault, ...]] = {
    "attention mask": ATTENTION_MASK_FAULTS,
    "left padding": LEFT_FAULTS,
    "right padding": RIGHT_FAULTS,
    "hole in the mask": HOLE_FAULTS,
    "sliding window": SLIDING_FAULTS,
}
