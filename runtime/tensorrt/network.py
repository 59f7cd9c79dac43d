"""Read and check an ONNX file before TensorRT parses it (`read_network`).

TensorRT's parser silently accepts an empty file as an empty network, converts float64 to float32, and replaces a plugin
that is not registered by its local function. The checks here turn each of these into an error that names the cause.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...export.graph.metadata import FORM_KEY, PATH_KEY, SPEC_KEY
from ...export.graph.plugin_nodes import PLUGIN_DOMAINS, is_plugin_node
from ...export.lowering.in_place_cache import GROUPED
from ...export.lowering.quantized_norms import is_quantized_norm
from ...export.lowering.weight_quantizer import DOMAIN, OPERATOR
from ...export.onnx_io.check_graph import check_graph
from ...export.onnx_io.read_model import ModelFile, all_nodes, graphs, label, read_model, to_ir
from ...models.errors import UnsupportedError, UsageError
from ...plugins import contract

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_NAMESPACE = "plugin_namespace"
_DOUBLE = 11
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class InputDims:
    """A graph input: its name, and each dim as a number, a name, or None if the file specifies neither."""

    name: str
    dims: tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True)
class FileNorm:
    """One norm of a file.

    Attributes:
        path: path of its module, or its node's name.
        form: `plain`, or `residual_add` if a residual add is fused into it.
        node: name of its main node.
        nodes: names of all its nodes.
        is_plugin: whether its main node is one of the contract's operators.
    """

    path: str
    form: str
    node: str
    nodes: frozenset[str]
    is_plugin: bool


@dataclass(frozen=True, slots=True)
class NetworkFile:
    """An ONNX file that passed all checks.

    Attributes:
        path: its path.
        inputs: inputs of the graph that are not initializers.
        norms: its norms in the graph's order.
        plugin_nodes: names of the contract's nodes in the main graph.
        functions: names of the local functions that can replace the plugin.
        external_files: files of external data.
    """

    path: Path
    inputs: list[InputDims]
    norms: list[FileNorm]
    plugin_nodes: list[str]
    functions: list[str]
    external_files: tuple[Path, ...] = field(default=())

    @property
    def has_unnamed_plugins(self) -> bool:
        """Whether some plugin nodes have no name, so that their layers cannot be identified."""
        return any(not name for name in self.plugin_nodes)


def read_network(path: Path, allow_float64: bool = False) -> NetworkFile:
    """Read a file and check for everything that TensorRT would silently change.

    Args:
        path: the .onnx file; its large weights are not read.
        allow_float64: let TensorRT compute float64 values in float32.

    Raises:
        UsageError: the file is not a valid ONNX model, or its weights are missing.
        UnsupportedError: it contains float64 values, operators of ONNX Runtime alone, or plugin nodes where TensorRT
            does not support plugins.
    """
    file = read_model(path)
    check_graph(file.model, file.where)
    if not file.model.graph.node:
        raise UsageError(f"{file.where}: the graph has no nodes, so there is nothing to build.")
    _check_operators(file.model, file.where)
    if not allow_float64:
        _check_no_float64(file.model, file.where)
    plugin_nodes = _plugin_nodes(file.model, file.where)
    initializers = {tensor.name for tensor in file.model.graph.initializer}
    inputs = [
        InputDims(value.name, tuple(_dim(dim) for dim in value.type.tensor_type.shape.dim))
        for value in file.model.graph.input
        if value.name not in initializers
    ]
    functions = [f.name for f in file.model.functions if f.name in contract.INPUTS and f.domain in PLUGIN_DOMAINS]
    return NetworkFile(path, inputs, _norms(file), plugin_nodes, functions, file.external_files)


def _dim(dim: Any) -> int | str | None:
    return dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None


def _check_no_float64(model: ModelProto, where: str) -> None:
    found = list(_float64_values(model))
    if found:
        names = ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
        raise UnsupportedError(
            f"{where}: float64 values, which TensorRT silently computes in float32: {names}. Export the model "
            "in float32, float16 or bfloat16, or accept float32 with --float64-as-float32."
        )


# Operators that an export writes for ONNX Runtime alone, and how to export without them.
_OF_ONNX_RUNTIME = {
    OPERATOR: "with quantized weights, which only ONNX Runtime runs. Export without --quantize; TensorRT reads "
    "weights that are quantized with QuantizeLinear and DequantizeLinear.",
    GROUPED: "that write the cache in place, which only ONNX Runtime runs. Export with --attention node; an engine "
    "keeps its cache on the GPU by itself.",
}


def _check_operators(model: ModelProto, where: str) -> None:
    counts = Counter(node.op_type for node in all_nodes(model) if node.domain == DOMAIN)
    for operator, remedy in _OF_ONNX_RUNTIME.items():
        if counts[operator]:
            raise UnsupportedError(f"{where}: {counts[operator]} nodes {DOMAIN}::{operator} {remedy}")


def _float64_values(model: ModelProto) -> Iterator[str]:
    for graph in graphs(model):
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == _DOUBLE:
                yield value.name
        yield from (tensor.name for tensor in graph.initializer if tensor.data_type == _DOUBLE)
    for node in all_nodes(model):
        for attribute in node.attribute:
            if attribute.t.data_type == _DOUBLE or (
                attribute.i == _DOUBLE and (node.op_type, attribute.name) in _DTYPE_ATTRIBUTES
            ):
                yield label(node)


# Attributes whose number is a data type.
_DTYPE_ATTRIBUTES = {("Cast", "to"), ("EyeLike", "dtype"), ("RandomNormal", "dtype"), ("RandomUniform", "dtype"),
                     ("RandomNormalLike", "dtype"), ("RandomUniformLike", "dtype"), ("Multinomial", "dtype"),
                     ("Bernoulli", "dtype"), ("BlackmanWindow", "output_datatype"),
                     ("HannWindow", "output_datatype"), ("HammingWindow", "output_datatype")}  # fmt: skip


def _plugin_nodes(model: ModelProto, where: str) -> list[str]:
    """Names of the contract's nodes, after checking their place and the attributes for the parser."""
    top = list(_ours(model.graph.node))
    inside = [node for graph in list(graphs(model))[1:] for node in _ours(graph.node)]
    in_functions = [(function, node) for function in model.functions for node in _ours(function.node)]
    if inside:
        raise UnsupportedError(
            f"{where}: {label(inside[0])} is in the body of a control-flow node, where TensorRT does not support "
            "plugins. Write this norm in another form: rmsnorm rewrite --target primitives."
        )
    if in_functions:
        function, node = in_functions[0]
        raise UnsupportedError(
            f"{where}: {label(node)} is in the local function {function.name}, where TensorRT does not support "
            "plugins. Inline the function first, for example with rmsnorm rewrite."
        )
    for name in contract.INPUTS:
        domains = sorted({function.domain for function in model.functions if function.name == name})
        if top and domains and (len(domains) > 1 or domains[0] not in PLUGIN_DOMAINS):
            raise UnsupportedError(
                f"{where}: the local function {name} of domain {domains[0] or 'ai.onnx'!r} has the name of the "
                f"plugin's operator, and TensorRT identifies functions by name only. Rename it."
            )
    dtypes = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in top:
        _check_plugin_node(node, dtypes, where)
    return [node.name for node in top]


