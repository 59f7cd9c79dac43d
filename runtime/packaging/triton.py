"""The configuration of a model in a repository of Triton Inference Server (`triton_config`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...export.graph.sizes import size_limits_of
from ...models.errors import UnsupportedError

FILE = "config.pbtxt"
# Triton's names of the element types.
_TYPES = {
    "bool": "TYPE_BOOL", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "float32": "TYPE_FP32",
    "float64": "TYPE_FP64", **{f"int{bits}": f"TYPE_INT{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"TYPE_UINT{bits}" for bits in (8, 16, 32, 64)},
}  # fmt: skip
# The size of a dynamic dim in the run before the first request.
_WARM = 8


@dataclass(frozen=True, slots=True)
class Serving:
    """How Triton serves a model.

    Attributes:
        name: of the model.
        backend: `onnxruntime` or `tensorrt`.
        file: name of the model's file in the folder of its version.
        most: the most rows of a batch that it joins of several requests; 0 for no batches.
        delay: microseconds that a request waits for others.
    """

    name: str
    backend: str
    file: str
    most: int = 8
    delay: int = 100


def triton_config(serving: Serving, manifest: Mapping[str, Any]) -> str:
    """The text of config.pbtxt.

    Requests are joined to a batch where the first dim of every input and output is the batch.

    Args:
        serving: how the model is served.
        manifest: of its exported folder.

    Raises:
        UnsupportedError: Triton has no such element type.
    """
    inputs, outputs = manifest["inputs"], manifest["outputs"]
    batched = serving.most > 0 and _has_batch([*inputs, *outputs])
    lines = [
        f'name: "{serving.name}"',
        f'backend: "{serving.backend}"',
        f'default_model_filename: "{serving.file}"',
        f"max_batch_size: {serving.most if batched else 0}",
    ]
    for title, rows in (("input", inputs), ("output", outputs)):
        for row in rows:
            shape = row["shape"][1:] if batched else row["shape"]
            lines += [f"{title} {{", f'  name: "{row["name"]}"', f"  data_type: {_type(row)}", f"  {_dims(shape)}", "}"]
    if batched:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {serving.delay} }}")
    lines += _warm_up(inputs, manifest, batched)
    return "\n".join(lines) + "\n"


def _has_batch(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the first dim of every tensor is one and the same dynamic dim, which no tensor has elsewhere."""
    firsts = {row["shape"][0] if row["shape"] else None for row in rows}
    others = {dim for row in rows for dim in row["shape"][1:]}
    return len(firsts) == 1 and isinstance(next(iter(firsts)), str) and not firsts & others


def _type(row: Mapping[str, Any]) -> str:
    found = _TYPES.get(str(row["dtype"]))
    if found is None:
        raise UnsupportedError(
            f"{row['name']}: expected an element type of {', '.join(_TYPES)}, as Triton has, got {row['dtype']}."
        )
    return found


def _dims(shape: Sequence[Any]) -> str:
    return f"dims: [ {', '.join(str(dim) if isinstance(dim, int) else '-1' for dim in shape)} ]"


def _warm_up(inputs: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any], batched: bool) -> list[str]:
    """A run with zeros before the first request, so that it does not wait for memory and kernels."""
    lines = ["model_warmup {", '  name: "zeros"', f"  batch_size: {1 if batched else 0}"]
    for row in inputs:
        sizes = [_size(dim, manifest) for dim in (row["shape"][1:] if batched else row["shape"])]
        lines += [
            "  inputs {", f'    key: "{row["name"]}"',
            f"    value {{ data_type: {_type(row)} {_dims(sizes)} zero_data: true }}", "  }",
        ]  # fmt: skip
    return [*lines, "}"]


def _size(dim: Any, manifest: Mapping[str, Any]) -> int:
    """A valid size: of a sum of two dims, that of both."""
    if isinstance(dim, int):
        return dim
    parts = [part.strip() for part in str(dim).split("+")]
    if str(dim) == "total_sequence":
        parts = ["past_sequence", "sequence"]
    ranges = size_limits_of(manifest).ranges
    return sum(_one(part, ranges) for part in parts)


def _one(name: str, ranges: Mapping[str, tuple[int, int | None]]) -> int:
    low, high = ranges.get(name, (1, None))
    wanted = 1 if "batch" in name else _WARM
    return max(low, wanted if high is None else min(high, wanted))
