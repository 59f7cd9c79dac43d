"""Faults of encoder-decoders: the encoder's mask, lengths that are mixed up, buckets of relative positions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..faults import Fault, Plant
from ..surgery import Edit
from .graph_values import Make, all_ones, at_rows, divides, has, number, real, replace, rewired, scores_of, times, when

ENCODED = "encoder_last_hidden_state"
_END = np.iinfo(np.int64).max


def cross_masks_ignored(edit: Edit) -> None:
    """Every key of the encoder is read in cross attention; the encoder's own attention stays right."""
    for add in _cross(edit):
        bias = add.inputs[1]
        add.replace_input_with(1, edit.op("Mul", edit.op("Max", bias, real(edit, -1.0)), real(edit, 0.0)))


def _cross(edit: Edit) -> list[ir.Node]:
    """The nodes that add the mask of cross attention: after two layers of the encoder, every second one."""
    return scores_of(edit)[3::2]


def encoder_mask_ignored(edit: Edit) -> None:
    """Every key is read in the encoder's own attention; cross attention stays right."""
    value = edit.node("GatherND").outputs[0]
    first = next(iter(value.uses()))
    first.node.replace_input_with(first.idx, edit.op("Or", value, edit.op("Not", value)))


def buckets(make: Make, *, decoder: bool) -> Plant:
    """A function of the buckets of relative positions, int64[queries, keys]."""

    def plant(edit: Edit) -> None:
        side = "decoder" if decoder else "encoder"
        node = next(
            n for n in edit.graph
            if n.op_type == "Gather" and str(n.inputs[0].name).startswith(side)  # type: ignore[union-attr]
            and "relative_attention_bias" in str(n.inputs[0].name)  # type: ignore[union-attr]
        )  # fmt: skip
        value = node.inputs[1]
        assert value is not None
        replace(edit, value, make, lambda reader: reader is node)

    return plant


def _at_most(most: int) -> Make:
    return lambda edit, value: edit.op("Min", value, number(edit, most))


def _plus_one_from(first: int, most: int) -> Make:
    def make(edit: Edit, value: ir.Value) -> ir.Value:
        more = edit.op("Min", edit.op("Add", value, number(edit, 1)), number(edit, most))
        return edit.op("Where", edit.op("GreaterOrEqual", value, number(edit, first)), more, value)

    return make


def _one_sided(edit: Edit, value: ir.Value) -> ir.Value:
    """Tokens before and after share buckets."""
    return edit.op("Mod", value, number(edit, 16))


def _shifted(edit: Edit, value: ir.Value) -> ir.Value:
    """Each token is the one before it."""
    first, rest = ([0, 1], [0, -1])
    parts = []
    for start, end in (first, rest):
        bounds = (edit.constant(np.array([n], np.int64)) for n in (start, end, 1))
        parts.append(edit.op("Slice", value, *bounds))
    return edit.op("Concat", *parts, axis=1)


def _reversed_rows(edit: Edit, value: ir.Value) -> ir.Value:
    bounds = (edit.constant(np.array([n], np.int64)) for n in (-1, -_END, 0, -1))
    return edit.op("Slice", value, *bounds)


def inner(make: Make) -> Plant:
    """A change of the encoder's states for the decoder only."""

    def plant(edit: Edit) -> None:
        value = edit.value(ENCODED)
        uses = list(value.uses())
        new = make(edit, value)
        for node, index in uses:
            if node.op_type != "Shape":
                node.replace_input_with(index, new)

    return plant


def keys_beyond_decoder_masked(edit: Edit) -> None:
    """Cross attention reads only as many keys as the decoder has tokens: lengths are mixed up."""
    keys = edit.op("Range", number(edit, 0), _size(edit, "input_ids"), number(edit, 1))
    for add in _cross(edit):
        bias = add.inputs[1]
        beyond = edit.op("GreaterOrEqual", keys, _size(edit, "decoder_input_ids"))
        add.replace_input_with(1, edit.op("Where", beyond, real(edit, -3e38), bias))


def _size(edit: Edit, name: str) -> ir.Value:
    return edit.op("Gather", edit.op("Shape", edit.value(name)), number(edit, 1), axis=0)


def _t5(name: str, plant: Plant, target: str = "ort") -> Fault:
    return Fault(name, "t5", target, plant)


LONGER = has("decoder_input_ids", 1, "Greater", 8)

T5_FAULTS = (
    _t5("encoder mask ignored everywhere", rewired("attention_mask", all_ones)),
    _t5("encoder mask ignored in cross attention", cross_masks_ignored),
    _t5("encoder mask ignored in cross attention", cross_masks_ignored, "primitives"),
    _t5("encoder mask ignored in the encoder", encoder_mask_ignored, "standard"),
    _t5("cross attention reads as many keys as the decoder has tokens", keys_beyond_decoder_masked),
    _t5("encoder's buckets capped", buckets(_at_most(28), decoder=False)),
    _t5("decoder's buckets capped", buckets(_at_most(12), decoder=True), "plugin"),
    _t5("encoder's far buckets off by one", buckets(_plus_one_from(27, 31), decoder=False)),
    _t5("decoder's logarithmic buckets off by one", buckets(_plus_one_from(16, 31), decoder=True)),
    _t5("the last bucket of the encoder missing", buckets(_at_most(30), decoder=False), "standard"),
    _t5("the last bucket of the decoder missing", buckets(_at_most(30), decoder=True)),
    _t5("buckets of the encoder as in the decoder", buckets(_one_sided, decoder=False), "standard"),
    _t5("states of the encoder one token late", inner(_shifted)),
    _t5("states of the encoder in another order of rows", inner(_reversed_rows), "plugin"),
    _t5("states of the encoder wrong from the second row on", inner(at_rows(1, times(1.05)))),
    _t5("returned states of the encoder wrong", rewired(ENCODED, times(1.02), lambda node: False)),
    _t5("decoder's tokens shifted once more", rewired("decoder_input_ids", _shifted), "primitives"),
    _t5("wrong at decoder lengths above 8", rewired("logits", when(LONGER, times(1.05)))),
    _t5("wrong at odd decoder lengths",
        rewired("logits", when(divides("decoder_input_ids", 1, 2, 1), times(1.05))), "standard"),
)  # fmt: skip

ENCODER_DECODER_FAULTS: dict[str, tuple[Fault, ...]] = {"encoder-decoder": T5_FAULTS}
