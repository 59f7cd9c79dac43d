"""Find every RMSNorm in an ONNX graph by what its nodes compute, independent of the exporter."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from ...models.errors import UsageError
from ...models.spec import NormSpec
from ...plugins import contract
from ..graph.constants import dims, is_floating, is_half, same_dims
from ..graph.infer_types import fill_types
from ..graph.metadata import ONES, PATH_KEY, SPEC_KEY, Form
from ..graph.plugin_nodes import PLUGIN_DOMAINS, is_plugin_node
from ..graph.residual import residual_operands
from ..graph.site import GraphRecognition, GraphRefusal, GraphSite, node_name
from .dataflow import GraphReader
from .fused_ops import OTHER_PLUGIN, is_read, wrong_epsilon
from .terms import Normed
from .to_spec import Reading, reading, shortest, unfolded

SKIP = ("com.microsoft", "SkipSimplifiedLayerNormalization")
ADD_NORMS = tuple((domain, contract.ADD_RMS_NORM) for domain in PLUGIN_DOMAINS)
_SUM_OUTPUT = {SKIP: 3, **dict.fromkeys(ADD_NORMS, 1)}
_WEIGHT_ENDINGS = (".weight", ".gamma", ".scale", ".g")
_SCOPES = "pkg.torch.onnx.name_scopes"

# Whether a weight is read more than once: cached, because counting takes time linear in the number of readers.
_Shared = dict[ir.Value, bool]


def find_graph_norms(model: ir.Model) -> GraphRecognition:
    """Every norm in the model's main graph and in the subgraphs of its control flow.

    Norms in model-local functions are found only after inlining (see `inline_norm_functions`). The model does not
    change, except that missing dtypes and shapes are inferred.

    Args:
        model: a model with nodes in topological order.

    Returns:
        The norms in graph order, and the refusals.
    """
    fill_types(model)
    return find_norms(model)


def find_norms(model: ir.Model) -> GraphRecognition:
    """`find_graph_norms` for a model whose types are known."""
    reader = GraphReader()
    reader.read(model.graph)
    found: dict[ir.Node, GraphSite] = {}
    refusals: dict[ir.Node, GraphRefusal] = {}
    shared: _Shared = {}
    for value, term in reader.terms.items():
        if not isinstance(term, Normed) or value in reader.continued:
            continue
        read = reading(term, reader)
        main = term.reduce
        if isinstance(read, Reading) and len({node.graph for node in read.normed.nodes}) == 1:
            found[_last(read)] = _site(read, shared)
        else:
            reason = read if isinstance(read, str) else "it is spread over several subgraphs of control flow"
            refusals[main] = _refusal(main, term.nodes, reason)
    for node in _composites(model):
        site = _composite(node, shared)
        if isinstance(site, GraphSite):
            found[node] = site
        else:
            refusals[node] = _refusal(node, (node,), site)
    taken = {node for site in found.values() for node in site.nodes}
    for node, reason in reader.refusals.items():
        if node not in taken:
            refusals.setdefault(node, _refusal(node, (node,), reason))
    order = {node: index for index, node in enumerate(ir.traversal.RecursiveGraphIterator(model.graph))}
    return GraphRecognition(
        [found[node] for node in sorted(found, key=lambda n: order[n])],
        [refusals[node] for node in sorted(refusals, key=lambda n: order[n])],
    )


def _refusal(node: ir.Node, nodes: tuple[ir.Node, ...], reason: str) -> GraphRefusal:
    return GraphRefusal(node_name(node), module_path(nodes, None, {}), reason, node.op_type)


def _last(read: Reading) -> ir.Node:
    node = read.y.producer()
    assert node is not None
    return node


def _site(read: Reading, shared: _Shared) -> GraphSite:
    nodes = tuple(dict.fromkeys(read.inside))
    operands = residual_operands(read.x, read.y)
    form: Form = "residual_add" if operands is not None else "plain"
    spec, weight = _refined(read.spec, nodes, read.weight)
    assert read.x.dtype is not None
    return GraphSite(
        module_path(nodes, read.weight, shared), spec, form, read.x, weight, read.bias, read.gate, read.y, operands,
        nodes, node_name(read.normed.reduce), _shape(read.x), read.x.dtype,
    )  # fmt: skip


def _composites(model: ir.Model) -> Iterator[ir.Node]:
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if (node.domain, node.op_type) in _SUM_OUTPUT:
            yield node


def _composite(node: ir.Node, shared: _Shared) -> GraphSite | str:
    """The norm of an operator that adds and normalizes, or why it was refused."""
    kind = (node.domain, node.op_type)
    if kind in ADD_NORMS and not is_plugin_node(node):
        return OTHER_PLUGIN
    a, b, scale = (*node.inputs, None, None, None)[:3]
    bias = node.inputs[3] if kind == SKIP and len(node.inputs) > 3 else None
    if a is None or b is None or scale is None or a.dtype is None or not is_floating(a.dtype):
        return "the dtype of its inputs is unknown"
    if not same_dims(dims(a), dims(b)):
        return "the shapes of its two inputs are not known to be equal"
    used = [
        output for index, output in enumerate(node.outputs[1:], 1) if is_read(output) and index != _SUM_OUTPUT[kind]
    ]
    if used:
        return "its statistics are used elsewhere"
    if bias is not None:
        return "it adds a bias to the sum, which no other operator does"
    if len(dims(scale) or ()) != 1 or not _same_width(scale, a):
        return "the shape of its scale differs from the dim that it normalizes"
    if scale.dtype != a.dtype:
        return "the dtype of its scale differs from that of its input"
    number = _SUM_OUTPUT[kind]
    total = node.outputs[number] if len(node.outputs) > number and node.outputs[number].name else None
    attributes = node.attributes
    epsilon = attributes["epsilon"].as_float() if "epsilon" in attributes else 1e-5
    problem = wrong_epsilon(epsilon)
    if problem is not None:
        return problem
    ours, wide = kind in ADD_NORMS, not is_half(a.dtype)
    scale_type = attributes["scale_type"].as_int() if "scale_type" in attributes else int(ir.DataType.FLOAT)
    cast_first = ours and not wide and scale_type != int(ir.DataType.FLOAT)
    offset = attributes["scale_offset"].as_float() if "scale_offset" in attributes else 0.0
    if offset not in (0.0, 1.0):
        return f"it adds {offset:g} to its scale"
    double = a.dtype == ir.DataType.DOUBLE
    weight = None if scale.name is not None and scale.name.startswith(ONES) else scale
    spec = NormSpec(
        eps=shortest(epsilon),
        scale="one_plus_weight" if offset else "weight" if weight is not None else "none",
        order="no_upcast" if double else "cast_then_scale" if cast_first else "scale_then_cast",
        statistics="input" if double else "float32",
        root="sqrt",
        offset_in_float32=not (cast_first and offset),
    )
    spec, weight = _refined(spec, (node,), weight)
    return GraphSite(
        module_path((node,), scale, shared), spec, "residual_add", total, weight, None, None, node.outputs[0], (a, b),
        (node,), node_name(node), _shape(a), a.dtype, "plugin" if ours else "ort",
    )  # fmt: skip


def _same_width(scale: ir.Value, like: ir.Value) -> bool:
    """Whether a scale may have the size of the last dim. The operators do not broadcast a scale of one element."""
    shape, whole = dims(scale), dims(like)
    if not shape or not whole:
        return True
    return shape[-1] == whole[-1] or not (isinstance(shape[-1], int) and isinstance(whole[-1], int))


def _refined(spec: NormSpec, nodes: tuple[ir.Node, ...], weight: ir.Value | None) -> tuple[NormSpec, ir.Value | None]:
    """The spec in the nodes' metadata, if it agrees with the graph, and its weight; else `spec` and `weight`.

    A graph does not show everything: in float32 there are no casts, a fused operator hides their order, and 1 + weight
    is a single constant. The metadata adds these if it agrees with everything that the graph shows.
    """
    noted = {node.metadata_props[SPEC_KEY] for node in nodes if SPEC_KEY in node.metadata_props}
    if len(noted) != 1:
        return spec, weight
    try:
        known = NormSpec.from_json(noted.pop())
    except UsageError:
        return spec, weight
    fields = ("trailing_dims", "group_size", "reduction", "gate", "activation", "bias")
    same = all(getattr(known, name) == getattr(spec, name) for name in fields)
    if not same or not math.isclose(known.eps, spec.eps, rel_tol=1e-6) or known.has_weight != spec.has_weight:
        return spec, weight
    if known.scale == spec.scale:
        return known, weight
    if known.scale_offset and weight is not None and weight.dtype is not None:
        wide = ir.DataType.FLOAT if known.offset_in_float32 and is_half(weight.dtype) else weight.dtype
        before = unfolded(weight, wide)
        if before is not None:
            return known, before
    return known.replace(scale=spec.scale, offset_in_float32=spec.offset_in_float32), weight


def module_path(nodes: tuple[ir.Node, ...], weight: ir.Value | None, shared: _Shared) -> str:
    """The path of a norm's module, from the nodes' metadata, the name of its weight, or the names of its nodes.

    An exporter may have merged equal weights of several norms; the name of such a weight is not used.
    """
    for node in nodes:
        if PATH_KEY in node.metadata_props:
            return node.metadata_props[PATH_KEY]
    named = "" if weight is None else _owner(weight.name or "")
    if named and weight is not None:
        if weight not in shared:
            shared[weight] = len(weight.uses()) > 1
        if not shared[weight]:
            return named
    for node in nodes:
        scopes = _scopes(node)
        if scopes:
            return scopes
    name = next((node.name for node in nodes if node.name), "")
    head = name.rpartition("/")[0].strip("/")
    return head.replace("/", ".") or named or name or node_name(nodes[-1])


def _owner(name: str) -> str:
    """The module path at the beginning of a weight's name."""
    for ending in _WEIGHT_ENDINGS:
        head, found, _ = name.partition(ending)
        if found:
            return head
    return ""


def _scopes(node: ir.Node) -> str | None:
    """The module path in the metadata of torch's exporter, a list of nested scopes that ends with the operation."""
    text = node.metadata_props.get(_SCOPES, "")
    names = [part.strip().strip("'\"") for part in text.strip("[]").split(",")]
    return names[-2] if len(names) > 2 and names[-2] else None


def _shape(x: ir.Value) -> tuple[int | None, ...] | None:
    shape = dims(x)
    return None if shape is None else tuple(dim if isinstance(dim, int) else None for dim in shape)
