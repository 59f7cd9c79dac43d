"""Check the graph of a file: every name is defined once, there are no cycles, and its size is within the limits.

ONNX's own checker requires sorted nodes and restricts names, and does not check for cycles or size.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, defs

from ...models.errors import UnsupportedError, UsageError
from .read_model import label, shorten, subgraphs, with_subgraphs

# A node takes about 5 KB of memory, and 10 to 30 microseconds in each step of a rewrite.
MOST_NODES = 500_000
DEEPEST_GRAPH = 100
# Types of attributes, for operators without an ONNX schema at the opset.
_NORM_ATTRIBUTES = {
    **dict.fromkeys(("axis", "keepdims", "stash_type", "to"), AttributeProto.INT),
    "axes": AttributeProto.INTS,
    "epsilon": AttributeProto.FLOAT,
}
_TYPES = {
    getattr(defs.OpSchema.AttrType, name): number
    for name, number in AttributeProto.AttributeType.items()
    if hasattr(defs.OpSchema.AttrType, name)
}
_KNOWN_DTYPES = frozenset(TensorProto.DataType.values())
_DTYPES = ("to", "dtype", "output_dtype", "stash_type")


@dataclass(slots=True)
class _Scope:
    """A graph or a function's body. `reads` are the names that each node reads, also in its subgraphs."""

    opset: int
    body: GraphProto | FunctionProto
    name: str
    parent: _Scope | None
    holder: int
    depth: int
    made: dict[str, int] = field(default_factory=dict)
    reads: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))


def check_graph(model: ModelProto, where: str) -> None:
    """Check that the graph is valid: every name that is read is defined exactly once, and there are no cycles.

    Nodes may be in any order, and names may be any text. The time is linear in the size of the graph.

    Args:
        model: the graph.
        where: the file's name for messages.

    Raises:
        UsageError: a name is read and not defined, or is defined twice; nodes form a cycle; functions call themselves;
            a node has no operator, or inputs, outputs or attributes that its operator does not have; the default opset
            is missing, or imported twice; a string is not UTF-8.
        UnsupportedError: more than 500,000 nodes, counted with functions inlined, or subgraphs more than 100 deep.
    """
    _check_size(len(model.graph.node), 0, where)
    _check_texts(model, where)
    _check_opsets(model, where)
    calls = _check_calls(model, where)
    scopes = _scopes(model, calls, where)
    for scope in scopes:
        _note_makers(scope, where)
    for scope in reversed(scopes):  # subgraphs before the graphs that hold them
        _check_reads(scope, where)
        _check_order(scope, where)


def _check_texts(model: ModelProto, where: str) -> None:
    """Refuse strings that are not UTF-8, which protobuf returns as bytes and cannot write."""
    pending: list[Any] = [model]
    while pending:
        message = pending.pop()
        for descriptor, value in message.ListFields():
            if descriptor.type == descriptor.TYPE_MESSAGE:
                pending.extend([value] if hasattr(value, "ListFields") else value)
            elif descriptor.type == descriptor.TYPE_STRING:
                for text in [value] if isinstance(value, str | bytes) else value:
                    if isinstance(text, bytes):
                        raise UsageError(
                            f"{where}: {descriptor.name} {shorten(text)} of a {type(message).__name__} is not UTF-8. "
                            "The file is damaged; export it again."
                        )


def _opset(holder: ModelProto | FunctionProto) -> int:
    return next((entry.version for entry in holder.opset_import if entry.domain in ("", "ai.onnx")), 0)


def _check_opsets(model: ModelProto, where: str) -> None:
    for name, imports in (("the model", model.opset_import), *((f.name, f.opset_import) for f in model.functions)):
        versions: dict[str, set[int]] = defaultdict(set)
        for entry in imports:
            versions["" if entry.domain == "ai.onnx" else entry.domain].add(entry.version)
        for domain, found in versions.items():
            if len(found) > 1:
                raise UsageError(
                    f"{where}: {shorten(name)} imports domain {shorten(domain)!r} at opsets "
                    f"{', '.join(map(str, sorted(found)))}; expected one opset for each domain."
                )
        if not all(1 <= version < 1000 for version in versions[""] or {1}) or (
            name == "the model" and not versions[""]
        ):
            raise UsageError(f"{where}: {shorten(name)} does not import an opset of ONNX's default domain.")


