"""GraphReader: read a graph node by node and record the formula of every value that may belong to a norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import onnx_ir as ir

from ..graph.constants import (
    DEFAULT_DOMAINS,
    axes_of,
    dims,
    integers,
    is_floating,
    is_half,
    same_dims,
    scalar,
    static,
    widens,
)
from ..graph.metadata import ONES
from ..graph.shape_checks import (
    both_ways,
    copies_dims,
    fits,
    is_ones,
    other_input,
    raises_rank,
    reshapes_back,
    result_dtype,
    subtracts_mean,
    unreshaped,
)
from .fused_ops import FUSED, fused_norm
from .terms import MOST_NODES, Activated, Normed, Squares, Statistic, Step, Term, is_vector

_LAYER_NORM = "the mean is subtracted first, so it is a LayerNorm"
_OUTSIDE = "epsilon is added outside of the root, not to the mean of squares"
_DIVIDED = "the statistic is divided by a value that is not constant"
_BOUND = "the statistic is clamped (as in L2 normalization), where RMSNorm adds epsilon to the mean of squares"
_POWER = "x is multiplied by another power of the statistic than -1/2"
_GONE = "the reduced dims are removed before x is scaled, so the factors do not broadcast over rows"
_OTHER = "the value that is squared is not the value that is scaled"
_ADDED = "a value that is not constant is added to the statistic"


class GraphReader:
    """The formulas of a graph's values.

    Attributes:
        terms: the formula of each value that has one.
        refusals: why the nodes around a Reduce node are not a norm, by Reduce node.
        continued: normalized values that a longer formula continues.
    """

    def __init__(self) -> None:
        self.terms: dict[ir.Value, Term] = {}
        self.refusals: dict[ir.Node, str] = {}
        self.continued: set[ir.Value] = set()
        self._roots: dict[ir.Value, ir.Value] = {}

    def read(self, graph: ir.Graph) -> None:
        """Read a graph and its subgraphs, in order."""
        pending: list[Iterator[ir.Node]] = [iter(graph)]
        while pending:
            node = next(pending[-1], None)
            if node is None:
                pending.pop()
                continue
            self._read(node)
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
                    pending.append(iter(attribute.as_graph()))
                elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
                    pending.extend(iter(inner) for inner in attribute.as_graphs())

    def root(self, value: ir.Value) -> ir.Value:
        """The value before any cast that widens it."""
        return self._roots.get(value, value)

    def _read(self, node: ir.Node) -> None:
        if not node.outputs or not node.inputs or node.inputs[0] is None:
            return
        if (node.domain if node.domain != "ai.onnx" else "", node.op_type) in FUSED:
            fused = fused_norm(node, self.root)
            if isinstance(fused, Normed):
                self.terms[node.outputs[0]] = fused
            elif fused is not None:
                self._refuse(node, fused)
            return
        handler = _HANDLERS.get(node.op_type) if node.domain in DEFAULT_DOMAINS else None
        if handler is None or raises_rank(node):
            return
        term = handler(self, node)
        if term is not None and len(term.nodes) <= MOST_NODES:
            self.terms[node.outputs[0]] = term
            if isinstance(term, Normed) and term.previous is not None:
                self.continued.add(term.previous.value)

    # Helpers ------------------------------------------------------------------------------------------------------

    def _term(self, value: ir.Value | None) -> Term | None:
        return None if value is None else self.terms.get(value)

    def _open(self, value: ir.Value | None) -> Normed | None:
        """The normalized value if exactly one node reads it, because only then that node can be part of the norm."""
        term = self._term(value)
        if value is None or not isinstance(term, Normed) or value.is_graph_output() or len(value.uses()) != 1:
            return None
        return term

    def _refuse(self, reduce: ir.Node, reason: str) -> None:
        self.refusals.setdefault(reduce, reason)

    # Operators ----------------------------------------------------------------------------------------------------

    def _cast(self, node: ir.Node) -> Term | None:
        value, out = node.inputs[0], node.outputs[0]
        assert value is not None
        if out.dtype is None and node.op_type == "Cast" and "to" in node.attributes:
            out.dtype = ir.DataType(node.attributes["to"].as_int())
        root = self.root(value)
        # A value that is widened and then narrowed to its original dtype is the same value.
        if node.op_type == "Identity" or widens(value.dtype, out.dtype) or (out.dtype and root.dtype == out.dtype):
            self._roots[out] = root
        term, to = self._term(value), out.dtype
        if node.op_type == "Identity" and to is None:
            to = value.dtype
        if not is_floating(to):  # no spec rounds to integers or eight-bit floats
            return None
        if isinstance(term, Squares):
            return Squares(term.root, term.taken, term.half or is_half(to), (*term.nodes, node))
        if isinstance(term, Statistic):
            if term.root.dtype == ir.DataType.DOUBLE and to != ir.DataType.DOUBLE:
                return None
            if not is_half(to) or is_half(value.dtype):
                return term.with_node(node)
            if abs(term.p) == 0.5 and term.scale is None and not term.half:
                return term.with_node(node, factor_half=True)
            return term.with_node(node, half=True)
        if isinstance(term, Activated):
            return Activated(term.root, term.taken, term.kind, (*term.nodes, node)) if widens(value.dtype, to) else None
        normed = self._open(value)
        if normed is None or not is_floating(to) or to is None:
            return None
        return normed.then(node, Step("cast", to) if to != value.dtype else None)

    def _pow(self, node: ir.Node) -> Term | None:
        base, exponent = node.inputs[0], scalar(node.inputs[1])
        assert base is not None
        if exponent is None or not is_floating(base.dtype):
            return None
        term = self._term(base)
        if isinstance(term, Statistic):
            raised = term.power(exponent)
            return self._rooted(raised.with_node(node), node) if raised is not None else None
        if exponent == 2.0:
            return Squares(self.root(base), base, is_half(node.outputs[0].dtype), (node,))
        return None

    def _sqrt(self, node: ir.Node) -> Term | None:
        term = self._term(node.inputs[0])
        raised = term.power(0.5) if isinstance(term, Statistic) else None
        return None if raised is None else self._rooted(raised.with_node(node), node)

    def _reciprocal(self, node: ir.Node) -> Term | None:
        term = self._term(node.inputs[0])
        raised = term.power(-1.0) if isinstance(term, Statistic) else None
        return None if raised is None else self._rooted(raised.with_node(node), node)

    def _rooted(self, term: Statistic, node: ir.Node) -> Statistic:
        """Arithmetic in a half type rounds the statistic, unless it is the finished factor that was cast to it."""
        if is_half(node.outputs[0].dtype) and not term.factor_half:
            return replace(term, half=True)
        return term

    def _reduce(self, node: ir.Node) -> Term | None:
        value = node.inputs[0]
        assert value is not None
        term = self._term(value)
        if node.op_type in ("ReduceSumSquare", "ReduceL2") and is_floating(value.dtype):
            term = Squares(self.root(value), value, is_half(value.dtype), ())
        if not isinstance(term, Squares):
            return None
        axes = axes_of(node)
        taken = dims(term.taken)
        rank = None if taken is None else len(taken)
        if axes is None:
            noop = "noop_with_empty_axes" in node.attributes and node.attributes["noop_with_empty_axes"].as_int() != 0
            if rank != 1 or len(node.inputs) > 1 or noop:
                self._refuse(node, "it reduces over axes that are not constant")
                return None
            axes = [0]
        if any(axis >= 0 for axis in axes):
            if rank is None:
                self._refuse(node, "the rank of its input is unknown, so its axes are unknown")
                return None
            axes = [axis - rank if axis >= 0 else axis for axis in axes]
        count = len(axes)
        if sorted(axes) != list(range(-count, 0)) or not axes or (rank is not None and count > rank):
            self._refuse(node, f"it reduces over axes {sorted(axes)}, which are not the trailing ones")
            return None
        size = 1.0
        if node.op_type != "ReduceMean":
            tail = static(taken, count)
            if tail is None:
                self._refuse(node, "it sums squares over a dynamic width")
                return None
            size = float(math.prod(tail))
        keep = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
        statistic = Statistic(
            term.root, term.taken, count, keep == 1, term.half or is_half(node.outputs[0].dtype), size, 0.0, 1.0, 1.0,
            node, (*term.nodes, node),
        )  # fmt: skip
        return statistic if node.op_type != "ReduceL2" else statistic.power(0.5)

    def _add(self, node: ir.Node) -> Term | None:
        for value, other in both_ways(node):
            term = self._term(value)
            if isinstance(term, Statistic):
                return self._shifted(term, node, scalar(other), other)
        for value, other in both_ways(node):
            normed = self._open(value)
            if normed is not None and is_vector(other, normed):
                return normed.then(node, Step("bias", result_dtype(node), other))
        return None

    def _sub(self, node: ir.Node) -> Term | None:
        term, number = self._term(node.inputs[0]), scalar(node.inputs[1])
        if isinstance(term, Statistic) and number is not None:
            return self._shifted(term, node, -number, node.inputs[1])
        return None

    def _shifted(self, term: Statistic, node: ir.Node, number: float | None, other: ir.Value | None) -> Term | None:
        if number is None or term.p != 1.0:
            if term.p == 1.0 or number is not None:
                self._refuse(term.reduce, _ADDED if term.p == 1.0 else _OUTSIDE)
            return None
        half = term.half or is_half(node.outputs[0].dtype)
        return term.with_node(node, b=term.b + number, half=half)

    def _bounded(self, node: ir.Node) -> Term | None:
        for value in node.inputs:
            term = self._term(value)
            if isinstance(term, Statistic):
                self._refuse(term.reduce, _BOUND)
        return None

    def _mul(self, node: ir.Node) -> Term | None:
        a, b = node.inputs[0], node.inputs[1]
        if a is None or b is None:
            return None
        activated = self._silu(node, a, b)
        if activated is not None:
            return activated
        if a is b or self.root(a) is self.root(b):
            squared = self._term(a)
            if isinstance(squared, Statistic) and a is b:
                raised = squared.power(2.0)
                return None if raised is None else self._rooted(raised.with_node(node), node)
            if is_floating(a.dtype):
                return Squares(self.root(a), a, is_half(node.outputs[0].dtype), (node,))
            return None
        for value, other in ((a, b), (b, a)):
            term = self._term(value)
            if isinstance(term, Statistic):
                return self._scaled_by(term, node, other)
        for value, other in ((a, b), (b, a)):
            normed = self._open(value)
            if normed is not None:
                return self._multiplied(normed, node, other)
        return None

    def _div(self, node: ir.Node) -> Term | None:
        a, b = node.inputs[0], node.inputs[1]
        if a is None or b is None:
            return None
        number, term = scalar(b), self._term(a)
        if number is not None and number != 0.0:
            if isinstance(term, Statistic):
                return self._rooted(term.times(1.0 / number).with_node(node), node)
            normed = self._open(a)
            return normed.then(node, None, 1.0 / number) if normed is not None else None
        divisor = self._term(b)
        if not isinstance(divisor, Statistic):
            if isinstance(term, Statistic):
                self._refuse(term.reduce, _DIVIDED)
            return None
        inverted = divisor.power(-1.0)
        if inverted is None:
            return None
        number = scalar(a)
        if number is not None:
            return self._rooted(inverted.times(number).with_node(node), node)
        return self._scaled_by(inverted, node, a, divided=True)

    def _scaled_by(self, term: Statistic, node: ir.Node, other: ir.Value, divided: bool = False) -> Term | None:
        """The product of a statistic and something else: a constant, x itself, or a weight."""
        number = scalar(other)
        if number is not None:
            return self._rooted(term.times(number).with_node(node), node)
        if self.root(other) is term.root:
            return self._normalized(term, node, other, divided)
        weighted = self._weighted(term, other)
        if weighted is not None:
            return self._normalized(term, node, weighted[0], divided, weighted[1])
        if term.p == -0.5 and term.scale is None and term.reduced and fits(other, term.taken, term.axes):
            return term.with_node(node, scale=other, half=term.half or is_half(node.outputs[0].dtype))
        if abs(term.p) == 0.5:
            self._refuse(term.reduce, _OTHER)
        return None

    def _normalized(
        self, term: Statistic, node: ir.Node, operand: ir.Value, divided: bool, before: ir.Node | None = None
    ) -> Term | None:
        if term.p != -0.5 or not term.reduced:
            self._refuse(term.reduce, _POWER if term.reduced else _GONE)
            return None
        if subtracts_mean(term.root):
            self._refuse(term.reduce, _LAYER_NORM)
            return None
        # c (a M + b)^(-1/2) = c a^(-1/2) (M + b/a)^(-1/2)
        if not (0 < term.a < math.inf and 0 <= term.b < math.inf):
            self._refuse(term.reduce, "its mean of squares or its epsilon is negative or not finite")
            return None
        dtype = result_dtype(node)
        nodes = (*term.nodes, *((before,) if before is not None else ()), node)
        steps: tuple[Step, ...] = ()
        if before is not None:
            steps = (Step("scale", dtype, other_input(before, operand)),)
        if term.scale is not None:
            steps = (*steps, Step("scale", dtype, term.scale))
        return Normed(
            node.outputs[0], term.root, operand, dtype, term.b / term.a, term.c / math.sqrt(term.a), term.axes,
            divided, term.half, term.factor_half, term.reduce, steps, nodes,
        )  # fmt: skip

    def _weighted(self, term: Statistic, product: ir.Value) -> tuple[ir.Value, ir.Node] | None:
        """x and the Mul node, where `product` is x times a weight, in no narrower dtype than the statistic's."""
        node = product.producer()
        if node is None or node.op_type != "Mul" or node.domain not in DEFAULT_DOMAINS or len(product.uses()) != 1:
            return None
        if product.is_graph_output() or is_half(product.dtype):
            return None
        for value, other in both_ways(node):
            if value is not None and self.root(value) is term.root and fits(other, value, term.axes):
                return value, node
        return None

    def _multiplied(self, normed: Normed, node: ir.Node, other: ir.Value) -> Normed | None:
        dtype = result_dtype(node)
        activated = self._term(other)
        if isinstance(activated, Activated) and same_dims(dims(activated.root), dims(normed.value)):
            if other.is_graph_output() or is_half(activated.taken.dtype) != is_half(dtype):
                return None
            gated = normed.then(node, Step("gate", dtype, activated.root, activated.kind))
            return replace(gated, nodes=(*normed.nodes, *activated.nodes, node))
        number = scalar(other)
        off = not math.isclose(normed.coefficient, 1.0, rel_tol=1e-5)
        if number is not None and number > 0 and off:
            return normed.then(node, None, number)
        if is_vector(other, normed):
            # The scales of ones that this package adds for operators and fusions are not weights.
            ours = (other.name or "").startswith(ONES) and is_ones(other)
            return normed.then(node, None if ours else Step("scale", dtype, other))
        return None

    def _silu(self, node: ir.Node, a: ir.Value, b: ir.Value) -> Activated | None:
        for value, gate in ((a, b), (b, a)):
            term = self._term(gate)
            if isinstance(term, Activated) and term.kind == "sigmoid" and self.root(value) is term.root:
                return Activated(term.root, term.taken, "silu", (*term.nodes, node))
        return None

    def _sigmoid(self, node: ir.Node) -> Term | None:
        value = node.inputs[0]
        assert value is not None
        if not is_floating(value.dtype):
            return None
        swish = node.op_type == "Swish"
        alpha = node.attributes["alpha"].as_float() if "alpha" in node.attributes else 1.0
        if swish and alpha != 1.0:
            return None
        return Activated(self.root(value), value, "silu" if swish else "sigmoid", (node,))

    def _unsqueeze(self, node: ir.Node) -> Term | None:
        term = self._term(node.inputs[0])
        if not isinstance(term, Statistic) or term.reduced:
            return None
        axes, shape = axes_of(node), dims(term.taken)
        if axes is None or (shape is None and any(axis >= 0 for axis in axes)):
            return None
        rank = len(shape) if shape is not None else 0
        back = sorted(axis - rank if axis >= 0 else axis for axis in axes)
        return term.with_node(node, reduced=True) if back == list(range(-term.axes, 0)) else None

    def _reshape(self, node: ir.Node) -> Term | None:
        value, out = node.inputs[0], node.outputs[0]
        assert value is not None
        term = self._term(value)
        if isinstance(term, Statistic):
            shape = dims(term.taken)
            wanted = None if shape is None else [*shape[: len(shape) - term.axes], *([1] * term.axes)]
            target = integers(node.inputs[1]) if len(node.inputs) > 1 else None
            copied = shape is not None and target == [0] * (len(shape) - term.axes) + [1] * term.axes
            flat = shape is not None and target == [-1] + [1] * term.axes and len(shape) == term.axes + 1
            fits = same_dims(dims(out), wanted) or flat or (copied and not term.reduced and copies_dims(node, shape))
            return term.with_node(node, reduced=True) if fits else None
        normed = self._open(value)
        if normed is None or any(step.kind == "reshape" for step in normed.steps):
            return None
        before = unreshaped(normed.root)
        if before is None or not reshapes_back(node, before, self.root):
            return None
        return normed.then(node, Step("reshape", result_dtype(node)))

    def _expand(self, node: ir.Node) -> Term | None:
        term = self._term(node.inputs[0])
        if not isinstance(term, Statistic) or not term.reduced:
            return None
        return term.with_node(node) if same_dims(dims(node.outputs[0]), dims(term.taken)) else None


# The method of GraphReader that reads each operator.
_HANDLERS: dict[str, Callable[[GraphReader, ir.Node], Term | None]] = {
    "Cast": GraphReader._cast,
    "CastLike": GraphReader._cast,
    "Identity": GraphReader._cast,
    "Pow": GraphReader._pow,
    "Sqrt": GraphReader._sqrt,
    "Reciprocal": GraphReader._reciprocal,
    "ReduceMean": GraphReader._reduce,
    "ReduceSum": GraphReader._reduce,
    "ReduceSumSquare": GraphReader._reduce,
    "ReduceL2": GraphReader._reduce,
    "Add": GraphReader._add,
    "Sub": GraphReader._sub,
    "Mul": GraphReader._mul,
    "Div": GraphReader._div,
    "Max": GraphReader._bounded,
    "Min": GraphReader._bounded,
    "Clip": GraphReader._bounded,
    "Sigmoid": GraphReader._sigmoid,
    "Swish": GraphReader._sigmoid,
    "Unsqueeze": GraphReader._unsqueeze,
    "Reshape": GraphReader._reshape,
    "Expand": GraphReader._expand,
}
