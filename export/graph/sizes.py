"""The sizes that a graph is valid for (`SizeLimits`): a range for each dim, and conditions on several or odd sizes.

A graph is captured at one set of sizes. Where the model branches on a size, the graph holds one branch only. The limits
stand in the manifest and in the file's metadata, so that a runner refuses sizes of another branch.
"""

from __future__ import annotations

import ast
import functools
import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...models.errors import UsageError
from .metadata import SIZES_KEY

# The longest condition that is read; evaluation takes time in proportion to it.
_MOST_CHARACTERS = 1000

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[int, int], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_CALLS: dict[str, Callable[..., int]] = {"min": min, "max": max}


@dataclass(frozen=True, slots=True)
class SizeLimits:
    """The sizes of dynamic dims for which a graph is valid.

    Attributes:
        ranges: smallest and largest size by dim name; None as the largest is unbounded. A dim of any size is absent.
        conditions: comparisons of dim names and integers that hold as well, such as `sequence % 8 == 0`.
    """

    ranges: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    conditions: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.ranges or self.conditions)

    def to_dict(self) -> dict[str, Any]:
        """The limits as JSON values."""
        return {"ranges": {name: list(ends) for name, ends in self.ranges.items()}, "conditions": [*self.conditions]}


def limits_from(row: Mapping[str, Any], where: str) -> SizeLimits:
    """The limits that `SizeLimits.to_dict` described.

    Raises:
        UsageError: the content is not that of `SizeLimits.to_dict`.
    """
    try:
        ranges = {str(name): _ends(low, high) for name, (low, high) in dict(row.get("ranges") or {}).items()}
        conditions = tuple(row.get("conditions") or ())
        for condition in conditions:
            _parsed(condition)
    except (ValueError, TypeError, AttributeError, SyntaxError, RecursionError, MemoryError) as error:
        raise UsageError(
            f"{where}: expected a smallest and a largest size for each dim, and comparisons of sizes, "
            f"got {json.dumps(row, default=str)[:200]}. Export again."
        ) from error
    return SizeLimits(ranges, conditions)


def size_limits_of(manifest: Mapping[str, Any]) -> SizeLimits:
    """The sizes of dynamic dims for which an exported model is valid.

    Raises:
        UsageError: the manifest's `ranges` or `conditions` cannot be read.
    """
    ranges = {dim: ends for row in manifest.get("inputs", ()) for dim, ends in (row.get("ranges") or {}).items()}
    return limits_from({"ranges": ranges, "conditions": manifest.get("conditions", ())}, "manifest.json")


def range_ends(manifest: Mapping[str, Any]) -> dict[str, tuple[int, int | None]]:
    """The smallest and largest size by dim name; None as the largest is unbounded. A dim of any size is absent."""
    return dict(size_limits_of(manifest).ranges)


def metadata_of(limits: SizeLimits) -> dict[str, str]:
    """The entry of an ONNX file's metadata that contains the limits; none without limits."""
    return {SIZES_KEY: json.dumps(limits.to_dict())} if limits else {}


def limits_in(metadata: Mapping[str, str], where: str) -> SizeLimits:
    """The limits in an ONNX file's metadata, without limits where it has none.

    Raises:
        UsageError: the entry cannot be read.
    """
    text = metadata.get(SIZES_KEY)
    if text is None:
        return SizeLimits()
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: its metadata {SIZES_KEY!r} cannot be read: {error}. Export again.") from error
    if not isinstance(row, dict):
        raise UsageError(
            f"{where}: metadata {SIZES_KEY!r}: expected an object, got {type(row).__name__}. Export again."
        )
    return limits_from(row, f"{where}: metadata {SIZES_KEY!r}")