def _check_calls(model: ModelProto, where: str) -> Counter[tuple[str, str, str]]:
    """Check that functions do not call themselves. Returns the number of nodes of each when inlined."""
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    if len(functions) < len(model.functions):
        raise UsageError(f"{where}: two functions have the same domain and name.")
    sizes: Counter[tuple[str, str, str]] = Counter()
    called: dict[tuple[str, str, str], list[tuple[str, str, str]]] = {}
    waiting, callers = Counter[tuple[str, str, str]](), defaultdict(list)
    for key, function in functions.items():
        bodies = (function, *with_subgraphs([g for node in function.node for g in subgraphs(node)]))
        nodes = [node for body in bodies for node in body.node]
        called[key] = [c for node in nodes if (c := (node.domain, node.op_type, node.overload)) in functions]
        sizes[key] = len(nodes)
        for callee in set(called[key]):
            callers[callee].append(key)
            waiting[key] += 1
    ready = [key for key in functions if not waiting[key]]
    for key in ready:  # the list grows: functions whose callees are all counted
        sizes[key] = min(sizes[key] + sum(sizes[callee] for callee in called[key]), 10 * MOST_NODES)
        for caller in callers[key]:
            waiting[caller] -= 1
            if not waiting[caller]:
                ready.append(caller)
    if len(ready) < len(functions):
        stuck = next(key for key in functions if waiting[key] > 0)
        raise UsageError(f"{where}: function {shorten('::'.join(stuck[:2]))} calls itself, directly or through others.")
    return sizes


def _scopes(model: ModelProto, calls: Counter[tuple[str, str, str]], where: str) -> list[_Scope]:
    """Every graph and function body, each before its subgraphs."""
    opset = _opset(model)
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    scopes = [_Scope(opset, model.graph, "the graph", None, 0, 0)]
    scopes += [_Scope(_opset(f) or opset, f, f"function {shorten(f.name)}", None, 0, 0) for f in model.functions]
    total = 0
    for scope in scopes:  # the list grows
        total += len(scope.body.node)
        _check_size(total, scope.depth, where)
        for index, node in enumerate(scope.body.node):
            _check_node(node, scope.opset, where)
            function = functions.get((node.domain, node.op_type, node.overload))
            if function is not None and not _fits(node, 0, len(function.input), len(function.output)):
                raise _other_count(node, f"function {shorten(function.name)}", where)
            total += calls[node.domain, node.op_type, node.overload]
            inner = list(subgraphs(node))
            scopes += [
                _Scope(scope.opset, g, f"a subgraph of {label(node)}", scope, index, scope.depth + 1) for g in inner
            ]
        _check_size(total, scope.depth, where)
    return scopes


def _check_node(node: NodeProto, opset: int, where: str) -> None:
    """Check a node against its ONNX schema: number of inputs and outputs, types of attributes."""
    if not node.op_type:
        raise UsageError(f"{where}: node {node.name!r} has no operator.")
    schema = _schema(node.op_type, opset) if node.domain in ("", "ai.onnx") else None
    if schema is not None and not _fits(node, schema.min_input, schema.max_input, schema.max_output):
        raise _other_count(node, f"opset {opset}", where)
    seen = set()
    for attribute in node.attribute:
        name, kind = attribute.name, attribute.type
        if name in seen:
            raise UsageError(f"{where}: {label(node)} has attribute {shorten(name)} twice.")
        seen.add(name)
        stated = schema.attributes.get(name) if schema is not None else None
        wanted = _NORM_ATTRIBUTES.get(name) if stated is None else _TYPES.get(stated.type)
        bad_dtype = name in _DTYPES and kind == AttributeProto.INT and attribute.i not in _KNOWN_DTYPES
        if (wanted not in (None, kind) and kind != AttributeProto.UNDEFINED) or bad_dtype:
            raise UsageError(f"{where}: attribute {shorten(name)} of {label(node)} has the wrong type.")


