"""The norms in an ONNX file (`GraphNorms`): locate them by the metadata on their nodes, and cut the graph at them.

The metadata on a norm's nodes name its module and its values. The graph can be cut in two ways, without changing the
file: every norm alone, and the segments between the norms. In both, a value that crosses a cut becomes an output of
one part and an input of another, so that each part can be run on the values that PyTorch has there. Weights stay where
they are; a part contains references to those that it reads.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

from ...export.from_onnx.annotate import annotate
from ...export.graph.infer_types import fill_types
from ...export.graph.metadata import (
    ATTENTION_KEY,
    FORM_KEY,
    FOUND_KEY,
    IN_GRAPH,
    PARAMETERS_KEY,
    PATH_KEY,
    SPEC_KEY,
    VALUES_KEY,
)
from ...export.lowering.quantized_norms import is_quantized_norm
from ...export.onnx_io.read_model import sort_nodes
from ...export.recognition.fused_ops import QUANTIZED_OUTPUT
from ...models.errors import UsageError
from ...models.spec import NormSpec
from .access import RecordedNorm
from .activation_store import Key
from .cut import NormPlace

FED = "@fed"


@dataclass(frozen=True, slots=True)
class GraphNorm:
    """One norm in the graph.

    Attributes:
        key: module path and number of the call.
        form: `plain`, or `residual_add` if a residual add is fused into it.
        x: name of the value that is normalized.
        y: name of the result.
        gate: name of the gate, or None.
        operands: names of the inputs of its nodes: x itself, or the two values that a fused residual add sums to x.
        nodes: names of its nodes.
        used: whether the result is read.
        recorded: what the export recorded of a norm that is not a module, else None.
    """

    key: Key
    form: str
    x: str
    y: str
    gate: str | None
    operands: tuple[str, ...]
    nodes: frozenset[str]
    used: bool
    recorded: RecordedNorm | None = None

    @property
    def values(self) -> list[str]:
        """Names of x, of the result, and of the gate if there is one."""
        return [name for name in (self.x, self.y, self.gate) if name is not None]


@dataclass(slots=True)
class Ancestry:
    """The values that a value is computed from.

    Attributes:
        values: names of the cut values.
        paths: modules in the metadata of the nodes between them and the value.
        reads_inputs: whether it depends on the model's inputs too.
        attentions: the attentions between them and the value, by the path of the module.
    """

    values: set[str]
    paths: set[str]
    reads_inputs: bool
    attentions: set[str] = field(default_factory=set)


class GraphNorms:
    """The norms of one .onnx file.

    Args:
        path: the file; its weights are not read.

    Attributes:
        path: the file.
        model: its graph, with every norm's nodes named.
        problems: module paths of norms that cannot be cut out, with the reason.
        norms: the norms, in graph order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: dict[str, str] = {}
        self.model = ir.load(path)
        sort_nodes(self.model, str(path))
        if any(value.dtype is None for value in _values(self.model.graph)):
            fill_types(self.model)
        annotate(self.model)
        self._values = {v.name: v for v in _values(self.model.graph)}
        self.norms: dict[Key, GraphNorm] = {norm.key: norm for norm in self._located()}

    @property
    def output_names(self) -> list[str]:
        """The file's outputs."""
        return [str(value.name) for value in self.model.graph.outputs]

    def dtype(self, name: str) -> str:
        """numpy's name of a value's dtype; float32 if the file does not specify it."""
        dtype = self._values[name].dtype
        return "float32" if dtype is None else dtype.numpy().name

    def values(self) -> Iterable[ir.Value]:
        """Every value of the main graph."""
        return self._values.values()

    def place(self, key: Key) -> NormPlace:
        """The place of a norm in `model`, for `cut_out`."""
        norm = self.norms[key]
        x, y = self._values[norm.x], self._values[norm.y]
        gate = None if norm.gate is None else self._values[norm.gate]
        operands = tuple(self._values[name] for name in norm.operands)
        return NormPlace(cut_name(key), operands, gate, y, x if len(operands) > 1 else None)

    def between(self, keys: Iterable[Key], *, wanted: Iterable[Key], with_outputs: bool) -> onnx.ModelProto:
        """The segments between the norms `keys`, as a model whose inputs include their x and y, named by `fed_name`.

        Args:
            keys: norms whose x and y are cut.
            wanted: norms whose x and gate are outputs of the model.
            with_outputs: include the file's own outputs too.
        """
        model = self.model.clone()
        values = {v.name: v for v in _values(model.graph)}
        own = list(model.graph.outputs) if with_outputs else []
        model.graph.outputs.clear()  # a cut value may be an output too: the computed value is returned then
        fed: dict[str, ir.Value] = {}
        for norm in (self.norms[key] for key in keys):
            for name in (norm.x, norm.y):
                if name not in fed:
                    fed[name] = _like(values[name], name + FED)
                    values[name].replace_all_uses_with(fed[name])
        outputs = {str(value.name): value for value in own}
        for norm in (self.norms[key] for key in wanted):
            outputs.update({name: values[name] for name in (norm.x, norm.gate) if name is not None})
        return _part(model, [*model.graph.inputs, *fed.values()], list(outputs.values()))

    def exposed(self, names: Sequence[str]) -> onnx.ModelProto:
        """The whole model with these values as additional outputs."""
        model = self.model.clone()
        values = {v.name: v for v in _values(model.graph)}
        present = set(self.output_names)
        model.graph.outputs.extend(values[name] for name in dict.fromkeys(names) if name not in present)
        return ir.to_proto(model)

    def ancestry(self, keys: Iterable[Key], name: str) -> Ancestry:
        """The values that the value `name` is computed from if the model is cut at the norms `keys`."""
        cut = {v for key in keys for v in (self.norms[key].x, self.norms[key].y)}
        found = Ancestry(set(), set(), False)
        pending, seen = [self._values[name]], set()
        while pending:
            value = pending.pop()
            found.reads_inputs |= value.is_graph_input() and not value.is_initializer()
            node = value.producer()
            if node is None or node in seen:
                continue
            seen.add(node)
            if PATH_KEY in node.metadata_props:
                found.paths.add(node.metadata_props[PATH_KEY])
            if ATTENTION_KEY in node.metadata_props:
                found.attentions.add(_attention_path(node))
            for before in read_by(node):
                if before.name in cut:
                    found.values.add(str(before.name))
                else:
                    pending.append(before)
        return found

    def _located(self) -> list[GraphNorm]:
        by_path: dict[str, list[ir.Node]] = {}
        for node in self.model.graph:
            if PATH_KEY in node.metadata_props:
                by_path.setdefault(node.metadata_props[PATH_KEY], []).append(node)
        found = []
        for path, nodes in by_path.items():
            for number, group in enumerate(_calls(nodes)):
                norm = self._norm(path, number, group)
                if isinstance(norm, GraphNorm):
                    found.append(norm)
                else:
                    self.problems[path] = norm
        return found

    def _norm(self, path: str, number: int, nodes: list[ir.Node]) -> GraphNorm | str:
        cores = [node for node in nodes if VALUES_KEY in node.metadata_props and SPEC_KEY in node.metadata_props]
        if len(cores) != 1:
            return f"expected one main node among its nodes in the file, got {len(cores)}"
        if is_quantized_norm(cores[0]):
            return f"{QUANTIZED_OUTPUT}, so it has no unquantized result to compare"
        try:
            names = json.loads(cores[0].metadata_props[VALUES_KEY])
            noted = {"x": names["x"], "y": names["y"], "gate": names.get("gate")}
        except (ValueError, KeyError, TypeError, RecursionError):
            return f"the metadata {VALUES_KEY} on its node cannot be read"
        group = set(nodes)
        roles = self._roles(noted, cores[0], group)
        if isinstance(roles, str):
            return roles
        x, y, gate = roles
        made_here = self._values[x].producer() in group
        operands = tuple(str(v.name) for v in cores[0].inputs[:2] if v is not None) if made_here else (x,)
        outside = {
            v for node in nodes for v in read_by(node)
            if v.producer() not in group and v.name not in (*operands, gate) and self._varies(v)
        }  # fmt: skip
        if outside:
            return f"it also reads {', '.join(sorted(str(v.name) for v in outside))}, computed from the model's inputs"
        if self._values[y].producer() not in group:
            return "its metadata name a result that other nodes compute"
        used = bool(self._values[y].uses()) or self._values[y].is_graph_output()
        form = cores[0].metadata_props.get(FORM_KEY, "plain")
        names = frozenset(str(node.name) for node in nodes)
        return GraphNorm((path, number), form, x, y, gate, operands, names, used, _recorded(cores[0]))

    def _roles(
        self, noted: Mapping[str, str | None], core: ir.Node, group: set[ir.Node]
    ) -> tuple[str, str, str | None] | str:
        """The names of a norm's x, y and gate, or why they are not known.

        Whoever renames a value of the graph leaves its old name in the metadata. Where a noted name is not of a value
        that the norm's nodes read or compute, nor of another norm's result, and only one value can be meant, that one
        is taken.
        """
        read = {
            str(v.name): v for node in group for v in read_by(node) if v.producer() not in group and self._varies(v)
        }
        made = {str(v.name): v for node in group for v in node.outputs if v.name and (v.uses() or v.is_graph_output())}
        results = {n for n, v in made.items() if v.is_graph_output() or {use.node for use in v.uses()} - group}
        whole = core.metadata_props.get(FORM_KEY) == "residual_add" and len(core.outputs) > 1
        places = {"x": read.keys() | made.keys(), "y": made.keys(), "gate": read.keys()}
        right = {role: name for role, name in noted.items() if name is not None and name in places[role]}
        if whole and "x" not in right and core.outputs[1].name:
            right["x"] = str(core.outputs[1].name)
        left = {
            "x": read.keys() - {right.get("gate")},
            "gate": read.keys() - {right.get("x")},
            "y": results - {right.get("x")},
        }
        lost = [
            r for r, n in noted.items() if n is not None and r not in right and not self._is_of_another_norm(n, core)
        ]
        if len({"x", "gate"} & set(lost)) < 2:
            right.update({role: str(next(iter(left[role]))) for role in lost if len(left[role]) == 1})
        for role, name in noted.items():
            if name is None or role in right:
                continue
            if name not in self._values:
                return f"its metadata name the value {name!r}, which is missing in the file"
            right[role] = name
        return right["x"], right["y"], right.get("gate")

    def _is_of_another_norm(self, name: str, core: ir.Node) -> bool:
        """Whether another norm's nodes compute the value of a name: then the results were exchanged, not renamed."""
        producer = self._values[name].producer() if name in self._values else None
        path = None if producer is None else producer.metadata_props.get(PATH_KEY)
        return path is not None and path != core.metadata_props.get(PATH_KEY)

    def _varies(self, value: ir.Value) -> bool:
        """Whether a value depends on the model's inputs."""
        pending, seen = [value], set()
        while pending:
            current = pending.pop()
            if current.is_graph_input() and not current.is_initializer():
                return True
            node = current.producer()
            if node is not None and node not in seen:
                seen.add(node)
                pending.extend(read_by(node))
        return False


