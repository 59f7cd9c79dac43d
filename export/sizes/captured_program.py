"""Run a captured program in PyTorch at any sizes (`GraphRun`), and find the ends of its position tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from ...models.attention.attend import attend
from ...models.attention.spec import AttentionSpec
from ...models.eager import eager
from ...models.spec import NormSpec
from ..graph.captured_nodes import ATTENTION_OP, CAPTURE_DOMAIN, NORM_OP

# A position table is followed up to this size.
_MOST = 1 << 16
# Operators that read rows of a table, with the positions of the table and of the indices among their arguments.
_READERS = {
    torch.ops.aten.embedding.default: (0, 1),
    torch.ops.aten.index_select.default: (0, 2),
    torch.ops.aten.index.Tensor: (0, 1),
}


class GraphRun:
    """A captured program that runs in PyTorch, its norms as `eager` and its attentions as `attend` compute them.

    Args:
        program: the program; its weights are not copied.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self._program = program
        self._interpreter = _Interpreter(program.graph_module)

    def __call__(self, leaves: list[Any]) -> list[Any]:
        """The user's outputs for the user's inputs, both flat and in the program's order."""
        with torch.no_grad():
            results = self._interpreter.run(*_arguments(self._program, leaves))
        kinds = [spec.kind for spec in self._program.graph_signature.output_specs]
        return [value for value, kind in zip(results, kinds, strict=True) if kind == OutputKind.USER_OUTPUT]


class _Interpreter(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        if _is_node(n, ATTENTION_OP):
            inputs = self.fetch_args_kwargs_from_env(n)[0][0]
            return attend(AttentionSpec.from_json(_attribute(n, "spec")), *inputs)
        if _is_node(n, NORM_OP):
            inputs = self.fetch_args_kwargs_from_env(n)[0][0]
            x, weight, bias, gate = (*inputs, None, None, None)[:4]
            return eager(NormSpec.from_json(_attribute(n, "spec")), x, weight, bias, gate)
        return super().run_node(n)


def _is_node(node: fx.Node, op: str) -> bool:
    return node.op == "call_function" and op in node.args and node.kwargs.get("domain") == CAPTURE_DOMAIN


def _attribute(node: fx.Node, name: str) -> str:
    """A text among the attributes of such a node; keys and types are in one order, and texts in a list of their own."""
    keys, kinds, texts = (node.kwargs[field] for field in ("attr_keys", "attr_types", "attr_strs"))
    named = [key for key, kind in zip(keys, kinds, strict=True) if kind == "s"]  # type: ignore[arg-type]
    return str(dict(zip(named, texts, strict=True))[name])  # type: ignore[arg-type]


def _arguments(program: torch.export.ExportedProgram, leaves: list[Any]) -> list[Any]:
    given, found = iter(leaves), []
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            found.append(next(given))
        elif isinstance(spec.arg, ConstantArgument):
            found.append(spec.arg.value)
        else:
            name = spec.target or ""
            found.append(program.state_dict[name] if name in program.state_dict else program.constants[name])
    return found


def user_inputs(program: torch.export.ExportedProgram) -> list[tuple[str, Any]]:
    """Name and traced value of each of the user's inputs, in order; the value is None for one that is not a tensor."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    specs = [spec for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    return [(str(spec.arg.name), values.get(str(spec.arg.name))) for spec in specs]


def has_inner_norms(program: torch.export.ExportedProgram) -> bool:
    """Whether norms or attentions are in the bodies of control flow, which `GraphRun` does not run."""
    return any(
        _is_node(node, NORM_OP) or _is_node(node, ATTENTION_OP)
        for name, module in program.graph_module.named_modules()
        if name and isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
    )


def table_ends(program: torch.export.ExportedProgram, sizes: Mapping[str, int]) -> dict[str, int]:
    """The largest size of each symbol for which the indices that are computed from sizes alone are in their tables.

    A table of positions (`embedding(arange(length))`) limits a length, and torch's ranges do not contain that.

    Args:
        program: the captured program.
        sizes: the sizes of the symbols at which it was captured.
    """
    ends: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target not in _READERS:
            continue
        table, indices = (node.args[position] for position in _READERS[node.target])
        for dim, index in _indexed(node, indices):
            rows = getattr(table.meta.get("val"), "shape", ())[dim]
            if not isinstance(index, fx.Node) or not isinstance(rows, int):
                continue
            for symbol in sizes:
                end = _end(index, rows, symbol, sizes)
                if end is not None:
                    ends[symbol] = min(end, ends.get(symbol, end))
    return ends


def _indexed(node: fx.Node, indices: Any) -> list[tuple[int, Any]]:
    if node.target == torch.ops.aten.index.Tensor:
        return [(dim, index) for dim, index in enumerate(indices) if index is not None]
    dim = node.args[1] if node.target == torch.ops.aten.index_select.default else 0
    return [(dim, indices)] if isinstance(dim, int) else []


def _end(index: fx.Node, rows: int, symbol: str, sizes: Mapping[str, int]) -> int | None:
    """The largest size of a symbol with all indices below `rows`, the other symbols at 1; None if there is no end."""
    others = dict.fromkeys(sizes, 1)

    def fits(size: int) -> bool | None:
        try:
            value = _from_sizes(index, {**others, symbol: size}, {})
        except LookupError:
            return None
        return isinstance(value, Tensor) and (value.numel() == 0 or int(value.max()) < rows)

    low, high = 1, _MOST
    if fits(high) is not False or fits(low) is not True:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _from_sizes(node: Any, sizes: Mapping[str, int], known: dict[fx.Node, Any]) -> Any:
    """The value of a node that is computed from sizes alone.

    Raises:
        LookupError: it depends on the values of an input or a weight, or is too large to compute.
    """
    if not isinstance(node, fx.Node):
        return node
    if node not in known:
        size = node.meta.get("val")
        if isinstance(size, torch.SymInt) and str(size) in sizes:
            known[node] = sizes[str(size)]
        elif sum(not isinstance(dim, int) for dim in getattr(size, "shape", ())) > 1:
            raise LookupError(f"{node.name} grows with the square of a size")
        elif node.op == "call_function":
            arguments = fx.map_arg((node.args, node.kwargs), lambda n: _from_sizes(n, sizes, known))
            known[node] = node.target(*arguments[0], **arguments[1])  # type: ignore[operator]
        else:
            raise LookupError(f"{node.name} does not depend on sizes alone")
    return known[node]
