"""Faults of the KV cache: what is read from it, what is appended, and what is returned."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..faults import Fault, Plant
from ..surgery import Edit
from .graph_values import (
    Condition,
    Make,
    at_last,
    at_rows,
    both,
    has,
    joined,
    later,
    real,
    replace,
    rewired,
    sliced,
    times,
    when,
)

_END = np.iinfo(np.int64).max
MANY_TOKENS = both(later(), has("input_ids", 1, "Greater", 1))


def past(layer: int, what: str) -> str:
    return f"past_key_values.{layer}.{what}"


def present(layer: int, what: str) -> str:
    return f"present.{layer}.{what}"


def returned(name: str, make: Make) -> Plant:
    """A tensor of the cache is returned wrongly; the model itself reads the right one."""
    return rewired(name, make, lambda node: False)


def read(name: str, make: Make) -> Plant:
    """The model reads a wrong tensor; the right one is returned."""

    def plant(edit: Edit) -> None:
        value = edit.value(name)
        uses = list(value.uses())
        new = make(edit, value)
        for node, index in uses:
            if node.op_type != "Shape":
                node.replace_input_with(index, new)

    return plant


def exchanged(first: str, second: str) -> Plant:
    """Two tensors of the past are exchanged."""

    def plant(edit: Edit) -> None:
        a, b = edit.value(first), edit.value(second)
        of_a, of_b = list(a.uses()), list(b.uses())
        for value, uses in ((b, of_a), (a, of_b)):
            for node, index in uses:
                if node.op_type != "Shape":
                    node.replace_input_with(index, value)

    return plant


def outputs_exchanged(first: str, second: str) -> Plant:
    """Two tensors of the cache are returned under each other's name."""

    def plant(edit: Edit) -> None:
        a, b = edit.value(first), edit.value(second)
        a.name, b.name = "exchanged", first
        a.name = second
        places = {id(value): index for index, value in enumerate(edit.graph.outputs)}
        i, j = places[id(a)], places[id(b)]
        edit.graph.outputs[i], edit.graph.outputs[j] = b, a

    return plant


def appended_first(name: str, *, if_: Condition | None = None) -> Plant:
    """New tokens are put in front of the past."""

    def plant(edit: Edit) -> None:
        node = edit.value(name).producer()
        assert node is not None
        old, new = node.inputs
        assert old is not None
        assert new is not None

        def make(edit: Edit, value: ir.Value) -> ir.Value:
            turned = joined(edit, 2, new, old)
            return turned if if_ is None else edit.op("Where", if_(edit), turned, value)

        replace(edit, node.outputs[0], make)

    return plant


def new_tokens(name: str, make: Make) -> Plant:
    """A change of what is appended."""

    def plant(edit: Edit) -> None:
        node = edit.value(name).producer()
        assert node is not None
        assert node.inputs[1] is not None
        node.replace_input_with(1, make(edit, node.inputs[1]))

    return plant


def _zeros(edit: Edit, value: ir.Value) -> ir.Value:
    return edit.op("Mul", value, real(edit, 0.0, value))


def _oldest_lost(edit: Edit, value: ir.Value) -> ir.Value:
    """The first token of the past is overwritten by the second."""
    first = sliced(edit, value, 1, 2, 2)
    return joined(edit, 2, first, sliced(edit, value, 1, _END, 2))


def _reversed(axis: int) -> Make:
    def make(edit: Edit, value: ir.Value) -> ir.Value:
        bounds = (edit.constant(np.array([n], np.int64)) for n in (-1, -_END, axis, -1))
        return edit.op("Slice", value, *bounds)

    return make


def _rounded(edit: Edit, value: ir.Value) -> ir.Value:
    return edit.op("Cast", edit.op("Cast", value, to=int(ir.DataType.BFLOAT16)), to=int(ir.DataType.FLOAT))


def _cache(name: str, model: str, plant: Plant, target: str = "ort") -> Fault:
    return Fault(name, model, target, plant, variant="past")


CACHE = (
    _cache("past of the other layer", "llama", exchanged(past(0, "key"), past(1, "key"))),
    _cache("past of the other layer", "qwen3", exchanged(past(0, "value"), past(1, "value")), "standard"),
    _cache("key for value in the past", "llama", exchanged(past(1, "key"), past(1, "value"))),
    _cache("past values dropped", "llama", read(past(0, "value"), _zeros)),
    _cache("past keys dropped", "mistral w40", read(past(1, "key"), _zeros), "plugin"),
    _cache("the oldest token of the past overwritten", "llama",
           read(past(0, "key"), _oldest_lost)),
    _cache("new tokens in front of the past: keys", "llama", appended_first(present(0, "key"))),
    _cache("new tokens in front of the past: values", "gemma2 w40", appended_first(present(1, "value"))),
    _cache("new tokens in front of the past if they are several", "llama",
           appended_first(present(0, "value"), if_=MANY_TOKENS), "primitives"),
    _cache("several new tokens appended in reverse order", "qwen3",
           new_tokens(present(1, "key"), when(MANY_TOKENS, _reversed(2)))),
    _cache("heads of the past in reverse order", "llama", read(past(1, "value"), _reversed(1))),
    _cache("rows of the past in reverse order", "llama", read(past(0, "key"), _reversed(0)), "standard"),
    _cache("past wrong from the second row on", "mistral w40", read(past(0, "value"), at_rows(1, times(1.1)))),
    _cache("returned keys scaled, logits of this call right", "llama", returned(present(0, "key"), times(1.01))),
    _cache("returned values of the last layer wrong", "qwen3", returned(present(1, "value"), times(1.05)), "plugin"),
    _cache("the last token's returned key is zero", "llama",
           returned(present(1, "key"), at_last(_zeros, axis=2))),
    _cache("returned tensors of two layers exchanged", "llama",
           outputs_exchanged(present(0, "key"), present(1, "key")), "standard"),
    _cache("returned keys and values exchanged", "gemma2 w40",
           outputs_exchanged(present(1, "key"), present(1, "value"))),
    _cache("returned cache wrong from the third step on", "llama",
           returned(present(1, "value"), when(has(past(0, "key"), 2, "Greater", 9), times(1.1)))),
    _cache("past read wrongly from the third step on", "llama",
           read(past(1, "key"), when(has(past(0, "key"), 2, "Greater", 9), times(1.2)))),
    _cache("returned cache wrong only after a call of several tokens", "llama",
           returned(present(0, "value"), when(MANY_TOKENS, times(1.1))), "plugin"),
    _cache("past read wrongly only by a call of several tokens", "mistral w40",
           read(past(0, "key"), when(MANY_TOKENS, times(0.9)))),
    _cache("past wrong if it contains more than 50 tokens", "llama",
           read(past(0, "value"), when(has(past(0, "key"), 2, "Greater", 50), times(1.1)))),
    _cache("past wrong at batch above 2", "llama",
           read(past(0, "value"), when(has("input_ids", 0, "Greater", 2), times(1.1)))),
    _cache("returned values rounded to bfloat16", "llama", returned(present(0, "value"), _rounded)),
)  # fmt: skip

CACHE_FAULTS: dict[str, tuple[Fault, ...]] = {"KV cache": CACHE}
