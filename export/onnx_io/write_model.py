"""Write a rewritten graph to a file without reading its weights, which are copied, linked or referred to.

The conversion to onnx_ir and back loses what onnx_ir does not represent; `graft` restores it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-untyped]

from ...models.errors import UnsupportedError, UsageError
from .atomic_files import copy_or_link, restrict_mode
from .owned_files import MANIFEST
from .read_model import LARGEST_MODEL, ModelFile, shorten

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

# The entries that locate an external tensor; other entries, such as a checksum, describe it.
_PLACE = ("location", "offset", "length")


def write_model(
    model: ir.Model, original: ModelFile, folder: Path, name: str, weights: Literal["copy", "link", "reference"]
) -> list[str]:
    """Write a rewritten model and put the original's external data beside it, byte for byte.

    Args:
        model: the rewritten graph; its external tensors are those of `original`, and none is read.
        original: the file that it was read from.
        folder: an existing folder.
        name: the model's file name in it.
        weights: `link` creates a hard link to each data file of `original`, or a copy where the file system does not
            support links; `copy` creates copies; `reference` creates nothing, for a model in the folder of `original`.
            Symbolic links are not supported, because ONNX Runtime refuses data outside of the model's folder.

    Returns:
        Notes for the user on how the weights were placed.

    Raises:
        UsageError: a data file has the model's name, or a file of `original` changed since it was read.
        UnsupportedError: the graph exceeds the size limit of protobuf.
        OSError: writing failed.
    """
    import onnx_ir as ir

    proto = ir.to_proto(model)
    graft(original.model, proto)
    if proto.ByteSize() > LARGEST_MODEL:
        raise UnsupportedError(
            f"{original.where}: the rewritten graph exceeds {LARGEST_MODEL} bytes, the limit of an ONNX file. "
            "Save the model with its weights as external data first."
        )
    notes = [] if weights == "reference" else _place_weights(original, folder, name, weights)
    (folder / name).write_bytes(proto.SerializeToString(deterministic=True))
    if original.path is not None:
        restrict_mode(folder / name, [original.path])
    original.check_unchanged()
    return notes


def _place_weights(original: ModelFile, folder: Path, name: str, weights: Literal["link", "copy"]) -> list[str]:
    if not original.external_files:
        return []
    if original.path is None:
        raise UsageError("a model given as bytes has no folder to read its external data from.")
    copied = []
    for file in original.external_files:
        place = Path(os.path.normpath(folder / file.relative_to(original.path.parent)))
        for taken, what in ((name, "the new model"), (MANIFEST, "the manifest")):
            if place == folder / taken:
                raise UsageError(
                    f"{original.where}: its external data file has the name of {what}, {shorten(taken)}. "
                    "Save the model with external data under another name."
                )
        place.parent.mkdir(parents=True, exist_ok=True)
        source = Path(os.path.realpath(file))  # os.link does not follow symbolic links
        if not copy_or_link(source, place, weights):
            copied.append(file.name)
    if weights == "link" and copied:
        return [f"{shorten(', '.join(copied), 200)}: copied, because the file system cannot link to the original."]
    return []


def graft(original: ModelProto, rewritten: ModelProto) -> None:
    """Restore in `rewritten` what the conversion through onnx_ir lost, where the nodes and values still exist.

    That is: training information, fields that this version of ONNX does not know, types that onnx_ir does not know,
    additional fields of tensors, and the exact types of inputs and outputs.
    """
    rewritten.training_info.extend(original.training_info[len(rewritten.training_info) :])
    _keep_unknown(original, rewritten)
    _graft_graph(original.graph, rewritten.graph)
    functions = {(f.domain, f.name, f.overload): f for f in original.functions}
    for function in rewritten.functions:
        source = functions.get((function.domain, function.name, function.overload))
        if source is not None:
            _keep_unknown(source, function)
            _graft_nodes(source, function)


def _graft_graph(original: GraphProto, rewritten: GraphProto) -> None:
    _keep_unknown(original, rewritten)
    _same_types(original.input, rewritten.input)
    _same_types(original.output, rewritten.output)
    tensors = {tensor.name: tensor for tensor in original.initializer}
    for tensor in rewritten.initializer:
        if tensor.name in tensors:
            _graft_tensor(tensors[tensor.name], tensor)
    made = {name for node in rewritten.node for name in node.output}
    made.difference_update(info.name for info in (*rewritten.value_info, *rewritten.output))
    rewritten.value_info.extend(info for info in original.value_info if info.name in made)
    _graft_nodes(original, rewritten)


def _graft_nodes(original: GraphProto | FunctionProto, rewritten: GraphProto | FunctionProto) -> None:
    nodes = {_made_by(node): node for node in original.node}
    for node in rewritten.node:
        source = nodes.get(_made_by(node))
        if source is None or (source.op_type, list(source.input)) != (node.op_type, list(node.input)):
            continue
        _keep_unknown(source, node)
        attributes = {attribute.name: attribute for attribute in source.attribute}
        for attribute in node.attribute:
            other = attributes.get(attribute.name)
            if other is None or other.type != attribute.type:
                continue
            if attribute.HasField("t"):
                _graft_tensor(other.t, attribute.t)
            if attribute.HasField("g"):
                _graft_graph(other.g, attribute.g)
            for old, new in zip(other.graphs, attribute.graphs, strict=False):
                _graft_graph(old, new)


def _made_by(node: NodeProto) -> tuple[str, ...]:
    return tuple(name for name in node.output if name)


def _same_types(original: Iterable[ValueInfoProto], rewritten: Iterable[ValueInfoProto]) -> None:
    infos = {info.name: info for info in original}
    for info in rewritten:
        if info.name in infos:
            info.CopyFrom(infos[info.name])


def _graft_tensor(original: TensorProto, rewritten: TensorProto) -> None:
    if _values(original) == _values(rewritten):
        name = rewritten.name
        rewritten.CopyFrom(original)
        if rewritten.name != name:
            rewritten.name = name


def _values(tensor: TensorProto) -> tuple[Any, ...]:
    """The values of a tensor or their location: equal for tensors that differ only in additional fields."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    held = [(d.name, v) for d, v in tensor.ListFields() if d.name == "raw_data" or d.name.endswith("_data")]
    held = [(name, value if name == "raw_data" else list(value)) for name, value in held if name != "external_data"]
    return (tensor.data_type, list(tensor.dims), held, [entries.get(key) for key in _PLACE])


def _keep_unknown(original: Any, rewritten: Any) -> None:
    """Copy the fields that this version of ONNX does not know."""
    if len(UnknownFieldSet(original)) == 0:
        return
    unknown = type(original)()
    unknown.CopyFrom(original)
    for descriptor, _ in unknown.ListFields():
        unknown.ClearField(descriptor.name)
    rewritten.MergeFrom(unknown)
