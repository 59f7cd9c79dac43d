"""Faults of token embeddings, of the output head, and of some sizes of the batch or lengths only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ..faults import Fault, Plant
from ..surgery import Array, Edit
from .graph_values import (
    Condition,
    Make,
    all_of,
    at_last,
    at_rows,
    both,
    chained,
    divides,
    has,
    later,
    number,
    real,
    replace,
    rewired,
    sliced,
    times,
    when,
)

IDS, DECODER_IDS, LOGITS = "input_ids", "decoder_input_ids", "logits"
_END = np.iinfo(np.int64).max


# ----------------------------------------------------------------------------------------------------------- embedding


def table(change: Callable[[Array], Array], ids: str = IDS) -> Plant:
    """Another embedding table for the readers of some token ids."""
    return lambda edit: edit.change_constant(edit.node("Gather", after=ids), 0, change)


def row(index: int, factor: float) -> Callable[[Array], Array]:
    def change(array: Array) -> Array:
        changed = array.copy()
        changed[index] = changed[index] * factor
        return changed

    return change


def rows_of(first: int, second: int) -> Callable[[Array], Array]:
    def change(array: Array) -> Array:
        changed = array.copy()
        changed[[first, second]] = array[[second, first]]
        return changed

    return change


def _eight_bits(array: Array) -> Array:
    step = np.abs(array).max() / 127
    return np.asarray(np.round(array / step) * step)


def _ids(make: Make, name: str = IDS) -> Plant:
    return rewired(name, make)


def _at_most(most: int) -> Make:
    return lambda edit, ids: edit.op("Min", ids, number(edit, most))


def _modulo(divisor: int) -> Make:
    return lambda edit, ids: edit.op("Mod", ids, number(edit, divisor))


def _unknown_from(first: int) -> Make:
    return lambda edit, ids: edit.op("Where", edit.op("GreaterOrEqual", ids, number(edit, first)), number(edit, 3), ids)


def embedding_scaled(factor: float) -> Plant:
    return lambda edit: replace(edit, edit.node("Gather", after=IDS).outputs[0], times(factor))


def _embedding(name: str, model: str, plant: Plant, target: str = "ort", variant: str = "plain") -> Fault:
    return Fault(name, model, target, plant, variant=variant)


EMBEDDING_FAULTS = (
    _embedding("row of the end token 10% larger", "llama", table(row(2, 1.1))),
    _embedding("row of the start token negated", "qwen3", table(row(1, -1.0)), "standard", "past"),
    _embedding("row of the padding token zero", "gemma2 w40", table(row(0, 0.0)), "ort", "past"),
    _embedding("row of the padding token zero", "llama", table(row(0, 0.0)), "primitives"),
    _embedding("last row zero", "llama", table(row(-1, 0.0)), "plugin"),
    _embedding("last row zero", "t5", table(row(-1, 0.0), DECODER_IDS)),
    _embedding("row of the start token of the decoder wrong", "t5", table(row(0, 1.5), DECODER_IDS), "standard"),
    _embedding("one row of the decoder 10% larger", "t5", table(row(41, 1.1), DECODER_IDS)),
    _embedding("one row of the encoder 10% larger", "t5", table(row(41, 1.1))),
    _embedding("one row 10% larger", "mistral w40", table(row(50, 1.1)), "ort", "past"),
    _embedding("two rows exchanged", "llama", table(rows_of(60, 61)), "ort", "past"),
    _embedding("rows of the start and the end token exchanged", "t5", table(rows_of(0, 1), DECODER_IDS)),
    _embedding("ids clamped to the last but one", "llama", _ids(_at_most(95)), "ort", "past"),
    _embedding("ids clamped to the last but one", "t5", _ids(_at_most(95), DECODER_IDS), "primitives"),
    _embedding("ids modulo 64", "gemma2 w40", _ids(_modulo(64)), "plugin"),
    _embedding("ids from 94 on are unknown", "qwen3", _ids(_unknown_from(94))),
    _embedding("table rounded to 8 bits", "llama", table(_eight_bits), "standard"),
    _embedding("embedding 1% larger", "gemma2 w40", embedding_scaled(1.01), "ort", "past"),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- head


def head(change: Callable[[Array], Array]) -> Plant:
    """Another weight of the output head."""

    def plant(edit: Edit) -> None:
        product = next(n for n in reversed(list(edit.graph)) if n.op_type == "MatMul")
        edit.change_constant(product, 1, change)

    return plant


def _class(index: int, factor: float) -> Callable[[Array], Array]:
    def change(array: Array) -> Array:
        changed = array.copy()
        changed[:, index] = changed[:, index] * factor
        return changed

    return change


def softcap_missing(edit: Edit) -> None:
    """The last tanh, its division and its product are left out."""
    tanh = next(n for n in reversed(list(edit.graph)) if n.op_type == "Tanh")
    division = tanh.inputs[0].producer() if tanh.inputs[0] is not None else None
    assert division is not None
    raw = division.inputs[0]
    replace(edit, edit.value(LOGITS), lambda e, v: e.op("Identity", raw))


def _capped(most: float) -> Make:
    return lambda edit, value: edit.op(
        "Mul", edit.op("Tanh", edit.op("Div", value, real(edit, most, value))), real(edit, most, value)
    )


def _clipped(most: float) -> Make:
    return lambda edit, value: edit.op("Clip", value, real(edit, -most, value), real(edit, most, value))


def _log_softmax(edit: Edit, value: ir.Value) -> ir.Value:
    return edit.op("LogSoftmax", value, axis=-1)


def _head(name: str, model: str, plant: Plant, target: str = "ort", variant: str = "plain") -> Fault:
    return Fault(name, model, target, plant, variant=variant)


HEAD_FAULTS = (
    _head("logits 1% larger", "llama", rewired(LOGITS, times(1.01))),
    _head("logits of one class 10% larger", "qwen3", head(_class(-1, 1.1)), "standard", "past"),
    _head("logits of the end token zero", "llama", head(_class(2, 0.0)), "plugin"),
    _head("two classes exchanged", "mistral w40", head(lambda a: a[:, [1, 0, *range(2, a.shape[1])]])),
    _head("head in bfloat16", "llama", head(lambda a: a.astype(ir.DataType.BFLOAT16.numpy()).astype(a.dtype)),
          "primitives"),
    _head("softcap missing", "gemma2 w40", softcap_missing),
    _head("softcap missing", "gemma2 w40", softcap_missing, "plugin", "past"),
    _head("softcap of 20 applied again", "gemma2 w40", rewired(LOGITS, _capped(20.0)), "primitives"),
    _head("a softcap of 30 that the model does not have", "llama", rewired(LOGITS, _capped(30.0)), "standard"),
    _head("logits clipped at 2", "qwen3", rewired(LOGITS, _clipped(2.0))),
    _head("log probabilities in place of logits", "t5", rewired(LOGITS, _log_softmax)),
    _head("scale of tied embeddings missing", "t5", rewired(LOGITS, times(32.0**0.5)), "standard"),
    _head("logits of the decode steps 2% larger", "llama", rewired(LOGITS, when(later(), times(1.02))), "ort", "past"),
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------- batch, length


def _rolled(edit: Edit, value: ir.Value) -> ir.Value:
    """Each row is the row before it."""
    return edit.op("Concat", sliced(edit, value, -1, _END, 0), sliced(edit, value, 0, -1, 0), axis=0)


def _rows_averaged(edit: Edit, value: ir.Value) -> ir.Value:
    mean = edit.op("ReduceMean", value, edit.constant(np.array([0], np.int64)), keepdims=1)
    return edit.op("Add", edit.op("Mul", value, real(edit, 0.99, value)), edit.op("Mul", mean, real(edit, 0.01, value)))


def rows(op_type: str, wanted: int) -> Condition:
    return has(IDS, 0, op_type, wanted)


def tokens(op_type: str, wanted: int) -> Condition:
    return has(IDS, 1, op_type, wanted)


def embedded(make: Make) -> Plant:
    """A change of the embedded tokens."""
    return lambda edit: replace(edit, edit.node("Gather", after=IDS).outputs[0], make)


_WRONG = times(1.05)


def _batch(name: str, model: str, plant: Plant, target: str = "ort", variant: str = "plain") -> Fault:
    return Fault(name, model, target, plant, variant=variant)


BATCH_FAULTS = (
    _batch("wrong from the second row on", "llama", rewired(LOGITS, at_rows(1, _WRONG))),
    _batch("wrong from the third row on", "mistral w40", embedded(at_rows(2, _WRONG)), "standard", "past"),
    _batch("wrong from the fifth row on", "gemma2 w40", embedded(at_rows(4, _WRONG))),
    _batch("wrong at batch 1", "qwen3", embedded(when(rows("Equal", 1), _WRONG)), "plugin", "past"),
    _batch("wrong at batch 2", "llama", embedded(when(rows("Equal", 2), _WRONG)), "primitives"),
    _batch("wrong at batch 5", "llama", embedded(when(rows("Equal", 5), _WRONG)), "ort", "past"),
    _batch("wrong above batch 2", "t5", embedded(when(rows("Greater", 2), _WRONG))),
    _batch("wrong above batch 4", "qwen3", rewired(LOGITS, when(rows("Greater", 4), _WRONG)), "standard"),
    _batch("rows mixed at batch above 1", "llama", embedded(_rolled), "plugin"),
    _batch("rows returned in another order", "mistral w40", rewired(LOGITS, _rolled), "ort", "past"),
    _batch("1% of the other rows in each row", "llama", embedded(_rows_averaged)),
    _batch("the last row wrong", "llama", rewired(LOGITS, when(rows("Greater", 1), at_last(_WRONG, axis=0))),
           "standard", "past"),
)  # fmt: skip

LENGTH_FAULTS = (
    _batch("wrong at length 1", "llama", embedded(when(tokens("Equal", 1), _WRONG))),
    _batch("wrong at length 1 of a prompt", "qwen3",
           embedded(when(lambda e: all_of(e, [tokens("Equal", 1)(e), e.op("Not", later()(e))]), _WRONG)), "ort",
           "past"),
    _batch("wrong at length 2", "llama", embedded(when(tokens("Equal", 2), _WRONG)), "standard"),
    _batch("wrong at odd lengths", "mistral w40", embedded(when(divides(IDS, 1, 2, 1), _WRONG)), "plugin"),
    _batch("wrong at even lengths", "llama", rewired(LOGITS, when(divides(IDS, 1, 2, 0), _WRONG)), "primitives"),
    _batch("wrong at lengths that 8 divides", "llama", embedded(when(divides(IDS, 1, 8, 0), _WRONG))),
    _batch("wrong at lengths that 8 does not divide", "t5", embedded(when(both(tokens("Greater", 8),
           lambda e: e.op("Not", divides(IDS, 1, 8, 0)(e))), _WRONG))),
    _batch("wrong above length 32", "gemma2 w40", embedded(when(tokens("Greater", 32), _WRONG)), "ort", "past"),
    _batch("wrong above length 60", "qwen3", embedded(when(tokens("Greater", 60), _WRONG)), "plugin"),
    _batch("wrong above length 100", "llama", embedded(when(tokens("Greater", 100), _WRONG))),
    _batch("the last token wrong", "llama", rewired(LOGITS, at_last(_WRONG)), "standard"),
    _batch("the last token of a long prompt wrong", "mistral w40",
           rewired(LOGITS, when(tokens("Greater", 16), at_last(_WRONG))), "ort", "past"),
    _batch("the first token wrong", "t5", rewired("encoder_last_hidden_state", chained(
           lambda e, v: e.op("Concat", times(1.05)(e, sliced(e, v, 0, 1, 1)), sliced(e, v, 1, _END, 1), axis=1)))),
)  # fmt: skip

TOKEN_FAULTS: dict[str, tuple[Fault, ...]] = {
    "token embedding": EMBEDDING_FAULTS,
    "output head": HEAD_FAULTS,
    "batch": BATCH_FAULTS,
    "length": LENGTH_FAULTS,
}
