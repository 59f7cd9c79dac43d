"""The result of recognition on an ONNX graph: its norms, and the nodes that were refused, with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from ...models.dtypes import onnx_name
from ...models.spec import NormSpec
from .metadata import FOUND_KEY, IN_GRAPH, Form


def node_name(node: ir.Node) -> str:
    """The name by which messages and reports show a node: its own, or else that of its first output."""
    return node.name or next((output.name for output in node.outputs if output.name), "")


@dataclass(frozen=True, slots=True, eq=False)
class GraphSite:
    """One norm in a graph.

    Attributes:
        path: the module path if the file contains it, else a readable name; several calls share one path.
        spec: what the norm computes, as far as the graph shows it.
        form: `plain`, or `residual_add` when a residual add precedes the norm.
        x: the value to normalize, before any cast that widens it. None where one operator adds, normalizes and does
            not output the sum.
        weight: a constant or a value of the graph, or None.
        bias: like weight.
        gate: a value of x's shape, or None.
        y: the result.
        sum_of: the two operands of the residual add, where `form` is `residual_add`.
        nodes: the nodes that compute y from x, in graph order, without constants and without the residual add.
        node: name of the main node; of a node without a name, that of its first output.
        shape: shape of x; None for an unknown dim or an unknown rank.
        dtype: dtype of x.
        target: the target that the norm's single operator belongs to, or None.
    """

    path: str
    spec: NormSpec
    form: Form
    x: ir.Value | None
    weight: ir.Value | None
    bias: ir.Value | None
    gate: ir.Value | None
    y: ir.Value
    sum_of: tuple[ir.Value, ir.Value] | None
    nodes: tuple[ir.Node, ...]
    node: str
    shape: tuple[int | None, ...] | None
    dtype: ir.DataType
    target: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The norm as the JSON interface shows it, like `Site.to_dict`; a graph knows no classes.

        `found` is added where an export found the norm in the graph, not as a module.
        """
        tail = (self.shape or ())[-self.spec.trailing_dims :]
        in_graph = any(FOUND_KEY in node.metadata_props for node in self.nodes)
        return {
            "path": self.path,
            "class": None,
            "spec": self.spec.to_dict(),
            "width": tail[0] if len(tail) == 1 else list(tail) or None,
            "dtype": onnx_name(self.dtype),
            "parameters": [str(value.name) for value in (self.weight, self.bias) if value is not None],
            **({"found": IN_GRAPH} if in_graph else {}),
        }


@dataclass(frozen=True, slots=True)
class GraphRefusal:
    """Nodes that look like a norm and were not recognized or rewritten; `reason` says why."""

    node: str
    path: str
    reason: str
    op_type: str = ""

    def to_dict(self) -> dict[str, str]:
        """The refusal as JSON values; `class` is the operator."""
        return {"path": self.path, "class": self.op_type, "reason": self.reason, "node": self.node}


@dataclass(frozen=True, slots=True)
class GraphRecognition:
    """Every norm of a graph, and every refusal, in graph order."""

    sites: list[GraphSite] = field(default_factory=list)
    refusals: list[GraphRefusal] = field(default_factory=list)
