"""The sizes for which a captured graph is valid (`size_limits`), from torch's ranges and asserts on its symbols."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator, Mapping

import torch

from ..graph.sizes import SizeLimits, holds, names_in
from .captured_program import table_ends, user_inputs

# Sizes up to this one are tried against the conditions on a single dim.
_MOST = 4096
# torch may take every dynamic dim as at least 2; whether the graph is valid for 1 is measured.
SPECIALIZED = 2
# Sizes at which a condition on several dims is tried, to drop those that always hold.
_TRIED = (*range(1, 10), 16, 17, 63, 64)
_FUNCTIONS = {"Eq": ast.Eq, "Ne": ast.NotEq}
_ARITHMETIC = {"Mod": ast.Mod, "PythonMod": ast.Mod, "FloorDiv": ast.FloorDiv, "CleanDiv": ast.FloorDiv}
_EXTREMES = {"Min": "min", "Max": "max"}


def symbol_ranges(program: torch.export.ExportedProgram) -> dict[str, tuple[int, int | None]]:
    """Smallest and largest size of each symbol that torch does not fix; None as the largest is unbounded."""
    found = {}
    for symbol, ends in program.range_constraints.items():
        if ends.lower != ends.upper:
            high = None if not ends.upper.is_Integer or int(ends.upper) >= 1 << 40 else int(ends.upper)
            found[str(symbol)] = (int(ends.lower), high)
    return found


def symbols_of(program: torch.export.ExportedProgram) -> list[tuple[int, int, str]]:
    """The dims of the inputs that are one symbol: number of the input, axis, symbol."""
    return [
        (number, axis, str(dim))
        for number, (_, value) in enumerate(user_inputs(program))
        for axis, dim in enumerate(getattr(value, "shape", ()))
        if isinstance(dim, torch.SymInt) and str(dim).isidentifier()
    ]


def size_limits(
    program: torch.export.ExportedProgram, names: Mapping[str, str], example: Mapping[str, int]
) -> SizeLimits:
    """The limits of a captured graph.

    Args:
        program: the captured program.
        names: the name of the dim that each symbol has in the exported graph.
        example: the sizes of the symbols at which the graph was captured.
    """
    ranges: dict[str, tuple[int, int | None]] = {}
    for symbol, ends in symbol_ranges(program).items():
        if symbol in names:
            ranges[names[symbol]] = _both(ranges.get(names[symbol]), ends)
    for symbol, end in table_ends(program, example).items():
        if symbol in names:
            ranges[names[symbol]] = _both(ranges.get(names[symbol]), (0, end))
    sizes = {names[symbol]: size for symbol, size in example.items() if symbol in names}
    conditions = []
    for text in dict.fromkeys(_asserted(program, names)):
        used = names_in(text)
        if not used or not used <= set(sizes) or not holds(text, sizes):
            continue  # a condition that the example itself breaks is not about these dims
        if len(used) == 1:
            (name,) = used
            ends, gaps = _interval(text, name, sizes[name])
            ranges[name] = _both(ranges.get(name), ends)
            conditions += [text] if gaps else []
        elif not all(_holds_for(text, sorted(used))):
            conditions.append(text)
    return SizeLimits(
        {name: ends for name, ends in ranges.items() if ends[0] > 1 or ends[1] is not None}, tuple(conditions)
    )


def _both(a: tuple[int, int | None] | None, b: tuple[int, int | None]) -> tuple[int, int | None]:
    if a is None:
        return b
    highs = [high for high in (a[1], b[1]) if high is not None]
    return max(a[0], b[0]), min(highs, default=None)


def _interval(condition: str, name: str, example: int) -> tuple[tuple[int, int | None], bool]:
    """The smallest and the largest size that a condition on one dim allows, and whether some between them are not."""
    valid = [size for size in range(1, _MOST + 1) if size == example or holds(condition, {name: size})]
    # A condition that still holds near the largest size tried sets no upper end.
    open_ended = any(holds(condition, {name: size}) for size in range(_MOST + 1, 2 * _MOST + 1))
    gaps = len(valid) != valid[-1] - valid[0] + 1 or (open_ended and valid[-1] != _MOST)
    return (valid[0] if not gaps else 1, None if open_ended else valid[-1]), gaps


def _holds_for(condition: str, names: list[str]) -> Iterator[bool]:
    tried = _TRIED if len(names) <= 3 else _TRIED[:4]
    return (
        holds(condition, dict(zip(names, sizes, strict=True)))
        for sizes in itertools.islice(itertools.product(tried, repeat=len(names)), 10_000)
    )


def _asserted(program: torch.export.ExportedProgram, names: Mapping[str, str]) -> Iterator[str]:
    """torch's asserts on the symbols as comparisons of dim names, without those that cannot be written so."""
    environments = {
        id(dim.node.shape_env): dim.node.shape_env
        for _, value in user_inputs(program)
        for dim in getattr(value, "shape", ())
        if isinstance(dim, torch.SymInt)
    }
    for environment in environments.values():
        for assertion in itertools.chain(*environment.deferred_runtime_asserts.values()):
            text = comparison(str(assertion.expr), names)
            if text is not None:
                yield text


def comparison(expression: str, names: Mapping[str, str]) -> str | None:
    """A sympy expression as a comparison of dim names, such as `sequence % 8 == 0` for `Eq(Mod(s1, 8), 0)`.

    Returns:
        None where it has a symbol without a name or another function, or is no comparison.
    """
    try:
        tree = _Named(names).visit(ast.parse(expression, mode="eval"))
        text = ast.unparse(tree)
        names_in(text)
    except (SyntaxError, ValueError, RecursionError):
        return None
    return text


class _Named(ast.NodeTransformer):
    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if not self._names.get(node.id, "").isidentifier():
            raise ValueError(f"{node.id} has no name")
        return ast.Name(self._names[node.id])

    def visit_Call(self, node: ast.Call) -> ast.AST:
        function = node.func.id if isinstance(node.func, ast.Name) else ""
        arguments = [self.visit(argument) for argument in node.args]
        if function in _FUNCTIONS and len(arguments) == 2:
            return ast.Compare(arguments[0], [_FUNCTIONS[function]()], [arguments[1]])
        if function in _ARITHMETIC and len(arguments) == 2:
            return ast.BinOp(arguments[0], _ARITHMETIC[function](), arguments[1])
        if function in _EXTREMES:
            return ast.Call(ast.Name(_EXTREMES[function]), arguments, [])
        raise ValueError(f"{function} is not arithmetic")
