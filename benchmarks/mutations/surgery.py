"""Edit an exported file (`Edit`): weights, attributes, or a norm rewritten with a wrong step (`respell`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from rmsnorm_deploy.export.graph.metadata import PATH_KEY, SPEC_KEY, VALUES_KEY
from rmsnorm_deploy.models.spec import NormSpec

FLOAT, FLOAT16, BFLOAT16 = (int(ir.DataType[name]) for name in ("FLOAT", "FLOAT16", "BFLOAT16"))
# Metadata key for the module paths of a node, written by PyTorch's exporter.
_SCOPES = "pkg.torch.onnx.name_scopes"

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm in the graph: its nodes, the main one of them, and its values."""

    path: str
    spec: NormSpec
    nodes: list[ir.Node]
    core: ir.Node
    x: ir.Value
    y: ir.Value
    gate: ir.Value | None

    @property
    def fused_add(self) -> bool:
        """Whether the norm's own node adds the residual."""
        return self.x.producer() in self.nodes


class Edit:
    """An exported folder opened for editing; `save` writes another folder.

    Args:
        folder: the exported folder, which is not changed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.model = ir.from_proto(onnx.load(folder / "model.onnx"))
        self.graph = self.model.graph
        self._made = 0

    def norm(self, path: str) -> Norm:
        """The norm of a module that is called once."""
        nodes = [node for node in self.graph if node.metadata_props.get(PATH_KEY) == path]
        core = next(node for node in nodes if VALUES_KEY in node.metadata_props)
        names = json.loads(core.metadata_props[VALUES_KEY])
        gate = self.value(names["gate"]) if "gate" in names else None
        spec = NormSpec.from_json(core.metadata_props[SPEC_KEY])
        return Norm(path, spec, nodes, core, self.value(names["x"]), self.value(names["y"]), gate)

    def value(self, name: str) -> ir.Value:
        """The value with this name."""
        made = {v.name: v for node in self.graph for v in node.outputs}
        made.update({v.name: v for v in self.graph.inputs})
        return self.graph.initializers.get(name) or made[name]

    def node(self, op_type: str, *, after: str | None = None) -> ir.Node:
        """The first node of a type, or the first that reads the value `after`."""
        return next(n for n in self.graph if n.op_type == op_type and (after is None or _reads(n, after)))

    def linear(self, scope: str) -> ir.Node:
        """The matrix product of the Linear module of a path."""
        products = (node for node in self.graph if node.op_type in ("MatMul", "Gemm"))
        return next(node for node in products if f"'{scope}'" in node.metadata_props.get(_SCOPES, ""))

    def residual_add(self, path: str) -> ir.Node:
        """The Add node that computes a norm's x."""
        x = self.norm(path).x
        return next(node for node in self.graph if node.op_type == "Add" and x in node.outputs)

    def constant(self, array: Array) -> ir.Value:
        """A new initializer."""
        self._made += 1
        value = ir.Value(name=f"edited.{self._made}", const_value=ir.tensor(np.ascontiguousarray(array)))
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)  # type: ignore[union-attr]
        self.graph.register_initializer(value)
        return value

    def op(
        self, op_type: str, *inputs: ir.Value | None, metadata: dict[str, str] | None = None, **attributes: Any
    ) -> ir.Value:
        """A new node with one output; `save` sorts the nodes."""
        self._made += 1
        node = ir.node(op_type, inputs, attributes, name=f"edited/{op_type}_{self._made}", metadata_props=metadata)
        node.outputs[0].name = f"edited.{op_type}.{self._made}"
        self.graph.append(node)
        return node.outputs[0]

    def change_constant(self, node: ir.Node, index: int, change: Callable[[Array], Array]) -> None:
        """Replace a constant input of one node; other readers keep the old constant."""
        array = constant_at(node, index)
        node.replace_input_with(index, self.constant(np.asarray(change(array)).astype(array.dtype)))

    def save(self, folder: Path) -> Path:
        """Write the edited model beside a copy of the manifest; returns the folder."""
        folder.mkdir(parents=True)
        self.graph.sort()
        ir.save(self.model, folder / "model.onnx")
        shutil.copy(self._folder / "manifest.json", folder)
        return folder


def constant_at(node: ir.Node, index: int) -> Array:
    """The constant that a node reads at an input."""
    value = node.inputs[index]
    if value is None or value.const_value is None:
        raise ValueError(f"{node.name} reads no constant at input {index}")
    return value.const_value.numpy()


