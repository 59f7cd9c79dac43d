"""Let the upstream exporters make the same graph in less time (`quick_exporters`).

Measured on a Llama of 22 layers: torch.export 23 s, its decompositions 22 s, onnxscript's rewriter 48 s. What is saved:

- torch.export records the Python stack of each node, for messages that are not shown: 9 s.
- `run_decompositions` traces the whole program again; `decomposed` traces only the nodes that have a decomposition.
- onnxscript's optimizer transposes each weight of a linear layer in memory; the Transpose of a weight that is at rest
  stays a node.
- onnxscript's rewriter calls the matcher of each rule at each node; most nodes have another operator than the rule.
  It compares each Slice with every Slice of the graph; those of another tensor never fit.
- The signature of an operator is made once for each schema.
- The pass that makes conversions of dtypes explicit runs every node with fake tensors; most nodes need none.

Each part is left out where the installed version has no such function, and the exporters then work as they are.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch.export.graph_signature import TensorArgument
from torch.fx.experimental.proxy_tensor import make_fx

from ..graph.stored_weights import is_at_rest

_PLAIN = ("placeholder", "call_function", "output")  # not submodules, and not the constants of a traced body
_RARE = (100_000, 20, 50)  # thresholds of the three generations
_RESHAPES = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


@contextmanager
def quick_exporters() -> Iterator[None]:
    """The upstream exporters with the changes that the module's docstring lists, while the context is open."""
    with ExitStack() as stack:
        if hasattr(fx.config, "do_not_emit_stack_traces"):
            stack.enter_context(mock.patch.object(fx.config, "do_not_emit_stack_traces", True))
        stack.enter_context(_rare_collections())
        for change in (
            _filtered_rules, _known_signatures, _local_decompositions, _promoted_nodes, _weights_as_they_are,
        ):  # fmt: skip
            patch = change()
            if patch is not None:
                stack.enter_context(patch)
        yield


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Python's garbage collection looks at the millions of objects of a program less often: 10% of a capture."""
    before = gc.get_threshold()
    gc.set_threshold(*(max(usual, rare) for usual, rare in zip(before, _RARE, strict=True)))
    try:
        yield
    finally:
        gc.set_threshold(*before)


# Rules of onnxscript's rewriter ---------------------------------------------------------------------------------------


