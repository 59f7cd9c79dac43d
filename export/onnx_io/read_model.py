"""Read an ONNX model without its weights, and check that its weights are complete.

Files are not trusted: sizes are checked before memory is allocated, and paths before files are opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from ...models.errors import UnsupportedError, UsageError
from ...models.regular_files import FileStamp, read_bytes, regular_size

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

# Bits per element. Elements below a byte are packed in files, but not in NumPy; a string has no fixed size.
_BITS = {
    "INT4": 4,
    "UINT4": 4,
    "FLOAT4E2M1": 4,
    "INT2": 2,
    "UINT2": 2,
    "FLOAT6E2M3": 6,
    "FLOAT6E3M2": 6,
    "STRING": 0,
}
# File names by which programs mark engines of TensorRT.
ENGINE_SUFFIXES = (".engine", ".plan", ".trt")
# A protobuf message cannot be larger.
LARGEST_MODEL = (1 << 31) - 1


@dataclass(frozen=True)
class ModelFile:
    """A model without the weights that it stores in other files.

    Attributes:
        model: the graph; external data is not loaded.
        path: the file it was read from; None for bytes.
        external_files: the files with external data, each once.
        stamps: the state of every file before it was read.
    """

    model: ModelProto
    path: Path | None
    external_files: tuple[Path, ...]
    stamps: tuple[FileStamp, ...] = field(default=(), repr=False)

    @property
    def where(self) -> str:
        """The file's name for messages."""
        return "the model given as bytes" if self.path is None else str(self.path)

    def check_unchanged(self) -> None:
        """Check that no file changed since it was read.

        Raises:
            UsageError: a file was changed, replaced or removed.
        """
        for stamp in self.stamps:
            stamp.check_unchanged(self.where)


def read_model(source: str | os.PathLike[str] | bytes, weights_folder: Path | None = None) -> ModelFile:
    """Read a model and check its tensors, without loading any external data.

    Args:
        source: path of an ONNX file, or the bytes of one.
        weights_folder: the folder with the external data of a model given as bytes; None if it must not have any.

    Raises:
        UsageError: the file does not exist or is not an ONNX model; a tensor has impossible dims or the wrong number of
            values; or external data is missing, too short, or outside of the model's folder (also through a link).
    """
    import onnx

    path = None if isinstance(source, bytes) else Path(source)
    where = "the model given as bytes" if path is None else str(path)
    try:
        stamp = _stamp(path, where)
        data = source if isinstance(source, bytes) else read_bytes(Path(source), LARGEST_MODEL)
    except OSError as error:
        raise UsageError(f"{where}: cannot be read: {error.strerror or error}.") from error
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's DecodeError, for which onnx has no public name
        if path is not None and path.suffix.lower() in ENGINE_SUFFIXES:
            raise UsageError(
                f"{where} is an engine; expected an ONNX model. Name the .onnx file or the folder it was built from."
            ) from error
        raise UsageError(f"{where}: not an ONNX model, or a truncated one: {error}.") from error
    if not model.HasField("graph"):
        raise UsageError(f"{where}: not an ONNX model: it has no graph.")
    folder = weights_folder if path is None else path.parent
    external = _check_tensors(model, _allowed_folders(path, folder), where)
    return ModelFile(model, path, tuple(s.path for s in external), (*stamp, *external))


def sort_nodes(model: ir.Model, where: str) -> None:
    """Sort the nodes so that each comes after those whose results it reads: ONNX Runtime opens files in any order.

    Raises:
        UsageError: the graph contains a cycle.
    """
    for body in (model.graph, *(function.graph for function in model.functions.values())):
        try:
            body.sort()
        except ValueError as error:
            raise UsageError(
                f"{where}: expected nodes without a cycle, got one: {shorten(str(error), 300)}."
            ) from error


