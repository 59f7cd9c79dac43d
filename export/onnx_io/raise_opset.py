"""Raise the opset import of a graph without changing what any operator computes.

Most operators are only extended from one opset to the next and remain unchanged. Operators whose axes, limits or sizes
became inputs are converted one by one by ONNX's version converter. It silently passes some operators through that it
should change, so only operators whose conversion was verified in ONNX Runtime are converted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir
from onnx import version_converter

from ...models.errors import UnsupportedError

# Broadcasting and test modes had another meaning in earlier opsets.
LOWEST_READ = 7
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
# Operators that ONNX's converter converts correctly. It fails for Resize and Upsample (asymmetric coordinates become
# half-pixel ones), and for Hardmax, GroupNormalization and GridSample (it does not change them).
CONVERTED = frozenset(
    {"BatchNormalization", "Clip", "Dropout", "LogSoftmax", "Pad", "Scatter", "Slice", "Softmax", "Split", "Squeeze"}
    | {"TopK", "Unsqueeze"}
    | {f"Reduce{name}" for name in _REDUCTIONS}
)
_IMPORTS = ("", "ai.onnx")  # two names of one domain


def _always(node: ir.Node) -> bool:
    return True


def _not_last_axis(node: ir.Node) -> bool:
    """All dims from the axis on were normalized together; since then only the axis is."""
    axis = node.attributes.get_int("axis", 1)
    shape = node.inputs[0].shape if node.inputs and node.inputs[0] is not None else None
    return axis != -1 and (shape is None or axis != len(shape) - 1)


def _second_output(node: ir.Node) -> bool:
    return any(output.name for output in node.outputs[1:])


def _ceil_mode(node: ir.Node) -> bool:
    """Windows that start in the padding at the end are no longer computed."""
    return node.attributes.get_int("ceil_mode", 0) != 0


def _odd_padding(node: ir.Node) -> bool:
    """The odd element of computed padding moved to the other side."""
    return "output_shape" in node.attributes or node.attributes.get_string("auto_pad", "NOTSET").startswith("SAME")


def _old_resize(node: ir.Node) -> bool:
    return node.attributes.get_string("coordinate_transformation_mode", "") == "tf_half_pixel_for_nn"


def _equal_parts(node: ir.Node) -> bool:
    """The number of parts became required where their sizes are not given."""
    return (len(node.inputs) < 2 or node.inputs[1] is None) and "num_outputs" not in node.attributes


# Changes that a comparison of two schemas does not show: the opset from which on an operator has another meaning, and
# for which nodes. From ONNX's operator changelog, opsets 7 to 23.
MEANING_CHANGED: dict[str, tuple[tuple[int, Callable[[ir.Node], bool]], ...]] = {
    "AveragePool": ((19, _ceil_mode), (22, _ceil_mode)),
    "BatchNormalization": ((14, _second_output),),  # training, by the number of outputs
    "ConvTranspose": ((11, _odd_padding),),
    "DFT": ((20, _always),),  # the axis became an input with another default
    "Dropout": ((10, _second_output), (12, _second_output)),  # the mask became bool, and then true for kept elements
    "GridSample": ((20, _always),),  # modes have other names
    "GroupNormalization": ((21, _always),),  # scales per channel instead of per group
    "Hardmax": ((13, _not_last_axis),),
    "LogSoftmax": ((13, _not_last_axis),),
    "LpPool": ((18, _ceil_mode), (22, _ceil_mode)),
    "MaxPool": ((22, _ceil_mode),),
    "OneHot": ((11, _always),),  # negative indices now count from the end
    "Resize": ((11, _always), (13, _old_resize)),  # other coordinates
    "RoiAlign": ((16, _always),),  # other coordinates
    "Softmax": ((13, _not_last_axis),),
    "Split": ((18, _equal_parts),),
}


@dataclass(slots=True)
class _Plan:
    """The nodes to convert, and the operators that cannot be converted, with the reason."""

    converted: list[tuple[ir.Node, list[onnx.NodeProto]]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    known: dict[bytes, list[onnx.NodeProto] | str] = field(default_factory=dict)

    def refuse(self, node: ir.Node, reason: str) -> None:
        """Record the first node of each operator that cannot be converted."""
        self.refused.setdefault(node.op_type, f"{node.name or node.outputs[0].name!r}: {reason}")


def raise_opset(model: ir.Model, opset: int) -> None:
    """Set the default domain's import to `opset`, in local functions too, after checking every operator.

    An operator keeps its meaning if its newer definition has the same inputs and every attribute keeps its default; new
    attributes must have a default, be optional, or be absent from the node. Other operators are converted. They keep
    their name, metadata and outputs; additional nodes are inserted before them. If one cannot be converted, nothing
    changes.

    Raises:
        UnsupportedError: the import is above `opset` or below 7, or an operator has another meaning at `opset` and
            cannot be converted.
    """
    current = _import(model.graph.opset_imports) or 1
    if opset < current:
        raise UnsupportedError(f"the graph has opset {current}, which cannot be lowered to {opset}.")
    if opset == current:
        return
    if current < LOWEST_READ:
        raise UnsupportedError(f"opset of the model: expected at least {LOWEST_READ}, got {current}.")
    plan = _Plan()
    _plan_nodes(plan, model.graph.all_nodes(), current, opset, convert=True)
    for function in model.functions.values():
        own = _import(function.opset_imports) or current
        # ONNX applies a function's own import, but ONNX Runtime the model's: the nodes must be equal in both.
        _plan_nodes(plan, function.graph.all_nodes(), min(own, current), opset, convert=own == current)
    if plan.refused:
        raise UnsupportedError(
            f"opset {current} cannot be raised to {opset}: {', '.join(sorted(plan.refused))} would change meaning "
            f"({'; '.join(reason for _, reason in sorted(plan.refused.items()))}). Use a target that needs no newer "
            f"opset, such as primitives, or export the model at opset {opset}."
        )
    if plan.converted:
        taken = _names(model)
        for node, parts in plan.converted:
            _splice(node, parts, taken)
    for imports in (model.graph.opset_imports, *(f.opset_imports for f in model.functions.values())):
        if (_import(imports) or current) <= opset:
            _set_import(imports, opset)


def _import(imports: dict[str, int]) -> int | None:
    return next((imports[name] for name in _IMPORTS if name in imports), None)


def _set_import(imports: dict[str, int], opset: int) -> None:
    for name in [name for name in _IMPORTS if name in imports] or [""]:
        imports[name] = opset


def _plan_nodes(plan: _Plan, nodes: Iterable[ir.Node], current: int, opset: int, *, convert: bool) -> None:
    for node in nodes:
        reason = _change(node, current, opset)
        if reason is None:
            continue
        if not convert or node.op_type not in CONVERTED or _lost(node, current, opset):
            plan.refuse(node, reason)
            continue
        parts = _convert(node, current, opset, plan.known)
        if isinstance(parts, str):
            plan.refuse(node, parts)
        else:
            plan.converted.append((node, parts))


def _change(node: ir.Node, current: int, opset: int) -> str | None:
    """How the operator of this node differs at `opset`; None if it does not."""
    if node.domain != "":
        return None
    try:
        old = onnx.defs.get_schema(node.op_type, current, "")
        new = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return None  # an operator without an ONNX schema (ONNX Runtime's own) has no versions
    if old.since_version == new.since_version:
        return None
    if new.deprecated:
        return "deprecated"
    for since, concerns in MEANING_CHANGED.get(node.op_type, ()):
        if current < since <= opset and concerns(node):
            return f"another meaning since opset {since}"
    if [i.name for i in old.inputs] != [i.name for i in new.inputs[: len(old.inputs)]]:
        return "other inputs"
    for name, attribute in old.attributes.items():
        successor = new.attributes.get(name)
        if successor is None:
            if name in node.attributes:
                return f"no attribute {name}"
        elif attribute.default_value != successor.default_value and name not in node.attributes:
            return f"another default of {name}"
    if len(node.inputs) < new.min_input or len(node.outputs) > new.max_output:
        return "another number of inputs or outputs"
    missing = [name for name, a in new.attributes.items() if a.required and name not in node.attributes]
    return f"needs attribute {missing[0]}" if missing else None


def _lost(node: ir.Node, current: int, opset: int) -> bool:
    """Whether the converter would ignore that an output has another meaning."""
    changes = MEANING_CHANGED.get(node.op_type, ())
    return any(current < since <= opset and test is _second_output and test(node) for since, test in changes)


def _convert(
    node: ir.Node, current: int, opset: int, known: dict[bytes, list[onnx.NodeProto] | str]
) -> list[onnx.NodeProto] | str:
    """Nodes that compute the same at `opset`, with inputs i0, i1, ... and outputs o0, o1, ...

    Returns:
        The nodes, or why there are none.
    """
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        return "its attributes refer to those of the function that contains it"
    model = _alone(node, current)
    key = model.SerializeToString(deterministic=True)
    if key not in known:
        typed = all(value is None or value.dtype is not None for value in node.inputs)
        known[key] = _converted(model, opset, typed)
    return known[key]


def _alone(node: ir.Node, opset: int) -> onnx.ModelProto:
    """A model with only this node. Unknown types are float of any shape."""
    model = onnx.ModelProto(ir_version=8)
    model.opset_import.add(domain="", version=opset)
    model.graph.name = "node"
    proto = model.graph.node.add()
    proto.CopyFrom(ir.to_proto(node))
    for keep_out in ("input", "output", "name", "doc_string", "metadata_props"):
        proto.ClearField(keep_out)
    for index, value in enumerate(node.inputs):
        proto.input.append("" if value is None else f"i{index}")
        if value is not None:
            info = model.graph.input.add(name=f"i{index}")
            if value.type is not None and value.dtype is not None:
                info.type.CopyFrom(ir.to_proto(value).type)
            else:
                info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for index, output in enumerate(node.outputs):
        proto.output.append(f"o{index}" if output.name else "")
        if output.name:
            model.graph.output.add(name=f"o{index}")
    return model


def _converted(model: onnx.ModelProto, opset: int, typed: bool) -> list[onnx.NodeProto] | str:
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)  # the outputs' types, for the checker
        result = version_converter.convert_version(inferred, opset)
        _check(result, opset)
    except Exception as error:  # the errors of the converter and the checker have no common base class
        return f"ONNX cannot convert it ({str(error).splitlines()[0][:120]})"
    parts = []
    for tensor in result.graph.initializer:
        parts.append(onnx.helper.make_node("Constant", [], [tensor.name], value=tensor))
    parts.extend(result.graph.node)
    constants = [a.t for part in parts if part.op_type == "Constant" for a in part.attribute]
    if not typed and any(t.data_type != onnx.TensorProto.INT64 for t in constants):
        return "the dtype of its inputs is unknown; run onnx.shape_inference on the model first"
    outputs = [name for name in model.graph.node[0].output if name]
    if not set(outputs) <= set(parts[-1].output):
        return "its outputs would be computed by more than one node"
    return parts


def _check(model: onnx.ModelProto, opset: int) -> None:
    """Check each node as ONNX's checker does for a whole model, where it also requires the rank of every input."""
    context = onnx.checker.C.CheckerContext()
    context.ir_version = model.ir_version
    context.opset_imports = {"": opset}
    for node in model.graph.node:
        onnx.checker.check_node(node, context)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def _names(model: ir.Model) -> set[str | None]:
    names: set[str | None] = set()
    for graph in (*model.graphs(), *(function.graph for function in model.functions.values())):
        names.update(value.name for value in (*graph.inputs, *graph.initializers.values()))
        for node in graph.all_nodes():
            names.update((node.name, *(output.name for output in node.outputs)))
    return names


