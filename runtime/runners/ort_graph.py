"""Facts about an ONNX model for reports: its operators (`op_counts`), dtypes (`input_dtypes`) and files."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...export.onnx_io.read_model import graphs

if TYPE_CHECKING:
    from onnx import ModelProto

# If a model has more bytes of weights than this, repacking them for the kernels takes longer than a run.
_LARGE_FILES = 1 << 30


def has_large_weights(files: Sequence[Path]) -> bool:
    """Whether these files are larger than 1 GiB in total, so that a single run is faster without repacked weights."""
    return sum(file.stat().st_size for file in files) > _LARGE_FILES


def file_record(path: Path) -> dict[str, Any]:
    """Name, size in bytes and SHA-256 of a file, for provenance."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}


def op_counts(model: ModelProto) -> Counter[str]:
    """The number of occurrences of each op in the graph and its subgraphs.

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
    """The input dtypes of the first node of this op and name, as far as the model specifies them."""
    import onnx

    for graph in graphs(model):
        stated = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
        stated |= {t.name: t.data_type for t in graph.initializer}
        for node in graph.node:
            if node.op_type == op_type and node.name == node_name:
                types = dict.fromkeys(stated[name] for name in node.input if stated.get(name))
                return [onnx.TensorProto.DataType.Name(t).lower() for t in types]
    return []
