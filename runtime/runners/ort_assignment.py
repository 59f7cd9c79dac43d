"""Which execution provider of ONNX Runtime runs each norm of a file, and with which operators (`norm_assignment`).

ONNX Runtime records the provider of each node before it fuses nodes (`recorded_nodes`), so the operators that run come
from the optimized graph (`optimized_nodes`), or from the profile of a run (`profiled_nodes`). A fused node is named
after one of the nodes that it replaces, and a node of an inlined local function after the function and its call
(measured with onnxruntime 1.32).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...export.graph.metadata import PATH_KEY
from ...export.lowering.plugin_functions import FUNCTION_NODE_PREFIXES

if TYPE_CHECKING:
    from onnx import ModelProto

# The session option that records the provider of each node; an onnxruntime that does not know it ignores it.
RECORD: Final = "session.record_ep_graph_assignment_info"
# Providers that compile whole subgraphs: the optimized graph cannot be saved, and a session takes long to open.
COMPILING: Final = ("TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
COMPILED: Final = "compiled"
# What fusions append to the name of the node that they name a fused node after.
_FUSED = re.compile(r"(/\w+Fusion\w*/?)+$")
_PROFILED = "_kernel_time"


@dataclass(frozen=True, slots=True)
class NodeRun:
    """One node as ONNX Runtime runs it.

    Attributes:
        name: name of the node.
        op: its operator.
        provider: full name of its execution provider; None if the source does not say it.
        outputs: names of its outputs, if the source has them.
        compiled: whether the provider compiles it, with other nodes.
    """

    name: str
    op: str
    provider: str | None = None
    outputs: frozenset[str] = frozenset()
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class NormNodes:
    """The nodes of one norm in a file.

    Attributes:
        path: its module path.
        names: names of its nodes.
        outputs: names of their outputs.
        calls: its calls of local functions: the function's name, and the number of the call among those of the file.
    """

    path: str
    names: frozenset[str]
    outputs: frozenset[str]
    calls: tuple[tuple[str, int], ...]


def norms_in(model: ModelProto) -> list[NormNodes]:
    """The norms of a file by the metadata of their nodes, in graph order; nodes in subgraphs are not looked at."""
    functions = {function.name for function in model.functions}
    counts: dict[str, int] = {}
    found: dict[str, list[Any]] = {}
    calls: dict[str, list[tuple[str, int]]] = {}
    for node in model.graph.node:
        path = next((row.value for row in node.metadata_props if row.key == PATH_KEY), None)
        if path is not None:
            found.setdefault(path, []).append(node)
        if node.op_type in functions:
            number = counts[node.op_type] = counts.get(node.op_type, -1) + 1
            if path is not None:
                calls.setdefault(path, []).append((node.op_type, number))
    return [
        NormNodes(
            path,
            frozenset(node.name for node in nodes if node.name),
            frozenset(name for node in nodes for name in node.output if name),
            tuple(calls.get(path, ())),
        )
        for path, nodes in found.items()
    ]


def recorded_nodes(session: Any) -> list[NodeRun]:
    """The provider of each node, as a session recorded it before fusions.

    Returns:
        An empty list if this onnxruntime does not record it, or if the session was opened without `RECORD`.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return []
    try:
        subgraphs = session.get_provider_graph_assignment_info()
    except Exception:  # the session has no record; onnxruntime's own class of error has no public name
        return []
    return [
        NodeRun(node.name, node.op_type, subgraph.ep_name, compiled=subgraph.ep_name in COMPILING)
        for subgraph in subgraphs
        for node in subgraph.get_nodes()
    ]


def optimized_nodes(model: ModelProto) -> list[NodeRun]:
    """The nodes of an optimized graph, which has no providers."""
    return [NodeRun(node.name, node.op_type, None, frozenset(filter(None, node.output))) for node in model.graph.node]


def profiled_nodes(path: Path) -> list[NodeRun]:
    """The nodes that ran, in the order of the run, from the profile that onnxruntime wrote."""
    events = json.loads(path.read_text(encoding="utf-8"))
    rows = [(event["name"], event["args"]) for event in events if event.get("cat") == "Node" and "args" in event]
    return list(
        dict.fromkeys(
            NodeRun(name.removesuffix(_PROFILED), args["op_name"], args["provider"], compiled=_compiles(args))
            for name, args in rows
            if name.endswith(_PROFILED) and "op_name" in args and "provider" in args
        )
    )


def _compiles(args: dict[str, Any]) -> bool:
    return args["provider"] in COMPILING


def norm_assignment(
    norms: Sequence[NormNodes], recorded: Sequence[NodeRun], ran: Sequence[NodeRun]
) -> list[dict[str, Any]]:
    """The provider and the operators of each norm.

    Args:
        norms: the norms of the file.
        recorded: nodes with their providers; empty if they are not known.
        ran: nodes of the optimized graph or of a profile; empty if they are not known.

    Returns:
        For each norm its `path`, its `provider` (several joined by `+`) and its `op`: the operators that compute it
        without casts, joined by `+`, or `compiled`. None stands for what is not known.
    """
    prefixes = _inlined([node.name for node in (*recorded, *ran)], norms)
    return [_row(norm, tuple(prefixes[call] for call in norm.calls if call in prefixes), recorded, ran)
            for norm in norms]  # fmt: skip


def _row(
    norm: NormNodes, prefixes: tuple[str, ...], recorded: Sequence[NodeRun], ran: Sequence[NodeRun]
) -> dict[str, Any]:
    def is_own(node: NodeRun) -> bool:
        name = _FUSED.sub("", node.name)
        return name.startswith(prefixes) or name in norm.names or bool(node.outputs & norm.outputs)

    known, last = [node for node in recorded if is_own(node)], [node for node in ran if is_own(node)]
    providers = [node.provider for node in known] or [node.provider for node in last]
    if any(node.compiled for node in known):
        op: str | None = COMPILED
    else:
        op = _joined([node.op for node in last if node.op != "Cast"] or [node.op for node in last])
    return {"path": norm.path, "provider": _joined(providers), "op": op}


def _joined(texts: Iterable[str | None]) -> str | None:
    return "+".join(dict.fromkeys(text for text in texts if text)) or None


def _inlined(names: Iterable[str], norms: Sequence[NormNodes]) -> dict[tuple[str, int], str]:
    """The start of the names of the nodes of each inlined call; none for a function with an unclear number of calls.

    ONNX Runtime inlines the calls of a function in graph order, and names the nodes of the first one
    `_inlfunc_<function>_<node>`, and of later ones `_inlfunc_<function>_token_<number>_<node>` with ascending numbers.
    """
    calls: dict[str, list[int]] = {}
    for function, number in sorted(call for norm in norms for call in norm.calls):
        calls.setdefault(function, []).append(number)
    found = {}
    names = list(names)
    for function, numbers in calls.items():
        inner = FUNCTION_NODE_PREFIXES.get(function, "")
        pattern = re.compile(rf"_inlfunc_{re.escape(function)}(?:_token_(\d+))?_{re.escape(inner)}")
        matches = [match for match in map(pattern.match, names) if match and inner]
        starts = {-1 if match[1] is None else int(match[1]): match[0] for match in matches}
        if len(numbers) == len(starts):
            found.update({(function, call): starts[key] for call, key in zip(numbers, sorted(starts), strict=True)})
    return found
