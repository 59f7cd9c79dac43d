"""Extract norms from an ONNX graph (`cut_out`), subgraphs included, and run them alone (`run_alone`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnx_ir as ir

from ...export.graph.site import node_name
from ...models.errors import UnsupportedError
from ..runners.base import Array, OnnxSession
from ..runners.open import open_runner
from .access import NormFeed

_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """The part of a graph to cut out.

    Attributes:
        name: prefix of the names of inputs and outputs; unique.
        inputs: the values at which the cut begins, by role.
        outputs: the values that are computed, by role.
    """

    name: str
    inputs: dict[str, ir.Value]
    outputs: dict[str, ir.Value]


@dataclass(slots=True)
class CutModel:
    """The cuts as one model.

    Attributes:
        model: its inputs and outputs are named `<cut>.<role>`; external data stay where they are.
        given: the other inputs: values from outside the cuts, such as weights that are graph inputs.
    """

    model: onnx.ModelProto
    given: dict[str, ir.Value] = field(default_factory=dict)


def cut_out(model: ir.Model, cuts: Sequence[Cut]) -> CutModel:
    """A model of the nodes between the inputs and the outputs of each cut; every cut has its own copies.

    Args:
        model: the cuts may be in its main graph or in bodies of control flow.
        cuts: any number.

    Raises:
        UnsupportedError: there is control flow between the inputs and the outputs of a cut.
    """
    graph = ir.Graph([], [], nodes=[], opset_imports=dict(model.opset_imports), name="cuts")
    work = _Copy(graph)
    for cut in cuts:
        copies: dict[ir.Value, ir.Value] = {}
        for role, value in cut.inputs.items():
            copies[value] = work.input(value, f"{cut.name}.{role}")
        for role, value in cut.outputs.items():
            work.copy(value, copies, cut.name)
            work.output(copies[value], f"{cut.name}.{role}")
    functions = list(_called(model, graph))
    result = ir.Model(graph, ir_version=max(model.ir_version, 8), functions=functions)
    return CutModel(ir.to_proto(result), work.given)


@dataclass(frozen=True, slots=True, eq=False)
class NormPlace:
    """One norm in a graph: the values at which it is cut out.

    Attributes:
        name: unique among the norms that are cut out together.
        operands: x, or the two values whose sum is x if a residual add is fused into the norm.
        gate: the gate, or None.
        y: the result.
        total: the sum of the operands if it is an output too, else None.
        gate_role: `x`, `x0` or `x1` if the gate is the normalized value or one of the operands, else None.
        more: further values to compute, by role.
    """

    name: str
    operands: tuple[ir.Value, ...]
    gate: ir.Value | None
    y: ir.Value
    total: ir.Value | None = None
    gate_role: str | None = None
    more: Mapping[str, ir.Value] = field(default_factory=dict)

    def cut(self) -> Cut:
        """The cut: inputs `x0`, `x1` and `gate`, outputs `y`, `sum` and the further ones."""
        roles: dict[str, ir.Value | None] = {f"x{index}": value for index, value in enumerate(self.operands)}
        if self.gate_role != "x":
            roles["gate"] = self.gate
        inputs: dict[str, ir.Value] = {}
        for role, value in roles.items():
            if value is not None and value not in inputs.values():
                inputs[role] = value
        sums = {} if self.total is None else {"sum": self.total}
        return Cut(self.name, inputs, {"y": self.y, **sums, **self.more})

    def split(self, feed: NormFeed) -> tuple[NormFeed, dict[str, Array]]:
        """The inputs that the norm is run on, as a feed and by the roles of the cut's inputs.

        For a fused residual add, x is split into two parts whose sum is exact: each element is in one part, and zero in
        the other. If the norm adds a value to itself, x is rounded to twice x / 2, and the feed has that x.
        """
        x, arrays = feed.x, {"x0": feed.x}
        if len(self.operands) == 2 and self.operands[0] is self.operands[1]:
            half = x * x.dtype.type(0.5)
            x, arrays = half + half, {"x0": half}
        elif len(self.operands) == 2:
            first = np.arange(x.size).reshape(x.shape) % 2 == 0
            zero = np.zeros((), x.dtype)
            arrays = {"x0": np.where(first, x, zero), "x1": np.where(first, zero, x)}
        gate = {"x": x, **arrays}[self.gate_role] if self.gate_role else feed.gate
        if gate is not None:
            arrays["gate"] = gate
        return NormFeed(x, gate), arrays


# Opens the bytes of a model; the folder has its external data.
Opener = Callable[[bytes, Path | None], OnnxSession]


class RunCuts(Protocol):
    """Runs norms that are cut out; inputs and outputs are arrays by the cut's name and by role."""

    def __call__(self, feeds: Mapping[str, Mapping[str, Array]]) -> dict[str, dict[str, Array]]: ...