def _fits(node: NodeProto, least: int, inputs: int, outputs: int) -> bool:
    return least <= len(node.input) <= inputs and len(node.output) <= outputs


def _other_count(node: NodeProto, definition: str, where: str) -> UsageError:
    return UsageError(
        f"{where}: {label(node)} has {len(node.input)} inputs and {len(node.output)} outputs, "
        f"which does not match its definition in {definition}."
    )


@lru_cache(maxsize=4096)
def _schema(op_type: str, opset: int) -> defs.OpSchema | None:
    try:
        return defs.get_schema(op_type, opset, "")
    except defs.SchemaError:
        return None


def _check_size(nodes: int, depth: int, where: str) -> None:
    if nodes > MOST_NODES:
        raise UnsupportedError(
            f"{where}: more than {MOST_NODES} nodes; a rewrite would take too much memory. Split the model."
        )
    if depth > DEEPEST_GRAPH:
        raise UnsupportedError(f"{where}: subgraphs are nested more than {DEEPEST_GRAPH} deep. Flatten the model.")


def _note_makers(scope: _Scope, where: str) -> None:
    """Record the index of the node that computes each name of a graph; -1 for inputs and initializers."""
    for name in _given(scope.body):
        if name in scope.made:
            raise UsageError(f"{where}: {shorten(name)!r} is defined twice as an input or initializer of {scope.name}.")
        scope.made[name] = -1
    for index, node in enumerate(scope.body.node):
        for name in node.output:
            if name in scope.made:
                raise UsageError(f"{where}: {shorten(name)!r} is made twice in {scope.name}, again by {label(node)}.")
            if name:
                scope.made[name] = index


def _given(body: GraphProto | FunctionProto) -> Iterable[str]:
    if isinstance(body, FunctionProto):
        return list(body.input)
    inputs = [info.name for info in body.input]
    known = set(inputs)  # an initializer may be the default of an input
    tensors = [t.name for t in body.initializer] + [sparse.values.name for sparse in body.sparse_initializer]
    if len(set(tensors)) < len(tensors):
        return [*inputs, *tensors]
    return [*inputs, *(name for name in tensors if name not in known)]


def _check_reads(scope: _Scope, where: str) -> None:
    """Check that every name that a graph reads is defined in it, or pass the name to the enclosing graph."""
    for index, node in enumerate(scope.body.node):
        read = scope.reads[index]
        read.update(node.input)
        read.discard("")
        missing = [name for name in read if name not in scope.made]
        if missing and scope.parent is None:
            raise UsageError(
                f"{where}: {label(node)} reads {shorten(repr(min(missing)))}, which {scope.name} does not "
                "define. The file is damaged, or an initializer is missing; export it again."
            )
        if missing and scope.parent is not None:
            scope.parent.reads[scope.holder].update(missing)
            read.difference_update(missing)
    outputs = [o if isinstance(o, str) else o.name for o in scope.body.output]
    for name in outputs:
        if name not in scope.made:
            raise UsageError(f"{where}: {shorten(repr(name))} is an output of {scope.name}, which does not define it.")


def _check_order(scope: _Scope, where: str) -> None:
    """Check that the nodes of a graph can be sorted topologically."""
    made, nodes = scope.made, scope.body.node
    waiting = [0] * len(nodes)
    readers: dict[int, list[int]] = defaultdict(list)
    for index, read in scope.reads.items():
        for maker in {made[name] for name in read} - {-1}:
            waiting[index] += 1
            readers[maker].append(index)
    ready = [index for index, count in enumerate(waiting) if not count]
    for maker in ready:  # the list grows
        for index in readers[maker]:
            waiting[index] -= 1
            if not waiting[index]:
                ready.append(index)
    if len(ready) < len(nodes):
        stuck = next(index for index, count in enumerate(waiting) if count > 0)
        raise UsageError(f"{where}: {label(nodes[stuck])} depends on its own result, directly or through other nodes.")