def _ours(nodes: Any) -> Iterator[NodeProto]:
    """Nodes of the contract. ONNX Runtime's domain may contain other plugins, which have another namespace."""
    for node in nodes:
        if node.op_type not in contract.INPUTS or node.domain not in PLUGIN_DOMAINS:
            continue
        spaces = [attribute.s.decode(errors="replace") for attribute in node.attribute if attribute.name == _NAMESPACE]
        if node.domain == contract.DOMAIN or spaces == [contract.PLUGIN_NAMESPACE]:
            yield node


def _check_plugin_node(node: NodeProto, dtypes: Mapping[str, int], where: str) -> None:
    attributes = {attribute.name: attribute for attribute in node.attribute}
    for name, expected in contract.PARSER_ATTRIBUTES.items():
        found = attributes[name].s.decode(errors="replace") if name in attributes else None
        if name == "plugin_version" and found is None:
            continue  # the parser's default is "1"
        if found != expected:
            raise UnsupportedError(
                f"{where}: {label(node)}: {name}: expected {expected!r}, got {found!r}. TensorRT would find no plugin "
                "and silently use the local function. Export again with --target plugin."
            )
    values = {
        name: attributes[name].f if kind == "FLOAT" else attributes[name].i
        for name, kind in contract.OPERATOR_ATTRIBUTES[node.op_type].items()
        if name in attributes
    }
    problems = contract.attribute_problems(values, node.op_type)
    for name, kind in contract.OPERATOR_ATTRIBUTES[node.op_type].items():
        if name in values and attributes[name].type != attributes[name].AttributeType.Value(kind):
            got = attributes[name].AttributeType.Name(attributes[name].type)
            problems.insert(0, f"{name}: expected an attribute of type {kind}, got {got}")
    wanted = contract.INPUTS[node.op_type]
    given = dict(zip(wanted, node.input, strict=False))
    # The scale has x's dtype, and is nearly always an initializer.
    names = {number: name for name, number in contract.ONNX_TYPES.items()}
    x_dtype = names.get(dtypes.get(given.get("scale", ""), 0))
    if not problems and x_dtype is not None:
        problems += filter(None, [contract.scale_type_problem(int(values["scale_type"]), x_dtype)])
    y_scale = dtypes.get(given.get("y_scale", ""), contract.ONNX_TYPES["float32"])
    if y_scale != contract.ONNX_TYPES["float32"]:
        problems.append(f"y_scale: expected float32, got ONNX data type {y_scale}")
    if len(node.input) != len(wanted) or not all(node.input):
        problems.append(f"expected {len(wanted)} inputs, got {sum(map(bool, node.input))}")
    if problems:
        raise UnsupportedError(f"{where}: {label(node)}: {'; '.join(problems)}. The plugin does not support it.")


