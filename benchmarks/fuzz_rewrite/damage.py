"""Damage to an ONNX file: bytes, lengths, nodes, edges, names, attributes, tensors, types."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import AttributeProto, ModelProto, TensorProto, numpy_helper

NUMBERS = (-(1 << 63), -(1 << 31), -4, -2, -1, 0, 1, 2, 3, 4, 7, 8, 16, 1 << 31, (1 << 63) - 1)


def damaged(chance: random.Random, model: ModelProto) -> bytes:
    """The bytes of a copy of the model with one to three defects."""
    if chance.random() < 0.25:
        return _damaged_bytes(chance, model.SerializeToString())
    copy = ModelProto()
    copy.CopyFrom(model)
    for _ in range(chance.randint(1, 3)):
        chance.choice(DAMAGES)(chance, copy)
    data = copy.SerializeToString()
    return _damaged_bytes(chance, data) if chance.random() < 0.05 else data


def _damaged_bytes(chance: random.Random, data: bytes) -> bytes:
    content = bytearray(data)
    if chance.random() < 0.3:
        return bytes(content[: chance.randrange(len(content))])
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(content))
        kind = chance.randrange(3)
        if kind == 0:
            content[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            content[place] = chance.randrange(256)
        else:
            content[place:place] = content[place : place + chance.randint(1, 40)]
    return bytes(content)


def _bodies(model: ModelProto) -> list[Any]:
    bodies: list[Any] = [model.graph, *model.functions]
    for body in bodies:  # grows
        bodies.extend(a.g for node in body.node for a in node.attribute if a.HasField("g"))
    return [body for body in bodies if body.node]


def _nodes(model: ModelProto) -> list[Any]:
    return [node for body in _bodies(model) for node in body.node]


def _names(model: ModelProto) -> list[str]:
    nodes = _nodes(model)
    return [name for node in nodes for name in (*node.input, *node.output)] + ["", "x", "nowhere"]


def _pick(chance: random.Random, items: Any) -> Any:
    return chance.choice(items) if len(items) else None


def _drop_node(chance: random.Random, model: ModelProto) -> None:
    body = _pick(chance, _bodies(model))
    if body is not None:
        del body.node[chance.randrange(len(body.node))]


def _repeat_node(chance: random.Random, model: ModelProto) -> None:
    body = _pick(chance, _bodies(model))
    if body is not None:
        node = body.node.add()
        node.CopyFrom(chance.choice(body.node[:-1] or body.node))
        if chance.random() < 0.7:
            node.output[:] = [f"{name}_again" for name in node.output]


def _shuffle_nodes(chance: random.Random, model: ModelProto) -> None:
    body = _pick(chance, _bodies(model))
    if body is not None:
        nodes = [node.SerializeToString() for node in body.node]
        chance.shuffle(nodes)
        for node, data in zip(body.node, nodes, strict=True):
            node.ParseFromString(data)


def _rewire(chance: random.Random, model: ModelProto) -> None:
    node = _pick(chance, [n for n in _nodes(model) if n.input])
    if node is not None:
        node.input[chance.randrange(len(node.input))] = chance.choice(_names(model))


def _swap_inputs(chance: random.Random, model: ModelProto) -> None:
    node = _pick(chance, [n for n in _nodes(model) if len(n.input) > 1])
    if node is not None:
        node.input[:] = list(node.input)[::-1]


def _count_inputs(chance: random.Random, model: ModelProto) -> None:
    node = _pick(chance, _nodes(model))
    if node is not None:
        if node.input and chance.random() < 0.5:
            del node.input[-1]
        else:
            node.input.append(chance.choice(_names(model)))


def _rename_output(chance: random.Random, model: ModelProto) -> None:
    node = _pick(chance, [n for n in _nodes(model) if n.output])
    if node is not None:
        node.output[chance.randrange(len(node.output))] = chance.choice([*_names(model), "\n", "🙂", "n" * 5000])


def _change_op(chance: random.Random, model: ModelProto) -> None:
    node = _pick(chance, _nodes(model))
    if node is not None:
        others = ["Mul", "Add", "Div", "Sub", "Pow", "Sqrt", "Reciprocal", "ReduceSum", "ReduceMean", "Cast", "Neg", ""]
        others += ["RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization", "Norm", "If", "Nothing"]
        node.op_type = chance.choice(others)


def _change_domain(chance: random.Random, model: ModelProto) -> None:
    node = _pick(chance, _nodes(model))
    if node is not None:
        node.domain = chance.choice(["", "ai.onnx", "com.microsoft", "own", "rmsnorm_deploy"])


def _change_attribute(chance: random.Random, model: ModelProto) -> None:
    node = _pick(chance, _nodes(model))
    if node is None:
        return
    if not node.attribute or chance.random() < 0.2:
        name = chance.choice(["axis", "axes", "epsilon", "keepdims", "to", "stash_type", "noop_with_empty_axes"])
        node.attribute.add(name=name, type=AttributeProto.INT, i=chance.choice(NUMBERS))
        return
    attribute = chance.choice(node.attribute)
    kind = chance.randrange(5)
    if kind == 0:
        attribute.type = chance.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 13])
    elif kind == 1:
        attribute.i = chance.choice(NUMBERS)
        attribute.ints[:] = [chance.choice(NUMBERS) for _ in range(chance.randrange(3))]
    elif kind == 2:
        attribute.f = chance.choice([0.0, -1.0, 1e-5, 1e30, math.nan, math.inf])
    elif kind == 3:
        attribute.name = chance.choice(["axis", "axes", "value", "k", ""])
    else:
        node.attribute.remove(attribute)


def _tensors(model: ModelProto) -> list[Any]:
    held = [a.t for node in _nodes(model) for a in node.attribute if a.HasField("t")]
    return [*model.graph.initializer, *held]


def _change_tensor(chance: random.Random, model: ModelProto) -> None:
    tensor = _pick(chance, _tensors(model))
    if tensor is None:
        return
    kind = chance.randrange(6)
    if kind == 0:
        tensor.dims[:] = [chance.choice(NUMBERS) for _ in range(chance.randrange(4))]
    elif kind == 1:
        tensor.data_type = chance.randrange(30)
    elif kind == 2:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=chance.choice(["w.bin", "../w.bin", "/etc/passwd", ""]))
    elif kind == 3:
        shape = [chance.choice([1, 2, 8]) for _ in range(chance.randrange(3))]
        dtype = chance.choice([np.float32, np.float16, np.float64, np.int64, np.int32])
        value = np.full(shape, chance.choice([-1, 0, 1, 2, 3]), dtype)
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    elif kind == 4:
        tensor.name = chance.choice(_names(model))
    else:
        tensor.float_data[:] = [chance.choice([0.0, 1e-30, -1.0, math.nan, math.inf])]


def _drop_initializer(chance: random.Random, model: ModelProto) -> None:
    if model.graph.initializer:
        del model.graph.initializer[chance.randrange(len(model.graph.initializer))]


def _change_interface(chance: random.Random, model: ModelProto) -> None:
    info = _pick(chance, [*model.graph.input, *model.graph.output])
    if info is None:
        return
    kind = chance.randrange(5)
    tensor = info.type.tensor_type
    if kind == 0:
        tensor.elem_type = chance.choice([0, 1, 7, 10, 11, 16, 99])
    elif kind == 1:
        for dim in tensor.shape.dim:
            dim.dim_value = chance.choice([*NUMBERS, 8, 8])
    elif kind == 2:
        info.ClearField("type")
    elif kind == 3:
        tensor.shape.dim.add().dim_param = "n"
    else:
        info.name = chance.choice(_names(model))


def _change_model(chance: random.Random, model: ModelProto) -> None:
    kind = chance.randrange(4)
    if kind == 0 and model.opset_import:
        chance.choice(model.opset_import).version = chance.choice([0, 1, 7, 12, 13, 18, 20, 23, 24, 1 << 40])
    elif kind == 1:
        model.opset_import.add(domain=chance.choice(["", "ai.onnx", "own"]), version=chance.choice([1, 13, 18]))
    elif kind == 2:
        model.ir_version = chance.choice([0, 1, 3, 4, 10, 1 << 40])
    elif model.functions:
        function = chance.choice(model.functions)
        function.node.add(op_type=function.name, domain=function.domain, input=["x"], output=["deeper"])


DAMAGES: tuple[Callable[[random.Random, ModelProto], None], ...] = (
    *(_drop_node, _repeat_node, _shuffle_nodes, _rewire, _rewire, _swap_inputs, _count_inputs, _rename_output),
    *(_change_op, _change_domain, _change_attribute, _change_attribute, _change_tensor, _change_tensor),
    *(_drop_initializer, _change_interface, _change_model),
)