def _reads(node: ir.Node, name: str) -> bool:
    return any(value is not None and value.name == name for value in node.inputs)


# ---------------------------------------------------------------------------------------- weights, epsilon, attributes


def _parameter(norm: Norm, name: str) -> tuple[ir.Node, int]:
    """The node that reads a norm's weight or bias, and at which input."""
    return next(
        (node, index)
        for node in norm.nodes
        for index, value in enumerate(node.inputs)
        if value is not None and value.is_initializer() and f"{norm.path}.{name}" in str(value.name)
    )


def _offset(node: ir.Node) -> float:
    """The offset that the plugin operator adds to its weight; for other operators the file contains 1 + weight."""
    return node.attributes["scale_offset"].as_float() if "scale_offset" in node.attributes else 0.0


def scale_of(norm: Norm) -> Array:
    """The scale of a norm, float64[width]: the weight, or 1 + weight."""
    node, index = _parameter(norm, "weight")
    return constant_at(node, index).astype(np.float64) + _offset(node)


def bias_of(norm: Norm) -> Array:
    """The bias of a norm that has one, float64[width]."""
    return constant_at(*_parameter(norm, "bias")).astype(np.float64)


def change_weight(edit: Edit, path: str, change: Callable[[Array], Array]) -> None:
    """Change the scale of a norm; other readers of the same tensor keep the old one."""
    norm = edit.norm(path)
    node, index = _parameter(norm, "weight")
    offset = _offset(node)
    edit.change_constant(node, index, lambda stored: change(stored.astype(np.float64) + offset) - offset)


def set_eps(edit: Edit, path: str, change: Callable[[float], float]) -> None:
    """Change a norm's epsilon where the target stores it: an attribute, or a constant of its Add."""
    norm = edit.norm(path)
    for node in norm.nodes:
        if "epsilon" in node.attributes:
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", change(norm.spec.eps))
        elif node.op_type == "Add" and _is_epsilon(node.inputs[1]):
            edit.change_constant(node, 1, lambda _: np.asarray(change(norm.spec.eps)))


def _is_epsilon(value: ir.Value | None) -> bool:
    return value is not None and str(value.name).startswith("rmsnorm_deploy.epsilon")


def set_attribute(edit: Edit, path: str, name: str, value: float) -> None:
    """Change an attribute of a norm's main node."""
    attribute = ir.AttrFloat32(name, value) if isinstance(value, float) else ir.AttrInt64(name, value)
    edit.norm(path).core.attributes[name] = attribute


# ------------------------------------------------------------------------------------------------- a norm rewritten