def to_ir(file: ModelFile) -> ir.Model:
    """The model in onnx_ir, for rewriting; external tensors remain references to files.

    Raises:
        UnsupportedError: the model contains something that onnx_ir cannot represent.
        UsageError: the model contradicts itself.
    """
    import onnx_ir as ir

    for node in all_nodes(file.model):
        for attribute in node.attribute:
            _check_attribute(attribute, node, file.where)
    for graph in graphs(file.model):
        for sparse in graph.sparse_initializer:
            raise UnsupportedError(
                f"{file.where}: initializer {shorten(sparse.values.name)} is a sparse tensor, which a rewrite does "
                "not support. Make it dense."
            )
    try:
        model = ir.from_proto(file.model)
    except Exception as error:  # onnx_ir raises many kinds of errors for damaged files
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        kind = UnsupportedError if isinstance(cause, NotImplementedError) else UsageError
        raise kind(f"{file.where}: the graph cannot be read: {shorten(str(cause), 300)}") from error
    sort_nodes(model, file.where)
    if file.path is not None:
        for body in (model.graph, *(function.graph for function in model.functions.values())):
            ir.external_data.set_base_dir(body, file.path.parent)
    return model


def graphs(model: ModelProto) -> Iterator[GraphProto]:
    """The main graph and every subgraph inside it, such as the branches of an If."""
    return with_subgraphs([model.graph])


def all_nodes(model: ModelProto) -> Iterator[NodeProto]:
    """Every node of the main graph, of the local functions, and of the subgraphs in both."""
    for body in (*graphs(model), *model.functions):
        yield from body.node
    for function in model.functions:
        for graph in with_subgraphs([g for node in function.node for g in subgraphs(node)]):
            yield from graph.node


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs in a node's attributes, such as the two branches of an If."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def shorten(text: str | bytes, length: int = 80) -> str:
    """A name or text from a file, shortened and escaped for a message. Bytes are names that are not UTF-8."""
    text = text if isinstance(text, str) else repr(text)
    line = text.encode("unicode_escape", "replace").decode() if not text.isprintable() else text
    return line if len(line) <= length else line[: length - 3] + "..."


def label(node: NodeProto) -> str:
    """A node in a message: its operator and its name, or else its first output."""
    made = next((f", which computes {str(name)!r}" for name in node.output if name), "")
    return f"{shorten(str(node.op_type))} {shorten(repr(node.name) if node.name else 'without a name' + made, 120)}"


def with_subgraphs(found: list[GraphProto]) -> Iterator[GraphProto]:
    """These graphs and every subgraph inside them."""
    pending = list(found)
    while pending:
        graph = pending.pop()
        yield graph
        pending.extend(inner for node in graph.node for inner in subgraphs(node))


def _stamp(path: Path | None, where: str) -> tuple[FileStamp, ...]:
    if path is None:
        return ()
    if "\0" in where or not path.exists():
        raise UsageError(f"{where}: the file does not exist.")
    regular_size(path)  # refuses folders, devices and pipes
    stamp = FileStamp.of(path)
    if stamp.size > LARGEST_MODEL:
        raise UsageError(
            f"{where}: expected at most {LARGEST_MODEL} bytes, got {stamp.size}. Store the weights as external data."
        )
    return (stamp,)


