"""Functions that plant faults: each returns a function for `Fault.plant`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from .faults import Plant
from .surgery import Array, Edit, Spelling, change_weight, respell, scale_of, set_attribute, set_eps


def eps(path: str, change: Callable[[float], float]) -> Plant:
    """Another epsilon, in the place where the target stores it."""
    return lambda edit: set_eps(edit, path, change)


def weight(path: str, change: Callable[[Array], Array]) -> Plant:
    """Another weight (or 1 + weight), in the place where the target stores it."""
    return lambda edit: change_weight(edit, path, change)


def weight_of_other(path: str, other: str) -> Plant:
    """The weight of another norm."""
    return lambda edit: change_weight(edit, path, lambda _: scale_of(edit.norm(other)))


def formula(path: str, **options: Any) -> Plant:
    """The norm rewritten with wrong steps or a wrong spec; see `respell`."""
    return lambda edit: respell(edit, path, **options)


def attribute(path: str, name: str, value: float) -> Plant:
    """Another attribute on the norm's operator."""
    return lambda edit: set_attribute(edit, path, name, value)


def in_body(function: str, op_type: str, change: Callable[[ir.Function, ir.Node], None]) -> Plant:
    """A change at the first node of a type in the body of a plugin operator's function."""

    def plant(edit: Edit) -> None:
        body = next(f for f in edit.model.functions.values() if f.name == function)
        change(body, next(node for node in body if node.op_type == op_type))

    return plant


def op_type(path: str, old: str, new: str) -> Plant:
    """Another operator with the same inputs in place of one of the norm's."""

    def plant(edit: Edit) -> None:
        next(node for node in edit.norm(path).nodes if node.op_type == old).op_type = new

    return plant


def sum_and_result_swapped(path: str) -> Plant:
    def plant(edit: Edit) -> None:
        norm = edit.norm(path)
        exchange(norm.x, norm.y)
        norm.x.name, norm.y.name = norm.y.name, norm.x.name

    return plant


def results_swapped(first: str, second: str) -> Plant:
    """Each of two norms computes the other's value."""

    def plant(edit: Edit) -> None:
        a, b = edit.norm(first).y, edit.norm(second).y
        exchange(a, b)
        a.name, b.name = b.name, a.name

    return plant


def exchange(a: ir.Value, b: ir.Value) -> None:
    """Exchange the readers of two values."""
    of_a, of_b = list(a.uses()), list(b.uses())
    for value, uses in ((b, of_a), (a, of_b)):
        for node, index in uses:
            node.replace_input_with(index, value)


def skipped(path: str, *, deleted: bool) -> Plant:
    def plant(edit: Edit) -> None:
        norm = edit.norm(path)
        norm.y.replace_all_uses_with(norm.x)
        if deleted:
            edit.graph.remove(norm.nodes, safe=True)

    return plant


def twice(path: str) -> Plant:
    """A second copy of the norm's nodes after it, with the same metadata."""

    def plant(edit: Edit) -> None:
        norm = edit.norm(path)
        uses = list(norm.y.uses())
        again = Spelling(edit, norm).write(norm.y)
        producer = again.producer()
        assert producer is not None
        producer.metadata_props.update(norm.core.metadata_props)
        for node, index in uses:
            node.replace_input_with(index, again)

    return plant


def unlabeled(path: str, change: Callable[[float], float]) -> Plant:
    """Another epsilon in a norm whose metadata a tool has dropped."""

    def plant(edit: Edit) -> None:
        set_eps(edit, path, change)
        for node in edit.norm(path).nodes:
            node.metadata_props.clear()

    return plant
