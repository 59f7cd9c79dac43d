"""What recognition on a graph returns: the norms that stand in it, and what looks like one and was left alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from ...models.dtypes import onnx_name
from ...models.spec import NormSpec
from .metadata import Form


@dataclass(frozen=True, slots=True, eq=False)
class GraphSite:
    """One norm as it stands in a graph.

    Attributes:
        path: the module path where the file tells it, else a name for people; several calls share one.
        spec: what it computes, as far as a graph can show it.
        form: `plain`, or `residual_add` when a residual add stands in front.
        x: what is normalized, before any cast that widens it. None where one operator adds, normalizes and keeps
            the sum to itself.
        weight: a constant or a value of the graph; None without one.
        bias: like weight.
        gate: x's shape, or None.
        y: the result.
        sum_of: the two operands of the residual add, where `form` is `residual_add`.
        nodes: those that compute y from x, in graph order, without constants and without the residual add.
        node: name of the main node.
        shape: of x; None for a dim, or altogether, where the file does not tell.
        dtype: of x.
        target: the target whose operator it is already, for those whose spelling is not ours to replace.
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
        """The norm as the JSON interface shows it, like `Site.to_dict`; a graph knows no classes."""
        tail = (self.shape or ())[-self.spec.trailing_dims :]
        return {
            "path": self.path,
            "class": None,
            "spec": self.spec.to_dict(),
            "width": tail[0] if len(tail) == 1 else list(tail) or None,
            "dtype": onnx_name(self.dtype),
            "parameters": [str(value.name) for value in (self.weight, self.bias) if value is not None],
        }


@dataclass(frozen=True, slots=True)
class GraphRefusal:
    """Nodes that look like a norm and were left as they are."""

    node: str
    path: str
    reason: str
    op_type: str = ""

    def to_dict(self) -> dict[str, str]:
        """The refusal as the JSON interface shows it; the operator stands where a module's class does."""
        return {"path": self.path, "class": self.op_type, "reason": self.reason, "node": self.node}


@dataclass(frozen=True, slots=True)
class GraphRecognition:
    """Every norm of a graph, in graph order, and what was refused."""

    sites: list[GraphSite] = field(default_factory=list)
    refusals: list[GraphRefusal] = field(default_factory=list)
