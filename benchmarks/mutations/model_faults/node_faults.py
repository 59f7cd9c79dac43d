"""Faults of attentions that were captured as nodes: scale, softcap, sinks, heads, mask, and what the nodes read."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from rmsnorm_deploy.export.graph.metadata import ATTENTION_KEY, VALUES_KEY
from rmsnorm_deploy.export.lowering.in_place_cache import GROUPED

from ..faults import Fault, Plant
from ..surgery import FLOAT, FLOAT16, Array, Edit

_END = np.iinfo(np.int64).max
# The inputs of the two operators that have the mask, and of the second the one that has the sinks.
_BIAS, _GROUPED_BIAS, _GROUPED_SINK = 3, 10, 11
FIRST, SECOND = "model.layers.0.self_attn", "model.layers.1.self_attn"


def main_node(edit: Edit, path: str) -> ir.Node:
    """The main node of the attention of a module that is called once."""
    found = (json.loads(node.metadata_props.get(ATTENTION_KEY, "{}")) for node in edit.graph)
    return next(node for node, record in zip(edit.graph, found, strict=True) if record.get("path") == path)


def attribute(path: str, name: str, change: Callable[[float], float]) -> Plant:
    """Another value of a float attribute of the operator."""

    def plant(edit: Edit) -> None:
        node = main_node(edit, path)
        node.attributes[name] = ir.AttrFloat32(name, change(node.attributes[name].as_float()))

    return plant


def _flag(path: str, name: str, value: int) -> Plant:
    """An attribute that the operator does not have."""

    def plant(edit: Edit) -> None:
        main_node(edit, path).attributes[name] = ir.AttrInt64(name, value)

    return plant


def _without(path: str, name: str) -> Plant:
    """The operator without an attribute."""

    def plant(edit: Edit) -> None:
        del main_node(edit, path).attributes[name]

    return plant


def reads(path: str, role: str, make: Callable[[Edit, ir.Value], ir.Value]) -> Plant:
    """An attention that reads something else in place of its query, key or value."""

    def plant(edit: Edit) -> None:
        value = edit.value(json.loads(main_node(edit, path).metadata_props[VALUES_KEY])[role])
        uses = list(value.uses())
        new = make(edit, value)
        for node, index in uses:
            node.replace_input_with(index, new)

    return plant


def masked(path: str, make: Callable[[Edit, ir.Value], ir.Value | None]) -> Plant:
    """An operator with another mask."""

    def plant(edit: Edit) -> None:
        node = main_node(edit, path)
        place = _GROUPED_BIAS if node.op_type == GROUPED else _BIAS
        bias = node.inputs[place]
        assert bias is not None
        node.replace_input_with(place, make(edit, bias))

    return plant


def _heads_swapped(edit: Edit, value: ir.Value) -> ir.Value:
    """Those of the first two heads are exchanged."""
    assert value.shape is not None
    order = np.arange(int(value.shape[1]))  # type: ignore[call-overload]
    order[:2] = [1, 0]
    return edit.op("Gather", value, edit.constant(order.astype(np.int64)), axis=1)


def _rounded(edit: Edit, value: ir.Value) -> ir.Value:
    """Rounded to float16, as a cache of half the size would be."""
    return edit.op("Cast", edit.op("Cast", value, to=FLOAT16), to=FLOAT)


def _one_channel(edit: Edit, value: ir.Value) -> ir.Value:
    """One channel of each head is 1% larger."""
    assert value.shape is not None
    factor = np.ones(int(value.shape[-1]), np.float32)  # type: ignore[call-overload]
    factor[1] = 1.01
    return edit.op("Mul", value, edit.constant(factor))


def _shown(edit: Edit, bias: ir.Value) -> ir.Value:
    """Zeros."""
    return edit.op("Mul", bias, edit.constant(np.zeros(1, np.float32)))


def _shifted(edit: Edit, bias: ir.Value) -> ir.Value:
    """The column of each key is that of the next one."""
    last = edit.constant(np.array([-1], np.int64))
    ends = edit.constant(np.array([_END], np.int64))
    later = edit.op("Slice", bias, edit.constant(np.array([1], np.int64)), ends, last)
    return edit.op("Concat", later, edit.op("Slice", bias, last, ends, last), axis=-1)


def _weak(edit: Edit, bias: ir.Value) -> ir.Value:
    """Hidden keys get 4 less than others."""
    return edit.op("Max", bias, edit.constant(np.array([-4.0], np.float32)))


def _first_larger(array: Array) -> Array:
    changed = array.copy()
    changed[0] += 1.0
    return changed


def _constant(path: str, place: int, change: Callable[[Array], Array]) -> Plant:
    return lambda edit: edit.change_constant(main_node(edit, path), place, change)


def _fault(
    name: str, model: str, plant: Plant, path: str = FIRST, variant: str = "nodes", target: str = "ort"
) -> Fault:
    return Fault(name, model, target, plant, attentions=(path,), variant=variant)


_NODES = (
    _fault("scale 1% larger", "llama", attribute(FIRST, "scale", lambda scale: 1.01 * scale)),
    _fault("scale 1% larger", "qwen3", attribute(SECOND, "scale", lambda scale: 1.01 * scale), SECOND, "in place"),
    _fault("scale missing", "llama", attribute(SECOND, "scale", lambda _: 1.0), SECOND, "nodes past"),
    _fault("scale of a head twice as wide", "gemma3", attribute(FIRST, "scale", lambda scale: scale / np.sqrt(2.0))),
    _fault("softcap missing", "gemma2", _without(FIRST, "softcap")),
    _fault("softcap 1% larger", "gemma2", attribute(SECOND, "softcap", lambda cap: 1.01 * cap), SECOND, "nodes past"),
    _fault("sink of one head larger", "gpt_oss", _constant(FIRST, _GROUPED_SINK, _first_larger), variant="in place"),
    _fault("keys of two heads swapped", "llama", reads(FIRST, "key", _heads_swapped)),
    _fault("keys of two heads swapped", "qwen3", reads(SECOND, "key", _heads_swapped), SECOND, "nodes past",
           "standard"),
    _fault("values of two heads swapped", "llama", reads(SECOND, "value", _heads_swapped), SECOND, "nodes past"),
    _fault("values of two heads swapped", "gemma3", reads(FIRST, "value", _heads_swapped), target="primitives"),
    _fault("keys rounded to float16", "llama", reads(FIRST, "key", _rounded), variant="nodes past"),
    _fault("values rounded to float16", "qwen3", reads(SECOND, "value", _rounded), SECOND, "in place"),
    _fault("queries rounded to float16", "t5", reads("encoder.block.1.layer.0.SelfAttention", "query", _rounded),
           "encoder.block.1.layer.0.SelfAttention"),
    _fault("one channel of the queries 1% larger", "llama", reads(FIRST, "query", _one_channel), target="plugin"),
)  # fmt: skip

_MASKS = (
    _fault("mask ignored", "llama", masked(FIRST, _shown)),
    _fault("mask ignored", "llama", masked(SECOND, _shown), SECOND, "in place"),
    _fault("mask shifted by one key", "qwen3", masked(FIRST, _shifted), variant="nodes past"),
    _fault("hidden keys get a finite score", "llama", masked(SECOND, _weak), SECOND, "nodes past"),
    _fault("hidden keys get a finite score", "qwen3", masked(FIRST, _weak), variant="in place"),
    _fault("later keys hidden in an encoder", "t5",
           _flag("encoder.block.0.layer.0.SelfAttention", "is_causal", 1), "encoder.block.0.layer.0.SelfAttention"),
    _fault("a window of four tokens", "llama", _flag(FIRST, "local_window_size", 4), variant="in place"),
)  # fmt: skip

NODE_FAULTS: dict[str, tuple[Fault, ...]] = {"attention nodes": _NODES, "masks of attention nodes": _MASKS}