def size_problem(limits: SizeLimits, sizes: Mapping[str, int]) -> str | None:
    """The first limit that sizes break, as `expected X, as the model was exported for this range; got Y`, or None.

    Args:
        limits: the limits.
        sizes: sizes by dim name; a limit on a dim that is absent is not checked.
    """
    for name, ends in limits.ranges.items():
        size = sizes.get(name)
        if size is not None and not within(ends, size):
            wanted = range_text(ends)
            return f"dim {name}: expected {wanted}, as the model was exported for this range; got {size}"
    for condition in limits.conditions:
        names = names_in(condition)
        if names <= set(sizes) and not holds(condition, sizes):
            got = ", ".join(f"{name} {sizes[name]}" for name in sorted(names))
            return f"dims: expected {condition}, as the model was exported for sizes with this property; got {got}"
    return None


def within(ends: tuple[int, int | None], size: int) -> bool:
    """Whether a size is in a range."""
    return ends[0] <= size and (ends[1] is None or size <= ends[1])


def range_text(ends: tuple[int, int | None]) -> str:
    """A range in words."""
    low, high = ends
    if high is None:
        return f"{low} or more"
    return f"at most {high}" if low <= 1 else f"{low} to {high}" if high != low else str(low)


def names_in(condition: str) -> set[str]:
    """The dim names in a condition."""
    tree = _parsed(condition)
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id not in _CALLS}


def formula_value(formula: str, sizes: Mapping[str, int]) -> int:
    """The value of arithmetic on dim names and integers, such as `2*sequence + 1`.

    Raises:
        ValueError: expected names of `sizes`, integers and + - * // % min max.
    """
    try:
        tree = ast.parse(formula if len(formula) <= _MOST_CHARACTERS else "", mode="eval").body
        _check(tree)
        return _value(tree, sizes)
    except (SyntaxError, LookupError, ZeroDivisionError, RecursionError, MemoryError, TypeError) as error:
        raise ValueError(f"expected arithmetic on {', '.join(sizes) or 'integers'}, got {formula[:80]!r}") from error


def holds(condition: str, sizes: Mapping[str, int]) -> bool:
    """Whether a condition is true for these sizes; one that divides by zero is not."""
    try:
        return _compared(_parsed(condition), sizes)
    except ZeroDivisionError:
        return False


def _ends(low: Any, high: Any) -> tuple[int, int | None]:
    if type(low) is not int or (high is not None and type(high) is not int):
        raise ValueError(f"expected two integers, got {low!r} and {high!r}")
    return low, high


@functools.lru_cache(maxsize=256)
def _parsed(condition: str) -> ast.Compare:
    if not isinstance(condition, str) or len(condition) > _MOST_CHARACTERS:
        raise ValueError("expected a short text")
    tree = ast.parse(condition, mode="eval").body
    if not isinstance(tree, ast.Compare) or len(tree.ops) != 1 or type(tree.ops[0]) not in _COMPARISONS:
        raise ValueError("expected one comparison")
    _check(tree.left)
    _check(tree.comparators[0])
    return tree


def _check(node: ast.expr) -> None:
    if isinstance(node, ast.Name) or (isinstance(node, ast.Constant) and type(node.value) is int):
        return
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        _check(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        _check(node.left)
        _check(node.right)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS and node.args:
        for argument in node.args:
            _check(argument)
    else:
        raise ValueError(f"expected sizes, integers and + - * // % min max, got {type(node).__name__}")


def _compared(tree: ast.Compare, sizes: Mapping[str, int]) -> bool:
    return _COMPARISONS[type(tree.ops[0])](_value(tree.left, sizes), _value(tree.comparators[0], sizes))


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int() as number):
            return number
        case ast.Name(id=name):
            return sizes[name]
        case ast.UnaryOp(operand=operand):
            return -_value(operand, sizes)
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_value(left, sizes), _value(right, sizes))
        case ast.Call(func=ast.Name(id=name), args=[only]):
            return _value(only, sizes)
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _CALLS[name](*(_value(argument, sizes) for argument in arguments))
    raise ValueError(f"expected a checked expression, got {type(node).__name__}")
