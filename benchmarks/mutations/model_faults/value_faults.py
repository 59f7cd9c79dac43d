"""Faults that only some values show, and operators with random output."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..faults import Fault, Plant
from ..surgery import Edit
from .graph_values import Make, both, has, later, real, replace, rewired, times, when

# Modules between norms whose inputs or outputs are changed.
GATE, DOWN = "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.down_proj"


def output_of(scope: str, make: Make) -> Plant:
    """A change of what a Linear returns."""
    return lambda edit: replace(edit, edit.linear(scope).outputs[0], make)


def input_of(norm: str, make: Make) -> Plant:
    """A change of what a norm reads, after its residual add."""

    def plant(edit: Edit) -> None:
        found = edit.norm(norm)
        replace(edit, found.x, make, lambda reader: reader in found.nodes)

    return plant


def clamped_at_sigmas(count: float) -> Make:
    """Values clamped at some standard deviations of their row."""

    def make(edit: Edit, value: ir.Value) -> ir.Value:
        axes = edit.constant(np.array([-1], np.int64))
        deviation = edit.op("Sqrt", edit.op("ReduceMean", edit.op("Mul", value, value), axes, keepdims=1))
        bound = edit.op("Mul", deviation, real(edit, count, value))
        return edit.op("Max", edit.op("Min", value, bound), edit.op("Neg", bound))

    return make


def clamped(most: float) -> Make:
    """Values clamped at a size."""
    return lambda edit, value: edit.op("Clip", value, real(edit, -most, value), real(edit, most, value))


def flushed(least: float) -> Make:
    """Smaller values are 0."""

    def make(edit: Edit, value: ir.Value) -> ir.Value:
        small = edit.op("Less", edit.op("Abs", value), real(edit, least, value))
        return edit.op("Where", small, real(edit, 0.0, value), value)

    return make


def large_off(start: float) -> Make:
    """Larger values are 1% too large."""

    def make(edit: Edit, value: ir.Value) -> ir.Value:
        large = edit.op("Greater", edit.op("Abs", value), real(edit, start, value))
        return edit.op("Where", large, times(1.01)(edit, value), value)

    return make


def negative_off(edit: Edit, value: ir.Value) -> ir.Value:
    """Negative values are 1% too large."""
    return edit.op("Where", edit.op("Less", value, real(edit, 0.0, value)), times(1.01)(edit, value), value)


def last_channel_zero(edit: Edit, value: ir.Value) -> ir.Value:
    """The last channel is 0 if it is positive."""
    ones = np.ones(32, np.float32)
    ones[-1] = 0
    return edit.op("Mul", value, edit.constant(ones))


def _value(name: str, model: str, plant: Plant, target: str = "ort", dtype: str = "float32") -> Fault:
    return Fault(name, model, target, plant, dtype=dtype)


NORM, LAST = "model.layers.1.input_layernorm", "model.norm"
VALUE = (
    _value("a norm's input clamped at 2.5 sigma", "llama", input_of("model.layers.0.input_layernorm",
           clamped_at_sigmas(2.5))),
    _value("values above 2 sigma of a norm's input clamped", "mistral w40", input_of(LAST, clamped_at_sigmas(2.0)),
           "standard"),
    _value("an input clamped at 4 sigma", "assorted", rewired("x", clamped_at_sigmas(4.0))),
    _value("an input clamped at 100", "assorted", rewired("x", clamped(100.0)), "standard"),
    _value("an input clamped at 1000", "assorted", rewired("x", clamped(1000.0)), "primitives"),
    _value("an input clamped at 2000", "assorted", rewired("x", clamped(2000.0)), "plugin"),
    _value("inputs below 1e-4 flushed to zero", "assorted", rewired("x", flushed(1e-4)), "primitives"),
    _value("inputs above 500 1% off", "assorted", rewired("x", large_off(500.0))),
    _value("inputs above 20 1% off", "assorted", rewired("x", large_off(20.0)), "plugin"),
    _value("negative inputs 1% off", "assorted", rewired("x", negative_off), "standard"),
    _value("activations clamped at 0.8", "llama", output_of(GATE, clamped(0.8)), "plugin"),
    _value("large activations 1% off", "qwen3", output_of(GATE, large_off(1.5))),
    _value("small activations flushed to zero", "gemma2 w40", output_of(GATE, flushed(0.05)), "standard"),
    _value("large results of a Linear 1% off", "llama", output_of(DOWN, large_off(0.3)), "primitives"),
    _value("logits above 2 1% off", "llama", rewired("logits", large_off(2.0))),
    _value("one channel of a Linear dropped", "mistral w40", output_of(DOWN, last_channel_zero)),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- randomness


def noise(scale: float) -> Make:
    """Normally distributed noise is added."""

    def make(edit: Edit, value: ir.Value) -> ir.Value:
        drawn = edit.op("RandomNormalLike", value, scale=scale)
        return edit.op("Add", value, drawn)

    return make


def dropout(edit: Edit, value: ir.Value) -> ir.Value:
    """Dropout in training mode, ratio 1%."""
    ratio, training = (edit.op("Squeeze", v) for v in (real(edit, 0.01, value), edit.constant(np.array(True))))
    return edit.op("Dropout", value, ratio, training)


def uniform_factor(edit: Edit, value: ir.Value) -> ir.Value:
    """Multiplied by a random number close to 1."""
    drawn = edit.op("RandomUniformLike", value, low=0.999, high=1.001)
    return edit.op("Mul", value, drawn)


def _random(name: str, model: str, plant: Plant, target: str = "ort", variant: str = "plain") -> Fault:
    return Fault(name, model, target, plant, variant=variant)


RANDOM = (
    _random("noise of 1e-3 in the logits", "llama", rewired("logits", noise(1e-3))),
    _random("noise of 1e-7 in the logits", "llama", rewired("logits", noise(1e-7)), "primitives"),
    _random("noise of 1e-7 before a norm", "qwen3", input_of(NORM, noise(1e-7)), "primitives", "past"),
    _random("dropout in training mode", "mistral w40", rewired("logits", dropout), "primitives"),
    _random("random factor of the results of a Linear", "llama", output_of(DOWN, uniform_factor), "plugin"),
    _random("random factor of the logits", "gemma2 w40", rewired("logits", uniform_factor)),
    _random("noise in a returned cache only", "llama",
            rewired("present.1.value", noise(1e-7), lambda node: False), "ort", "past"),
    _random("noise in decode steps only", "llama", rewired("logits", when(later(), noise(1e-7))), "ort", "past"),
    _random("noise in calls of several tokens on a filled cache only", "qwen3",
            rewired("logits", when(both(later(), has("input_ids", 1, "Greater", 1)), noise(1e-7))), "ort", "past"),
    _random("noise in long inputs only", "llama",
            rewired("logits", when(has("input_ids", 1, "Greater", 32), noise(1e-7)))),
    _random("noise in the states of the encoder", "t5", rewired("encoder_last_hidden_state", noise(1e-7))),
    _random("noise at batch above 1 only", "assorted", rewired("x", when(has("x", 0, "Greater", 1), noise(1e-7)))),
)  # fmt: skip

VALUE_FAULTS: dict[str, tuple[Fault, ...]] = {"values only": VALUE, "randomness": RANDOM}
