"""Faults of positions and of rotary embeddings."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ..faults import Fault, Plant
from ..surgery import Array, Edit
from .graph_values import (
    Make,
    count,
    has,
    integer,
    later,
    number,
    past_size,
    real,
    replace,
    rewired,
    size,
    sliced,
    when,
)

POSITIONS = "position_ids"


def _positions(name: str, model: str, make: Make, target: str = "ort") -> Fault:
    return Fault(name, model, target, rewired(POSITIONS, make), variant="past")


def _counted(edit: Edit, positions: ir.Value) -> ir.Value:
    """Positions that count from the number of tokens in the KV cache."""
    past = past_size(edit)
    places = count(edit, past, edit.op("Add", past, size(edit, "input_ids", 1)))
    return edit.op("Expand", places, edit.op("Shape", positions))


def _from_first(edit: Edit, positions: ir.Value) -> ir.Value:
    """Positions that count from each row's first one."""
    places = count(edit, number(edit, 0), size(edit, "input_ids", 1))
    return edit.op("Add", sliced(edit, positions, 0, 1, 1), places)


def _of_first_row(edit: Edit, positions: ir.Value) -> ir.Value:
    return edit.op("Expand", sliced(edit, positions, 0, 1, 0), edit.op("Shape", positions))


def _at_most(most: int) -> Make:
    return lambda edit, positions: edit.op("Min", positions, number(edit, most))


def _plus(shift: int) -> Make:
    return lambda edit, positions: edit.op("Add", positions, number(edit, shift))


def _doubled(edit: Edit, positions: ir.Value) -> ir.Value:
    return edit.op("Mul", positions, number(edit, 2))


def _modulo(divisor: int) -> Make:
    return lambda edit, positions: edit.op("Mod", positions, number(edit, divisor))


def _signed_byte(edit: Edit, positions: ir.Value) -> ir.Value:
    return edit.op("Mod", positions, number(edit, 127))


