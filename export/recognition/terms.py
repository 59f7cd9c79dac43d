"""The formulas of the values around a norm: squares, a statistic, an activation, a normalized value.

A graph is read once, node by node. The formula of each value follows from those of its node's inputs, so equivalent
nodes give the same formula: `Pow(ReduceMean(Mul(x, x)) + eps, -0.5)` and
`Reciprocal(Sqrt(ReduceSum(Pow(x, 2)) / n + eps))` are both `(mean(x^2) + eps)^(-1/2)`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from ...models.spec import Activation
from ..graph.constants import regrouping
from ..graph.shape_checks import fits, unreshaped

StepKind = Literal["cast", "scale", "bias", "gate", "reshape"]
# A formula with more nodes is not that of a norm.
MOST_NODES = 64


@dataclass(frozen=True, slots=True, eq=False)
class Squares:
    """x^2, element by element.

    Attributes:
        root: x before any cast that widens it.
        taken: x as it was squared.
        half: whether the squares are rounded to a half type.
        nodes: the nodes that compute it.
    """

    root: ir.Value
    taken: ir.Value
    half: bool
    nodes: tuple[ir.Node, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Statistic:
    """`c * (a * mean(x^2) + b)^p`, one number for each row.

    Attributes:
        root: x before any cast that widens it.
        taken: x as it was squared.
        axes: number of trailing dims of a row.
        reduced: whether the row's dims are kept with size 1 (True) or removed (False).
        half: whether it was rounded to a half type before the root.
        factor_half: whether only the finished factor was rounded to a half type.
        scale: a weight that it was multiplied by already, or None.
        reduce: the node that sums the squares.
        nodes: the nodes that compute it.
    """

    root: ir.Value
    taken: ir.Value
    axes: int
    reduced: bool
    half: bool
    a: float
    b: float
    c: float
    p: float
    reduce: ir.Node
    nodes: tuple[ir.Node, ...]
    factor_half: bool = False
    scale: ir.Value | None = None

    def with_node(self, node: ir.Node, **changes: object) -> Statistic:
        """The statistic after one more node."""
        return replace(self, nodes=(*self.nodes, node), **changes)  # type: ignore[arg-type]

    def times(self, number: float) -> Statistic:
        """The statistic multiplied by a constant."""
        if self.p == 1.0:
            return replace(self, a=self.a * number, b=self.b * number)
        return replace(self, c=self.c * number)

    def power(self, exponent: float) -> Statistic | None:
        """The statistic raised to a constant power; None where c is not positive or a weight was multiplied already."""
        if self.c <= 0 or self.scale is not None:
            return None
        return replace(self, c=self.c**exponent, p=self.p * exponent)


@dataclass(frozen=True, slots=True, eq=False)
class Activated:
    """sigmoid(z) or silu(z).

    Attributes:
        root: z before any cast that widens it.
        taken: z as the activation reads it.
        kind: which activation.
        nodes: the nodes that compute it.
    """

    root: ir.Value
    taken: ir.Value
    kind: Activation
    nodes: tuple[ir.Node, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """An operation on a normalized value: a cast to `dtype`, or a product, sum or gate with `operand`."""

    kind: StepKind
    dtype: ir.DataType
    operand: ir.Value | None = None
    activation: Activation = "none"


@dataclass(frozen=True, slots=True, eq=False)
class Normed:
    """A normalized value and the operations on it.

    Attributes:
        value: the value in the graph after all steps.
        root: x before any cast that widens it.
        operand: x as it was multiplied or divided.
        inner: dtype of the product, before any step.
        eps: added to the mean of squares.
        coefficient: a constant factor that remains.
        axes: number of trailing dims of a row.
        divided: whether x was divided by the root.
        half: whether the statistics were rounded to a half type.
        factor_half: whether only the finished factor was.
        offset: the number that an operator that is the whole norm adds to its scale.
        reduce: the main node, which identifies the norm.
        steps: the operations on the normalized value, in order.
        nodes: the nodes that compute it.
        previous: the normalized value before the last node.
    """

    value: ir.Value
    root: ir.Value
    operand: ir.Value
    inner: ir.DataType
    eps: float
    coefficient: float
    axes: int
    divided: bool
    half: bool
    factor_half: bool
    reduce: ir.Node
    steps: tuple[Step, ...]
    nodes: tuple[ir.Node, ...]
    offset: float = 0.0
    previous: Normed | None = None

    def then(self, node: ir.Node, step: Step | None, coefficient: float = 1.0) -> Normed:
        """The value after one more node."""
        return replace(
            self,
            value=node.outputs[0],
            coefficient=self.coefficient * coefficient,
            steps=self.steps if step is None else (*self.steps, step),
            nodes=(*self.nodes, node),
            previous=self,
        )


Term = Squares | Statistic | Activated | Normed


def is_vector(value: ir.Value | None, normed: Normed) -> bool:
    """Whether a value can be a norm's weight or bias."""
    if any(step.kind == "reshape" for step in normed.steps):
        before = unreshaped(normed.root)
        cut = regrouping(before, normed.root, normed.axes)
        return before is not None and cut is not None and fits(value, before, cut[1])
    return fits(value, normed.value, normed.axes)