def _recorded(core: ir.Node) -> RecordedNorm | None:
    """What the export recorded on the main node of a norm that is not a module; None where it cannot be read."""
    if core.metadata_props.get(FOUND_KEY) != IN_GRAPH:
        return None
    try:
        spec = NormSpec.from_json(core.metadata_props[SPEC_KEY])
        parameters = json.loads(core.metadata_props.get(PARAMETERS_KEY, ""))
    except (UsageError, ValueError, RecursionError):
        return None
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        return None
    return RecordedNorm(spec, tuple(parameters))


def _attention_path(main: ir.Node) -> str:
    """The module of an attention, from its main node; empty where it cannot be read."""
    try:
        return str(json.loads(main.metadata_props[ATTENTION_KEY])["path"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def cut_name(key: Key) -> str:
    """The name of a norm in the model that `cut_out` returns."""
    return f"{key[0]}#{key[1]}"


def fed_name(name: str) -> str:
    """The name of the input that replaces the value `name` in the model of `GraphNorms.between`."""
    return name + FED


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def read_by(node: ir.Node) -> Iterable[ir.Value]:
    """The values that a node and its subgraphs read."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            graphs = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs()
            for graph in graphs:
                for inner in ir.traversal.RecursiveGraphIterator(graph):
                    yield from (value for value in inner.inputs if value is not None)


def _calls(nodes: list[ir.Node]) -> list[list[ir.Node]]:
    """The nodes of each call of one norm, in graph order.

    A call may read the result or the sum of another: then the nodes of both are connected, by a value that is noted as
    an end of a call.
    """
    calls = []
    for group in _connected(nodes):
        noted = [node.metadata_props[VALUES_KEY] for node in group if VALUES_KEY in node.metadata_props]
        calls += _connected(group, _ends(noted)) if len(noted) > 1 else [group]
    order = {node: number for number, node in enumerate(nodes)}
    return sorted(calls, key=lambda group: order[group[0]])


def _ends(noted: Iterable[str]) -> set[str]:
    """The names of x and of the result in the metadata of main nodes."""
    names: set[str] = set()
    for text in noted:
        try:
            values = json.loads(text)
            names |= {values["x"], values["y"]}
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return names


def _connected(nodes: list[ir.Node], ends: Container[str | None] = ()) -> list[list[ir.Node]]:
    """The connected components of the nodes, in graph order; values with the names `ends` do not connect them."""
    parent = {node: node for node in nodes}

    def root(node: ir.Node) -> ir.Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    for node in nodes:
        for value in read_by(node):
            producer = value.producer()
            if producer in parent and value.name not in ends:
                parent[root(node)] = root(producer)
    groups: dict[ir.Node, list[ir.Node]] = {}
    for node in nodes:
        groups.setdefault(root(node), []).append(node)
    return list(groups.values())


def _like(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, type=value.type or ir.TensorType(ir.DataType.FLOAT), shape=_open(value.shape))


def _open(shape: ir.Shape | None) -> ir.Shape | None:
    """The shape without the names of dynamic dims: cut values do not match the dims that the names refer to."""
    return None if shape is None else ir.Shape([dim if isinstance(dim, int) else None for dim in shape])


def _part(model: ir.Model, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> onnx.ModelProto:
    """The model reduced to the nodes that compute `outputs`; unused inputs are removed too."""
    graph = model.graph
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    graph.inputs[:] = list(inputs)
    RemoveUnusedNodesPass()(model)
    RemoveUnusedFunctionsPass()(model)
    passed = set(graph.outputs)
    graph.inputs[:] = [value for value in graph.inputs if value.uses() or value in passed]
    for value in graph.outputs:
        if value.shape is not None:
            value.shape = _open(value.shape)
    return ir.to_proto(model)