def _check_attribute(attribute: AttributeProto, node: NodeProto, where: str) -> None:
    if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
        raise UnsupportedError(
            f"{where}: attribute {shorten(str(attribute.name))} of {label(node)} is a sparse tensor, which a "
            "rewrite does not support. Make it dense."
        )
    if attribute.type == attribute.UNDEFINED:
        raise UnsupportedError(
            f"{where}: attribute {shorten(str(attribute.name))} of {label(node)} has no type, as in files of IR "
            "version 1. Export the model again with a newer exporter."
        )


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that may be external: initializers, and attributes of nodes and functions."""
    inner = [g for function in model.functions for node in function.node for g in subgraphs(node)]
    for graph in with_subgraphs([model.graph, *inner]):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    defaults = (attribute for function in model.functions for attribute in function.attribute_proto)
    for attribute in (*defaults, *(a for node in all_nodes(model) for a in node.attribute)):
        if attribute.HasField("t") or attribute.type == attribute.TENSOR:
            yield attribute.t
        yield from attribute.tensors
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (t for t in (sparse.values, sparse.indices) if t.data_type)


def _check_tensors(model: ModelProto, folders: Sequence[Path], where: str) -> list[FileStamp]:
    """Check every tensor. Returns the states of the files with external data."""
    import onnx

    files: dict[str, FileStamp] = {}
    for tensor in _tensors(model):
        size = _size(tensor, where)
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            _check_inline(tensor, size, where)
            continue
        if not folders:
            raise UsageError(
                f"{where}: tensor {shorten(tensor.name)} is external data, which a model given as bytes "
                "cannot refer to; give the path of the model."
            )
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if location not in files:
            files[location] = _located(location, folders, tensor.name, where)
        file, end = files[location], _end_of(entries, size, tensor, where)
        if end > file.size:
            raise UsageError(
                f"{where}: external data file {file.path} is truncated: tensor {shorten(tensor.name)} ends at byte "
                f"{end}, and the file has {file.size} bytes. Export or copy it again."
            )
    return list({stamp.path: stamp for stamp in files.values()}.values())


def _size(tensor: TensorProto, where: str) -> int:
    """The number of elements of a tensor."""
    elements = 1
    for dim in tensor.dims:
        elements *= dim
        if dim < 0 or elements >= 1 << 63:
            raise UsageError(
                f"{where}: tensor {shorten(tensor.name)} has impossible dims {shorten(str(list(tensor.dims[:8])))}."
            )
    return elements


def _bits(tensor: TensorProto, where: str) -> int:
    import onnx

    try:
        name = onnx.TensorProto.DataType.Name(tensor.data_type)
        return _BITS[name] if name in _BITS else 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{where}: tensor {shorten(tensor.name)} has unknown dtype {tensor.data_type}.") from error


def _check_inline(tensor: TensorProto, size: int, where: str) -> None:
    """Check that a tensor in the file itself has as many values as its dims require."""
    import onnx

    bits = _bits(tensor, where)
    if tensor.HasField("raw_data"):
        held, needed, unit = len(tensor.raw_data), -(-size * bits // 8), "bytes"
    else:
        held, unit = len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type))), "values"
        complex_types = (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128)
        packed = 8 // bits if bits in (2, 4) else 1
        needed = 2 * size if tensor.data_type in complex_types else -(-size // packed)
    if held != needed:
        raise UsageError(
            f"{where}: tensor {shorten(tensor.name)} has {held} {unit}; its dims "
            f"{shorten(str(list(tensor.dims)))} require {needed}. Export or copy the file again."
        )


def _allowed_folders(path: Path | None, folder: Path | None) -> list[Path]:
    """The folder that external data is relative to, followed by the folders that the resolved files may be in.

    The folder and the model may be links: the cache of the Hugging Face hub links a model to a store with its weights.
    ONNX Runtime applies the same rule.
    """
    if folder is None:
        return []
    real = [Path(os.path.realpath(folder))]
    if path is not None:
        real.append(Path(os.path.realpath(path)).parent)
    return [folder, *real]


def _located(location: str | bytes, folders: Sequence[Path], tensor: str, where: str) -> FileStamp:
    if isinstance(location, bytes):  # not UTF-8
        raise UsageError(f"{where}: external data of {shorten(tensor)} is in {location!r}, which is not a file name.")
    # Both kinds of path, because the model may have been written on another operating system.
    parts = PurePosixPath(location).parts + PureWindowsPath(location).parts
    absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).drive or location.startswith("\\")
    outside = not location or absolute or ".." in parts or "\0" in location
    folder, *allowed = folders
    file = folder / ("" if outside else location)
    if outside or not any(Path(os.path.realpath(file)).is_relative_to(place) for place in allowed):
        raise UsageError(
            f"{where}: tensor {shorten(tensor)} has its external data in {shorten(repr(location))}, which is "
            "outside of the model's folder; move it beside the model."
        )
    try:
        if file.is_file():
            return FileStamp.of(file)
    except OSError as error:  # for example, the name is too long
        raise UsageError(
            f"{where}: external data file {shorten(str(file))} of tensor {shorten(tensor)} cannot be opened: "
            f"{error.strerror or error}."
        ) from error
    raise UsageError(f"{where}: external data file {file} of tensor {shorten(tensor)} is missing.")


def _end_of(entries: dict[str, str], size: int, tensor: TensorProto, where: str) -> int:
    """The offset in bytes at which an external tensor ends in its file."""
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    except ValueError:
        offset = length = -1
    if offset < 0 or length < 0:
        raise UsageError(
            f"{where}: the offset or length of tensor {shorten(tensor.name)}'s external data is not a valid number."
        )
    return offset + max(length, -(-size * _bits(tensor, where) // 8))