def _norms(file: ModelFile) -> list[FileNorm]:
    """The norms of the main graph: by the metadata of export and rewrite, else recognized from what nodes compute."""
    from ...export.from_onnx.annotate import annotate

    model = to_ir(file)
    for node in model.graph:
        if not node.name and node.outputs:
            node.name = f"node_of_{node.outputs[0].name}"  # the name that TensorRT's parser gives it
    annotate(model)
    nodes: dict[str, list[Any]] = {}
    for node in model.graph:
        if PATH_KEY in node.metadata_props:
            nodes.setdefault(node.metadata_props[PATH_KEY], []).append(node)
    mains = [(path, node) for path, found in nodes.items() for node in found if SPEC_KEY in node.metadata_props]
    calls = Counter(path for path, _ in mains)
    # Nodes of different calls of a module cannot be distinguished: only the main nodes are used then.
    found = [_norm(path, main, nodes[path] if calls[path] == 1 else [main]) for path, main in mains]
    # A norm whose output is quantized can only be recognized by its operator's name.
    bare = [node for node in model.graph if is_quantized_norm(node) and SPEC_KEY not in node.metadata_props]
    return [*found, *(_norm(node.name or "", node, [node]) for node in bare)]


def _norm(path: str, main: Any, nodes: list[Any]) -> FileNorm:
    names = frozenset(node.name for node in nodes if node.name)
    is_plugin = is_plugin_node(main)
    is_add = is_plugin and "residual" in contract.INPUTS[main.op_type]
    form = "residual_add" if is_add else main.metadata_props.get(FORM_KEY, "plain")
    return FileNorm(path or main.name or "", form, main.name or "", names, is_plugin)