def _free_name(wanted: str, taken: set[str | None]) -> str:
    name, number = wanted, 1
    while name in taken:
        name, number = f"{wanted}_{number}", number + 1
    taken.add(name)
    return name


def _splice(node: ir.Node, parts: list[onnx.NodeProto], taken: set[str | None]) -> None:
    """Change the node into the last of its parts, which has its outputs, and insert the others before it."""
    values = {f"i{index}": value for index, value in enumerate(node.inputs) if value is not None}
    base = node.name or node.outputs[0].name or node.op_type
    *before, last = parts
    made = []
    for part in before:
        inputs = [values[name] if name else None for name in part.input]
        new = ir.node(
            part.op_type, inputs, {a.name: ir.from_proto(a).value for a in part.attribute},
            num_outputs=len(part.output), name=_free_name(f"{base}/{part.op_type}", taken),
            metadata_props=dict(node.metadata_props),
        )  # fmt: skip
        for output, name in zip(new.outputs, part.output, strict=True):
            output.name = _free_name(f"{base}/{part.op_type}/output", taken)
            values[name] = output
        made.append(new)
    graph = node.graph
    if graph is None:
        raise ValueError("a node is outside of any graph")
    graph.insert_before(node, made)
    node.op_type = last.op_type
    node.resize_inputs(len(last.input))
    for index, name in enumerate(last.input):
        node.replace_input_with(index, values[name] if name else None)
    node.attributes.clear()
    for attribute in last.attribute:
        node.attributes[attribute.name] = ir.from_proto(attribute)
