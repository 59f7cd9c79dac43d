"""What is needed to repair failed rows, in one archive without weights (`pack`)."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rmsnorm_deploy.models.errors import RmsnormDeployError

from .worker import OUTPUT

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

NAME: Final = "failures.tar.gz"
_FOLDER: Final = "failures"
_TEXTS: Final = {
    "model.engine.json": "model.engine.json",
    "model.engine.log": "build.log",
    OUTPUT: OUTPUT,
    "exported/manifest.json": "manifest.json",
}
# The end of a longer log is kept.
_LONGEST_TEXT: Final = 4 << 20
_DATA: Final = (
    "raw_data", "float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data", "external_data",
)  # fmt: skip
# Shapes, axes and indices stay, as the parser reads them; a larger tensor of integers may be weights.
_MOST_INTEGERS: Final = 64
STRIPPED: Final = "rmsnorm_deploy.benchmarks.weights"
_README: Final = """\
Failed rows of `python -m benchmarks.tensorrt_check`, one folder each; machine.json has the versions and the GPU.

row.json           the stages: results, shapes, numbers, tracebacks, provenance of the runner
build.log          TensorRT's messages of the build
model.engine.json  the record of the engine: norms, layers, profiles, options, versions
manifest.json      the manifest of the exported folder
model.onnx         the graph with the names, dtypes and shapes of its weights, without their values
output.log         what the process of the row printed

The weights are random numbers of a fixed seed: tests.helpers.models.families.build(family, dtype) makes the same model
again, and `python -m benchmarks.tensorrt_check --only '^ROW$'` repeats a row.
"""


def pack(
    place: Path,
    machine: Mapping[str, Any],
    failed: Mapping[str, tuple[Path, Mapping[str, Any]]],
    attached: Sequence[Path] = (),
) -> None:
    """Write the archive.

    Args:
        place: the archive; one that is there is replaced.
        machine: see `products.machine`.
        failed: the folder with the files, and the results, of each row by the name of its folder in the archive.
        attached: logs of earlier steps.
    """
    with tarfile.open(place, "w:gz") as archive:
        _add(archive, "README.txt", _README.encode())
        _add(archive, "machine.json", _json(machine))
        for name, (folder, results) in failed.items():
            _add(archive, f"{name}/row.json", _json(results))
            for source, target in _TEXTS.items():
                if (folder / source).is_file():
                    _add(archive, f"{name}/{target}", (folder / source).read_bytes()[-_LONGEST_TEXT:])
            model = folder / "exported" / "model.onnx"
            if model.is_file():
                try:
                    _add(archive, f"{name}/model.onnx", without_weights(model))
                except Exception as error:  # a broken file is itself a failure to look at
                    _add(archive, f"{name}/model.onnx.txt", f"left out: {type(error).__name__}: {error}\n".encode())
        for file in attached:
            _add(archive, f"attached/{file.name}", file.read_bytes()[-_LONGEST_TEXT:])


def without_weights(path: Path) -> bytes:
    """The model without the values of its weights: names, dtypes and shapes stay.

    Raises:
        RmsnormDeployError: values of weights are left.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    before = model.ByteSize()
    emptied = sum(_empty(tensor) for tensor in _weights(model))
    for graph in _graphs(model):
        emptied += len(graph.sparse_initializer)
        del graph.sparse_initializer[:]
    model.ClearField("training_info")
    model.metadata_props.add(key=STRIPPED, value=f"the values of {emptied} tensors are left out")
    content = model.SerializeToString()
    again = onnx.load_from_string(content)
    left = weight_bytes(again)
    if left or len(content) > before + 256:
        raise RmsnormDeployError(
            f"{path}: expected no bytes of weights and at most {before} in all, got {left} and {len(content)}."
        )
    return content


def weight_bytes(model: ModelProto) -> int:
    """How many bytes of the model are values of weights, or say where such values are."""
    held = sum(sum(_field_bytes(tensor, name) for name in _DATA) for tensor in _weights(model))
    return held + sum(graph.ByteSize() for found in _graphs(model) for graph in found.sparse_initializer)


def _field_bytes(tensor: TensorProto, name: str) -> int:
    value = getattr(tensor, name)
    if name == "external_data":
        return sum(entry.ByteSize() for entry in value)
    return len(value) if isinstance(value, bytes) else 4 * len(value)


def _empty(tensor: TensorProto) -> int:
    for name in _DATA:
        tensor.ClearField(name)
    tensor.ClearField("data_location")
    return 1


def _weights(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor whose values may be weights, in graphs, subgraphs and local functions."""
    for graph in _graphs(model):
        yield from (tensor for tensor in graph.initializer if _may_be_weights(tensor))
    for node in _nodes(model):
        for attribute in node.attribute:
            held = [attribute.t] if attribute.HasField("t") else []
            # One float of a node is a constant of a formula, such as epsilon.
            for tensor in [*held, *attribute.tensors]:
                if _may_be_weights(tensor) and _count(tensor) > 1:
                    yield tensor


def _may_be_weights(tensor: TensorProto) -> bool:
    from onnx import TensorProto as Kinds

    whole = (Kinds.INT64, Kinds.INT32, Kinds.BOOL)
    return tensor.data_type not in whole or _count(tensor) > _MOST_INTEGERS


def _count(tensor: TensorProto) -> int:
    count = 1
    for dim in tensor.dims:
        count *= dim
    return count


def _graphs(model: ModelProto) -> Iterator[GraphProto]:
    yield model.graph
    for node in _nodes(model):
        for attribute in node.attribute:
            yield from _graphs_of(attribute)


def _graphs_of(attribute: AttributeProto) -> list[GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _nodes(model: ModelProto) -> Iterator[NodeProto]:
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [inner for attribute in node.attribute for graph in _graphs_of(attribute) for inner in graph.node]


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(f"{_FOLDER}/{name}")
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, default=str) + "\n").encode()