@contextmanager
def run_alone(
    cut: CutModel,
    provider: str,
    folder: Path | None,
    given: Mapping[str, Array] | None = None,
    opener: Opener | None = None,
    **options: Any,
) -> Iterator[RunCuts]:
    """Open norms that are cut out, in one session.

    Args:
        cut: result of `cut_out`.
        provider: see `open_runner`.
        folder: the folder of the graph's external data, or None.
        given: arrays for `cut.given`, by the value's name in the original graph.
        opener: opens the model in place of `open_runner`.
        options: see `open_runner`.
    """
    data = cut.model.SerializeToString()
    fixed = {name: (given or {})[value.name or ""] for name, value in cut.given.items()}
    opened = open_runner(data, provider, weights_folder=folder, **options) if opener is None else opener(data, folder)
    with opened as runner:
        wanted = {info.name for info in runner.inputs()}

        def run(feeds: Mapping[str, Mapping[str, Array]]) -> dict[str, dict[str, Array]]:
            named = {f"{cut}.{role}": array for cut, arrays in feeds.items() for role, array in arrays.items()}
            results = runner.run({name: array for name, array in {**fixed, **named}.items() if name in wanted})
            found: dict[str, dict[str, Array]] = {}
            for name, array in results.items():
                where, _, role = name.rpartition(".")
                found.setdefault(where, {})[role] = array
            return found

        yield run


class _Copy:
    def __init__(self, graph: ir.Graph) -> None:
        self.given: dict[str, ir.Value] = {}
        self._graph = graph
        self._shared: dict[ir.Value, ir.Value] = {}
        self._count = 0

    def input(self, value: ir.Value, name: str) -> ir.Value:
        """An input that replaces the value. Its dims are dynamic, because a cut may be run on fewer rows."""
        shape = None if value.shape is None else ir.Shape([None] * len(value.shape))
        made = ir.Value(name=name, type=value.type or ir.TensorType(ir.DataType.FLOAT), shape=shape)
        self._graph.inputs.append(made)
        return made

    def output(self, value: ir.Value, name: str) -> None:
        """A separate output: a copied value may be an output twice, or be an input."""
        node = ir.node("Identity", [value], name=self._name("out"))
        node.outputs[0].name = name
        node.outputs[0].type = value.type
        self._graph.append(node)
        self._graph.outputs.append(node.outputs[0])

    def copy(self, value: ir.Value, copies: dict[ir.Value, ir.Value], cut: str) -> None:
        """Copy the nodes that compute the value, back to values that are copied already."""
        pending = [value]
        while pending:
            current = pending[-1]
            node = current.producer()
            if current in copies:
                pending.pop()
            elif node is None:
                copies[current] = self._outside(current)
                pending.pop()
            else:
                missing = [v for v in node.inputs if v is not None and v not in copies]
                if missing:
                    pending.extend(missing)
                    continue
                self._node(node, copies, cut)
                pending.pop()

    def _node(self, node: ir.Node, copies: dict[ir.Value, ir.Value], cut: str) -> None:
        if any(attribute.type in _GRAPHS for attribute in node.attributes.values()):
            raise UnsupportedError(f"norm {cut!r} contains the control-flow node {node_name(node)!r} ({node.op_type}).")
        made = ir.Node(
            node.domain, node.op_type, [None if v is None else copies[v] for v in node.inputs],
            list(node.attributes.values()), overload=node.overload, num_outputs=len(node.outputs), name=self._name("n"),
        )  # fmt: skip
        for old, new in zip(node.outputs, made.outputs, strict=True):
            new.name = self._name("v") if old.name else ""
            new.type = old.type
            copies[old] = new
        self._graph.append(made)

    def _outside(self, value: ir.Value) -> ir.Value:
        """A constant by reference, or an input for any other value from outside the cut."""
        if value not in self._shared:
            name = self._name("given")
            if value.const_value is not None and not value.is_graph_input():
                tensor = _renamed(value.const_value, name)
                made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=value.shape, const_value=tensor)
                self._graph.register_initializer(made)
            else:
                made = self.input(value, name)
                self.given[name] = value
            self._shared[value] = made
        return self._shared[value]

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind}{self._count}"


def _renamed(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """A copy of the tensor under another name, because the original belongs to a graph. External data stay external."""
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=name,
            base_dir=tensor.base_dir,
        )  # fmt: skip
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)


def _called(model: ir.Model, graph: ir.Graph) -> list[ir.Function]:
    """Copies of the functions that the graph calls, directly or indirectly."""
    found: dict[ir.OperatorIdentifier, ir.Function] = {}
    pending = list(graph)
    while pending:
        identifier = pending.pop().op_identifier()
        if identifier in model.functions and identifier not in found:
            found[identifier] = model.functions[identifier].clone()
            pending.extend(model.functions[identifier])
    return list(found.values())