def _filtered_rules() -> Any:
    """The matcher of onnxscript, which first compares the operators of the node and of the pattern's last node."""
    try:
        from onnxscript.rewriter._basics import MatchResult
        from onnxscript.rewriter._matcher import SimplePatternMatcher
        from onnxscript.rewriter._rewrite_rule import RewriteRuleSet
    except ImportError:
        return None
    original, apply = SimplePatternMatcher.match, RewriteRuleSet.apply_to_model

    @functools.wraps(original)
    def match(self: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        wanted = _operator(self.pattern)
        if options.get("tracer") is None and wanted is not None and wanted != node.op_identifier():
            return MatchResult().fail("the node has another operator")
        return original(self, model, _Consumers.of(self.pattern, graph, node), node, **options)

    @functools.wraps(apply)
    def apply_to_model(self: Any, model: Any, **options: Any) -> Any:
        there = {node.op_identifier() for node in model.graph.all_nodes()}
        there |= {node.op_identifier() for function in model.functions.values() for node in function.all_nodes()}

        def may_match(rule: Any) -> bool:
            pattern = getattr(rule, "_target_pattern", None)
            wanted = _operator(pattern) if pattern is not None else None
            return wanted is None or wanted in there

        with mock.patch.object(self, "rules", list(filter(may_match, self.rules))):
            return apply(self, model, **options)

    stack = ExitStack()
    stack.enter_context(mock.patch.object(SimplePatternMatcher, "match", match))
    stack.enter_context(mock.patch.object(RewriteRuleSet, "apply_to_model", apply_to_model))
    return stack


class _Consumers:
    """The nodes that read what `node` reads, in place of the whole graph."""

    def __init__(self, graph: Any, nodes: list[Any]) -> None:
        self.graph, self._nodes = graph, nodes

    def __iter__(self) -> Iterator[Any]:
        return iter(self._nodes)

    @classmethod
    def of(cls, pattern: Any, graph: Any, node: Any) -> Any:
        """The consumers of `node`'s first input, where each last node of `pattern` reads the same value first."""
        lasts = pattern.output_nodes
        if len(lasts) < 2 or not all(last.inputs and last.inputs[0] is lasts[0].inputs[0] for last in lasts):
            return graph
        value = node.inputs[0] if node.inputs else None
        if value is None:
            return graph
        users = {user for user, _ in value.uses()}
        return cls(getattr(graph, "graph", graph), [each for each in graph if each in users])


def _operator(pattern: Any) -> Any:
    """The operator of a pattern's last node; None where the pattern allows several."""
    last = pattern.output_node if pattern.has_single_output_node else pattern.output_nodes[0]
    return last.op_identifier()


def _known_signatures() -> Any:
    """The signature of an operator, made once for each schema instead of once for each node."""
    try:
        from onnx_ir.schemas import OpSignature

        original = OpSignature.from_op_schema
    except (ImportError, AttributeError):
        return None
    known: dict[Hashable, Any] = {}

    def from_op_schema(schema: Any) -> Any:
        key = (schema.domain, schema.name, schema.since_version)
        if key not in known:
            known[key] = original(schema)
        return known[key]

    return mock.patch.object(OpSignature, "from_op_schema", from_op_schema)


def _weights_as_they_are() -> Any:
    """onnxscript's optimizer, which does not compute the transposition of a weight that is in a mapped file."""
    try:
        from onnxscript import optimizer
    except ImportError:
        return None
    original = optimizer.optimize_ir

    @functools.wraps(original)
    def optimize(model: Any, *arguments: Any, **options: Any) -> None:
        given = options.pop("should_fold", lambda node: None)

        def should_fold(node: Any) -> bool | None:
            if node.op_type == "Transpose" and is_at_rest(node.inputs[0].const_value):
                return False
            return given(node)

        original(model, *arguments, should_fold=should_fold, **options)

    return mock.patch.object(optimizer, "optimize_ir", optimize)


def _promoted_nodes() -> Any:
    """The pass that converts dtypes explicitly, which takes the known value of a node for which it has no rule."""
    try:
        from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter, get_type_promotion_rule
    except ImportError:
        return None
    original = _TypePromotionInterpreter.run_node

    @functools.wraps(original)
    def run_node(self: Any, n: fx.Node) -> Any:
        if n.op == "call_function" and "val" in n.meta and not get_type_promotion_rule(n, self.type_promotion_table):
            return n.meta["val"]
        return original(self, n)

    return mock.patch.object(_TypePromotionInterpreter, "run_node", run_node)


# Decompositions -------------------------------------------------------------------------------------------------------


def _local_decompositions() -> Any:
    """`torch.onnx.export` with `decomposed` in place of `run_decompositions`, where that is possible."""
    try:
        from torch._export.utils import _is_cia_op, _is_preservable_cia_op
        from torch.onnx._internal.exporter import _decomp, _fx_passes
    except ImportError:
        return None
    original = getattr(_fx_passes, "decompose_with_registry", None)
    if original is None:
        return None

    @functools.wraps(original)
    def decompose(program: torch.export.ExportedProgram, registry: Any) -> torch.export.ExportedProgram:
        known = set(_decomp.get_onnx_implemented_overloads(registry))
        table = _decomp.create_onnx_friendly_decomposition_table(known)

        def is_replaced(operator: Any) -> bool:
            return operator in table or (_is_cia_op(operator) and not _is_preservable_cia_op(operator))

        if decomposed(program, table, is_replaced):
            return program
        return original(program, registry)

    return mock.patch.object(_fx_passes, "decompose_with_registry", decompose)


def decomposed(
    program: torch.export.ExportedProgram,
    table: Mapping[Any, Callable[..., Any]],
    is_replaced: Callable[[torch._ops.OpOverload], bool],
) -> bool:
    """Decompose, in place, some nodes of a program.

    Args:
        program: a program without operators that change their arguments and without control flow.
        table: decompositions by operator, also of the operators inside of decompositions.
        is_replaced: whether the nodes of an operator are decomposed.

    Returns:
        False if the program has such operators or a node could not be traced alone; it is then unchanged.
    """
    graph = program.graph
    _name_outputs(program)
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    if any(node.op not in _PLAIN for node in graph.nodes):
        return False
    if any(isinstance(node.target, torch._ops.HigherOrderOperator) or _changes_arguments(node) for node in nodes):
        return False
    if any("val" not in node.meta for node in nodes):  # the copy of a constant; torch traces it again
        return False
    chosen = [node for node in nodes if isinstance(node.target, torch._ops.OpOverload) and is_replaced(node.target)]
    try:
        bodies: dict[Hashable, fx.GraphModule] = {}
        traced = []
        for node in chosen:
            key = _form(node)
            if key not in bodies:
                bodies[key] = _traced(node, table)
            traced.append(bodies[key])
    except Exception:  # what cannot be traced alone is left to torch, whose error would be the one to explain
        return False
    inner = [node for body in bodies.values() for node in body.graph.nodes]
    if any(node.op not in _PLAIN or _changes_arguments(node) for node in inner):
        return False
    for node, body in zip(chosen, traced, strict=True):
        _inline(program, node, body)
    for node in graph.nodes:
        if node.target in _RESHAPES:
            node.args = (node.args[0], _stated_sizes(node.args[1], node.meta["val"].shape))
    graph.eliminate_dead_code()
    graph.lint()
    program.graph_module.recompile()
    return True


def _name_outputs(program: torch.export.ExportedProgram) -> None:
    """Name the outputs of the signature after the nodes that return them, where a pass of torch left another name.

    torch.export removes an `alias` of a result, and its signature still has the name.
    """
    (returned,) = (node.args[0] for node in program.graph.nodes if node.op == "output")
    for spec, node in zip(program.graph_signature.output_specs, returned, strict=True):
        if isinstance(node, fx.Node) and isinstance(spec.arg, TensorArgument):
            spec.arg.name = node.name


def _stated_sizes(sizes: Any, shape: torch.Size) -> list[Any]:
    """The sizes of a reshape with the number in place of -1, where it is known."""
    return [dim if size == -1 and isinstance(dim, int) else size for size, dim in zip(sizes, shape, strict=True)]


def _changes_arguments(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and bool(node.target._schema.is_mutable)


def _form(node: fx.Node) -> Hashable:
    """What the body of a node depends on: its operator, its arguments, and the metadata of the tensors among them."""
    numbers = {source: number for number, source in enumerate(node.all_input_nodes)}
    arguments = fx.map_arg((node.args, node.kwargs), lambda source: f"input {numbers[source]}")
    metadata: list[Hashable] = []
    for value in (source.meta["val"] for source in node.all_input_nodes):
        if isinstance(value, torch.Tensor):
            layout = (str(value.shape), str(value.stride()), str(value.storage_offset()))
            metadata.append((*layout, value.dtype, value.device, value.requires_grad))
        else:
            metadata.append((str(value),))
    return (node.target, str(arguments), tuple(metadata))


def _traced(node: fx.Node, table: Mapping[Any, Callable[..., Any]]) -> fx.GraphModule:
    """The body of a node: a graph whose placeholders are the node's arguments, in the order of `all_input_nodes`."""
    sources = node.all_input_nodes

    def body(*values: Any) -> Any:
        given = dict(zip(sources, values, strict=True))
        arguments, keywords = fx.map_arg((node.args, node.kwargs), lambda source: given[source])
        return node.target(*arguments, **keywords)  # type: ignore[operator]

    values = [source.meta["val"] for source in sources]
    modes = [value.fake_mode for value in values if isinstance(value, torch._subclasses.FakeTensor)]
    with ExitStack() as stack:
        if modes:
            stack.enter_context(modes[0])
        return make_fx(torch.func.functionalize(body), dict(table))(*values)


def _inline(program: torch.export.ExportedProgram, node: fx.Node, body: fx.GraphModule) -> None:
    """Put the nodes of a body in the place of a node."""
    sources = iter(node.all_input_nodes)
    values: dict[fx.Node, Any] = {}
    place = {name: value for name, value in node.meta.items() if name not in ("val", "tensor_meta")}
    with node.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                values[inner] = next(sources)
            elif inner.op == "call_function":
                values[inner] = node.graph.node_copy(inner, lambda source: values[source])
                values[inner].meta = {**place, **{k: v for k, v in inner.meta.items() if k in ("val", "tensor_meta")}}
            elif inner.op == "output":
                result = fx.map_arg(inner.args[0], lambda source: values[source])
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
        program.graph_signature.replace_all_uses(node.name, result.name)
        node.graph.erase_node(node)
        return
    for user in list(node.users):
        user.replace_all_uses_with(result[user.args[1]])
        program.graph_signature.replace_all_uses(user.name, result[user.args[1]].name)
        node.graph.erase_node(user)
    node.graph.erase_node(node)