class Spelling:
    """A norm in plain operators that no runtime fuses; every step can be replaced.

    Without replaced steps it computes the formula of the norm's spec.

    Args:
        edit: the open file.
        norm: the norm.
        spec: a formula that replaces the norm's own.
        scale: another weight, float64[width]; for `one_plus_weight` it includes the one.
        steps: functions that replace the methods below, by name; the first argument of each is the spelling.
    """

    def __init__(
        self, edit: Edit, norm: Norm, spec: NormSpec | None = None, scale: Array | None = None, **steps: Any
    ) -> None:
        self.edit, self.norm = edit, norm
        self.spec = spec or norm.spec
        self.dtype = ir.DataType.FLOAT if norm.y.dtype is None else norm.y.dtype
        self.width = len(scale_of(norm))
        self._scale = scale_of(norm) if scale is None else scale
        self._steps = steps
        self._metadata = {k: v for k, v in norm.core.metadata_props.items() if k not in (SPEC_KEY, VALUES_KEY)}

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """A node of the norm."""
        return self.edit.op(op_type, *inputs, metadata=dict(self._metadata), **attributes)

    def number(self, value: float, dtype: int = FLOAT) -> ir.Value:
        """A scalar constant."""
        return self.edit.constant(np.asarray(value, ir.DataType(dtype).numpy()))

    def rounded(self, value: ir.Value, dtype: int) -> ir.Value:
        """A float32 value rounded to another dtype and cast back to float32."""
        return self.op("Cast", self.op("Cast", value, to=dtype), to=FLOAT)

    def write(self, x: ir.Value) -> ir.Value:
        """Write every step; returns the result."""
        h = self._step("enter", x)
        if self.spec.gate == "before":
            h = self.op("Mul", h, self._step("gate"))
        h = self._grouped(h)
        h = self._step("normalize", h, self._step("statistic", h))
        if self.spec.group_size is not None:
            h = self._reshape(h, [0, 0, self.width])
        return self._step("leave", h)

    def enter(self, x: ir.Value) -> ir.Value:
        """x in float32."""
        return self.op("Cast", x, to=FLOAT)

    def statistic(self, h: ir.Value) -> ir.Value:
        """The mean of the squares."""
        return self.mean(self.op("Mul", h, h))

    def normalize(self, h: ir.Value, mean: ir.Value) -> ir.Value:
        """h divided by the root of the mean and eps."""
        return self.op("Div", h, self.op("Sqrt", self.op("Add", mean, self.number(self.spec.eps))))

    def leave(self, h: ir.Value) -> ir.Value:
        """Scale, bias, gate and cast, in the order of the spec."""
        if self.spec.order == "cast_then_scale":
            y = self.op("Mul", self.op("Cast", h, to=int(self.dtype)), self.parameter(self._scale))
            return self.op("Add", y, self.parameter(bias_of(self.norm))) if self.spec.bias else y
        h = self.op("Mul", h, self.parameter(self._scale, FLOAT))
        if self.spec.bias:
            h = self.op("Add", h, self.parameter(bias_of(self.norm), FLOAT))
        if self.spec.gate == "after":
            h = self.op("Mul", h, self._step("gate"))
        return self.op("Cast", h, to=int(self.dtype))

    def gate(self) -> ir.Value:
        """The gate through its activation, in float32."""
        gate = self.op("Cast", self.norm.gate, to=FLOAT)
        sigmoid = self.op("Sigmoid", gate)
        match self.spec.activation:
            case "sigmoid":
                return sigmoid
            case "silu":
                return self.op("Mul", gate, sigmoid)
            case _:
                raise ValueError(f"expected the activation of a gate, got {self.spec.activation!r}")

    def mean(self, value: ir.Value, axis: int = -1) -> ir.Value:
        """The mean along an axis, which is kept with size 1."""
        return self.op("ReduceMean", value, self.edit.constant(np.array([axis], np.int64)), keepdims=1)

    def parameter(self, array: Array, dtype: int | None = None) -> ir.Value:
        """A weight or bias as a constant, in the norm's dtype unless said otherwise."""
        return self.edit.constant(array.astype(ir.DataType(dtype or self.dtype).numpy()))

    def _grouped(self, h: ir.Value) -> ir.Value:
        size = self.spec.group_size
        return h if size is None else self._reshape(h, [0, 0, self.width // size, size])

    def _reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        return self.op("Reshape", value, self.edit.constant(np.array(shape, np.int64)))

    def _step(self, name: str, *arguments: ir.Value) -> ir.Value:
        step = self._steps.get(name)
        return getattr(self, name)(*arguments) if step is None else step(self, *arguments)


def respell(
    edit: Edit, path: str, spec: dict[str, Any] | None = None, add: Callable[..., Any] | None = None, **options: Any
) -> None:
    """Replace a norm's nodes by a spelling with the same metadata and value names.

    Args:
        edit: the open file.
        path: the norm's module path.
        spec: fields of the NormSpec to change.
        add: for a fused residual add, returns the value to normalize and the second output from the spelling and the
            two operands; None adds them.
        options: see `Spelling`.
    """
    norm = edit.norm(path)
    spelling = Spelling(edit, norm, spec=norm.spec.replace(**(spec or {})), **options)
    x = total = norm.x
    if norm.fused_add:
        operands = norm.core.inputs[0], norm.core.inputs[1]
        x, total = add(spelling, *operands) if add else (spelling.op("Add", *operands),) * 2
        _take_over(norm.x, total)
    first = len(edit.graph)
    y = spelling.write(x)
    core = next(node for node in edit.graph if total in node.outputs) if norm.fused_add else edit.graph[first]
    core.metadata_props.update({key: norm.core.metadata_props[key] for key in (SPEC_KEY, VALUES_KEY)})
    _take_over(norm.y, y)
    edit.graph.remove(norm.nodes, safe=True)


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Replace one value by another, including its name."""
    name, new.type, new.shape = str(old.name), old.type, old.shape
    old.name = f"{name}.replaced"
    new.name = name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