POSITION_FAULTS = (
    _positions("positions ignored", "llama", _counted),
    _positions("positions ignored", "gemma2 w40", _counted, "primitives"),
    _positions("positions ignored in decode steps", "qwen3", when(later(), _counted)),
    _positions("positions ignored in the prompt", "mistral w40",
               when(has("input_ids", 1, "Greater", 3), _counted), "standard"),
    _positions("positions count from the first of each row", "llama", _from_first, "plugin"),
    _positions("positions of the first row for all rows", "llama", _of_first_row),
    _positions("positions of the first row for all rows", "qwen3", _of_first_row, "standard"),
    _positions("positions doubled", "llama", _doubled, "standard"),
    _positions("positions at most 10", "llama", _at_most(10)),
    _positions("positions at most 100", "llama", _at_most(100), "plugin"),
    _positions("positions modulo 64", "qwen3", _modulo(64)),
    _positions("positions modulo 127", "llama", _signed_byte),
    _positions("positions shifted by one in decode steps", "llama", when(later(), _plus(1))),
    _positions("positions shifted by one in decode steps", "mistral w40", when(later(), _plus(-1)), "primitives"),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- rotary


def _angles(edit: Edit) -> ir.Node:
    """The node that multiplies positions by frequencies."""
    return next(node for node in edit.graph if any("inv_freq" in str(v.name) for v in node.inputs if v is not None))


def frequencies(change: Callable[[Array], Array]) -> Plant:
    """Other frequencies."""

    def plant(edit: Edit) -> None:
        node = _angles(edit)
        index = next(n for n, v in enumerate(node.inputs) if v is not None and "inv_freq" in str(v.name))
        edit.change_constant(node, index, change)

    return plant


def rotated_positions(make: Make) -> Plant:
    """Another function of the positions, float32[batch, tokens, 1], before they are multiplied by frequencies."""

    def plant(edit: Edit) -> None:
        node = _angles(edit)
        value = next(v for v in node.inputs if v is not None and "inv_freq" not in str(v.name))
        replace(edit, value, make, lambda reader: reader is node)

    return plant


def _one_off(index: int, factor: float) -> Callable[[Array], Array]:
    def change(array: Array) -> Array:
        changed = array.copy()
        changed[..., index] = changed[..., index] * factor
        return changed

    return change


def _capped(most: float) -> Make:
    return lambda edit, value: edit.op("Min", value, real(edit, most))


def _stretched_beyond(start: float, factor: float) -> Make:
    """Positions beyond `start` are scaled, as by an extension of the context that the model does not have."""

    def make(edit: Edit, value: ir.Value) -> ir.Value:
        return edit.op("Where", edit.op("Greater", value, real(edit, start)),
                       edit.op("Mul", value, real(edit, factor)), value)  # fmt: skip

    return make


def sines_and_cosines(change: str) -> Plant:
    """The sine and cosine exchanged, or the sine negated."""

    def plant(edit: Edit) -> None:
        cosine, sine = edit.node("Cos"), edit.node("Sin")
        if change == "exchanged":
            cosine.op_type, sine.op_type = "Sin", "Cos"
        else:
            replace(edit, sine.outputs[0], lambda e, v: e.op("Neg", v))

    return plant


def _rounded(dtype: ir.DataType) -> Make:
    return lambda edit, value: edit.op("Cast", edit.op("Cast", value, to=int(dtype)), to=int(ir.DataType.FLOAT))


def angles_rounded(dtype: ir.DataType) -> Plant:
    """The angles rounded to a half type."""
    return lambda edit: replace(edit, _angles(edit).outputs[0], _rounded(dtype))


def unrotated(which: str, layer: int) -> Plant:
    """The keys or queries of a layer are not rotated: the rotation's angle is 0."""

    def plant(edit: Edit) -> None:
        negs = [node for node in edit.graph if node.op_type == "Neg"]
        neg = negs[2 * layer + (which == "keys")]
        half = neg.outputs[0].uses()[0].node  # [-x2, x1]
        product = half.outputs[0].uses()[0].node
        rotated = product.outputs[0].uses()[0].node
        plain = next(v for v in rotated.inputs if v is not None and v is not product.outputs[0])
        source = plain.producer()
        assert source is not None
        replace(edit, rotated.outputs[0], lambda e, v: e.op("Identity", source.inputs[0]))

    return plant


def rounded_to_integers(edit: Edit, value: ir.Value) -> ir.Value:
    """Positions in steps of two."""
    return edit.op("Cast", edit.op("Mul", edit.op("Div", integer(edit, value), number(edit, 2)), number(edit, 2)),
                   to=int(ir.DataType.FLOAT))  # fmt: skip


def _rotary(name: str, model: str, plant: Plant, variant: str = "plain", target: str = "ort") -> Fault:
    return Fault(name, model, target, plant, variant=variant)


def _other_base(array: Array) -> Array:
    exponents = np.arange(array.size) / array.size
    return np.asarray(500000.0**-exponents).reshape(array.shape)


ROTARY_FAULTS = (
    _rotary("base 500000 in place of 10000", "llama", frequencies(_other_base)),
    _rotary("base 500000 in place of 10000", "gemma2 w40", frequencies(_other_base), "past"),
    _rotary("all frequencies 1% larger", "llama", frequencies(lambda a: a * 1.01), "past", "standard"),
    _rotary("the lowest frequency doubled", "llama", frequencies(_one_off(-1, 2.0)), target="plugin"),
    _rotary("the lowest frequency 0", "llama", frequencies(_one_off(-1, 0.0)), "past"),
    _rotary("frequencies in reverse order", "qwen3", frequencies(lambda a: a[..., ::-1].copy()), target="primitives"),
    _rotary("positions capped at 30", "llama", rotated_positions(_capped(30.0))),
    _rotary("positions capped at 60", "qwen3", rotated_positions(_capped(60.0)), "past"),
    _rotary("positions capped at 100", "llama", rotated_positions(_capped(100.0))),
    _rotary("positions capped at 100", "mistral w40", rotated_positions(_capped(100.0)), "past"),
    _rotary("positions beyond 32 scaled", "llama", rotated_positions(_stretched_beyond(32.0, 0.5))),
    _rotary("positions beyond 100 scaled", "llama", rotated_positions(_stretched_beyond(100.0, 0.5)), "past"),
    _rotary("positions in steps of two", "llama", rotated_positions(rounded_to_integers), "past", "plugin"),
    _rotary("sine and cosine exchanged", "llama", sines_and_cosines("exchanged"), target="standard"),
    _rotary("sine negated", "mistral w40", sines_and_cosines("negated"), "past"),
    _rotary("angles rounded to float16", "llama", angles_rounded(ir.DataType.FLOAT16)),
    _rotary("angles rounded to bfloat16", "gemma2 w40", angles_rounded(ir.DataType.BFLOAT16), "past"),
    _rotary("keys of the second layer not rotated", "llama", unrotated("keys", 1), "past"),
    _rotary("queries of the first layer not rotated", "llama", unrotated("queries", 0), target="primitives"),
)  # fmt: skip

FAULTS_OF_POSITIONS: dict[str, tuple[Fault, ...]] = {"position ids": POSITION_FAULTS, "rotary": ROTARY_FAULTS}
