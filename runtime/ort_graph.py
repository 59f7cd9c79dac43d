"""An ONNX model as files: reading the graph without its weights, and checking that the weights are all there."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from ..models.errors import UsageError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

# Types of less than a byte are packed in files, though not in numpy; a text has no fixed size.
_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2, "STRING": 0}


@dataclass(frozen=True)
class ModelFile:
    """A model without the weights that it keeps in other files.

    Attributes:
        model: the graph; external data is not loaded.
        path: where it was read from; None for bytes.
        external_files: the files that hold external data, each once.
    """

    model: ModelProto
    path: Path | None
    external_files: tuple[Path, ...]

    @property
    def where(self) -> str:
        """The file's name for messages."""
        return "the model given as bytes" if self.path is None else str(self.path)


def read_model(source: str | os.PathLike[str] | bytes, weights_folder: Path | None = None) -> ModelFile:
    """Read a model and check its external data, without loading any.

    Args:
        source: path of an ONNX file, or the bytes of one.
        weights_folder: where the external data of bytes lie; None when they must not have any.

    Raises:
        UsageError: there is no such file, it is no ONNX model, or external data is missing, too short, or outside the
            model's folder.
    """
    import onnx

    path = None if isinstance(source, bytes) else Path(source)
    where = "the model given as bytes" if path is None else str(path)
    if path is not None and not path.is_file():
        raise UsageError(f"{where}: there is no such file." if not path.exists() else f"{where}: not a file.")
    try:
        model = (
            onnx.load_model_from_string(source)
            if isinstance(source, bytes)
            else onnx.load(source, load_external_data=False)
        )
    except OSError as error:
        raise UsageError(f"{where}: cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # protobuf's DecodeError, which has no public home in onnx
        raise UsageError(f"{where}: not an ONNX model, or one cut short: {error}.") from error
    if not model.HasField("graph"):
        raise UsageError(f"{where}: not an ONNX model: it holds no graph.")
    folder = weights_folder if path is None else path.parent
    return ModelFile(model, path, _check_external_data(model, folder, where))


def file_record(path: Path) -> dict[str, Any]:
    """Name, size in bytes and SHA-256 of a file, for provenance."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}


def graphs(model: ModelProto) -> Iterator[GraphProto]:
    """The main graph and every subgraph inside it, such as the branches of an If."""
    pending = [model.graph]
    while pending:
        graph = pending.pop()
        yield graph
        pending.extend(subgraph for node in graph.node for subgraph in _subgraphs(node))


def op_counts(model: ModelProto) -> Counter[str]:
    """How often each op occurs in the graph and its subgraphs.

    Returns:
        Counts by `Op` in the default domain and `domain::Op` elsewhere. A call of a local function counts as itself.
    """
    counts: Counter[str] = Counter()
    for graph in graphs(model):
        counts.update(
            node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}" for node in graph.node
        )
    return counts


def input_dtypes(model: ModelProto, op_type: str, node_name: str) -> list[str]:
    """The dtypes that go into the first node of this op and name, as far as the model states them."""
    import onnx

    for graph in graphs(model):
        stated = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
        stated |= {t.name: t.data_type for t in graph.initializer}
        for node in graph.node:
            if node.op_type == op_type and node.name == node_name:
                types = dict.fromkeys(stated[name] for name in node.input if stated.get(name))
                return [onnx.TensorProto.DataType.Name(t).lower() for t in types]
    return []


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that may keep its values elsewhere: initializers, and attributes of nodes and functions."""
    nodes = [node for function in model.functions for node in function.node]
    for graph in graphs(model):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        nodes.extend(graph.node)
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _check_external_data(model: ModelProto, folder: Path | None, where: str) -> tuple[Path, ...]:
    import onnx

    files: dict[Path, int] = {}
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        if folder is None:
            raise UsageError(
                f"{where}: tensor {tensor.name} keeps its values in another file, which bytes cannot point to; "
                "give the path of the model."
            )
        entries = {entry.key: entry.value for entry in tensor.external_data}
        file = _located(entries.get("location", ""), folder, tensor.name, where)
        if file not in files:
            if not file.is_file():
                raise UsageError(f"{where}: external data file {file} of tensor {tensor.name} is missing.")
            files[file] = file.stat().st_size
        end = _end_of(entries, tensor, where)
        if end > files[file]:
            raise UsageError(
                f"{where}: external data file {file} is cut short: tensor {tensor.name} ends at byte {end}, "
                f"the file at {files[file]}. Export or copy it again."
            )
    return tuple(files)


def _located(location: str, folder: Path, tensor: str, where: str) -> Path:
    # Both kinds of path, because a model may come from another system than this one.
    parts = PurePosixPath(location).parts + PureWindowsPath(location).parts
    absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).drive or location.startswith("\\")
    if not location or absolute or ".." in parts:
        raise UsageError(
            f"{where}: tensor {tensor} keeps its values in {location!r}, which is not inside the model's folder; "
            "external data must lie beside the model."
        )
    return folder / location


def _end_of(entries: dict[str, str], tensor: TensorProto, where: str) -> int:
    """Where the values of an external tensor end in their file, in bytes."""
    import onnx

    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    except ValueError:
        offset = length = -1
    if offset < 0 or length < 0:
        raise UsageError(f"{where}: the offset or length of tensor {tensor.name}'s external data is no whole number.")
    try:
        name = onnx.TensorProto.DataType.Name(tensor.data_type)
        bits = _BITS[name] if name in _BITS else 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{where}: tensor {tensor.name} has no known dtype ({tensor.data_type}).") from error
    return offset + max(length, -(-math.prod(tensor.dims) * bits // 8))
