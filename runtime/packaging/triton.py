"""A model repository of Triton Inference Server (`add_triton`), and its configuration (`triton_config`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...export.graph.sizes import size_limits_of
from ...models.dtypes import KSERVE_NAMES
from ...models.errors import UnsupportedError
from .contents import VERSION, Contents, plugin_place

FILE, SCRIPT, ENGINE = "config.pbtxt", "serve.sh", "model.plan"
_PYTHON = "model.py"
_PYTHON_TEXT = '''"""What Triton's Python backend loads: the model beside this file, run by rmsnorm-deploy."""

from rmsnorm_deploy.runtime.serving.triton_backend import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
# Triton's names of the element types.
_TYPES = {dtype: f"TYPE_{name}" for dtype, name in KSERVE_NAMES.items()}
# The size of a dynamic dim in the run before the first request.
_WARM = 8


Backend = Literal["onnxruntime", "python", "tensorrt"]


@dataclass(frozen=True, slots=True)
class Serving:
    """How Triton serves a model.

    Attributes:
        name: of the model.
        backend: what runs it.
        file: name of the file that the backend loads, in the folder of the version.
        most: the most rows of a batch that it joins of several requests; 0 for no batches.
        delay: microseconds that a request waits for others.
        model: of the Python backend, the name of the model's file beside it.
        profiles: of an engine, the sizes of each input in each profile: least, usual and most.
    """

    name: str
    backend: Backend
    file: str
    most: int = 8
    delay: int = 100
    model: str | None = None
    profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]] = ()


def add_triton(contents: Contents, name: str, backend: Backend, most: int) -> None:
    """Add what Triton needs to a package: the configuration, and a script that starts it.

    Raises:
        UnsupportedError: Triton has no such element type, or the backend does not.
    """
    model = contents.model.rpartition("/")[2]
    options: list[str] = []
    profiles = contents.record.get("profiles") or []
    match backend:
        case "onnxruntime":
            serving = Serving(name, backend, model, most)
        case "python":
            _refuse_bfloat16(contents.manifest)
            serving = Serving(name, backend, _PYTHON, most, model=model)
            contents.texts[f"{name}/{VERSION}/{_PYTHON}"] = _PYTHON_TEXT
            contents.notes.append("the Python of Triton's Python backend needs rmsnorm-deploy[cpu], or [gpu]")
        case "tensorrt":
            serving = Serving(name, backend, model, _most_rows(contents.manifest, profiles, most), profiles=profiles)
            options = _engine_options(contents, name)
            record = {**contents.record, "engine": model}
            contents.texts[f"{contents.model}.json"] = json.dumps(record, indent=2) + "\n"
            built_with = contents.record["runtime"]["version"]
            contents.notes.append(f"the engine runs on {_machine(contents.record)} with TensorRT {built_with}")
    contents.texts[f"{name}/{FILE}"] = triton_config(serving, contents.manifest)
    contents.texts[SCRIPT] = _script(options)
    contents.scripts.add(SCRIPT)


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
    if serving.model is not None:
        lines.append(f'parameters {{ key: "model" value {{ string_value: "{serving.model}" }} }}')
    if len(serving.profiles) > 1:
        numbers = ", ".join(f'"{number}"' for number in range(len(serving.profiles)))
        lines.append(f"instance_group {{ kind: KIND_GPU profile: [ {numbers} ] }}")
    lines += _warm_up(serving, manifest, batched)
    return "\n".join(lines) + "\n"


def _most_rows(manifest: Mapping[str, Any], profiles: Sequence[Mapping[str, Any]], most: int) -> int:
    """The most rows that every profile of an engine has room for; 0 where a profile needs more than one."""
    shapes = [shape for profile in profiles for shape in profile.values()]
    if not _has_batch([*manifest["inputs"], *manifest["outputs"]]) or not shapes:
        return 0
    if max(low[0] for low, _, _ in shapes) > 1:
        return 0
    return min(most, *(high[0] for _, _, high in shapes))


def _engine_options(contents: Contents, name: str) -> list[str]:
    """Options of Triton's TensorRT backend for an engine."""
    options = []
    library = (contents.record.get("plugin") or {}).get("library")
    if library is not None:
        place = plugin_place(f"{name}/{VERSION}/", library)
        options.append(f'"--backend-config=tensorrt,plugins=$here/{place}"')
    if (contents.record.get("options") or {}).get("version_compatible"):
        options.append("--backend-config=tensorrt,version-compatible=true")
    return options


def _machine(record: Mapping[str, Any]) -> str:
    found = record.get("gpu") or ", ".join(record.get("architectures") or ())
    return str(found) or "the GPU that it was built for"


def _script(options: Sequence[str]) -> str:
    words = ["exec tritonserver", '--model-repository="$here"', *options, '"$@"']
    lines = [
        "#!/bin/sh",
        "# Starts Triton Inference Server on this repository; further options are passed on.",
        'here="$(cd "$(dirname "$0")" && pwd)" || exit 1',
        " ".join(words),
    ]
    return "\n".join(lines) + "\n"


def _refuse_bfloat16(manifest: Mapping[str, Any]) -> None:
    for row in (*manifest["inputs"], *manifest["outputs"]):
        if row["dtype"] == "bfloat16":
            raise UnsupportedError(
                f"{row['name']}: expected an element type that Triton's Python backend gives as an array, got "
                "bfloat16. Choose the backend onnxruntime, or export in float16."
            )


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


def _warm_up(serving: Serving, manifest: Mapping[str, Any], batched: bool) -> list[str]:
    """A run with zeros before the first request, so that it does not wait for memory and kernels."""
    lines = ["model_warmup {", '  name: "zeros"', f"  batch_size: {1 if batched else 0}"]
    usual = {name: shapes[1] for name, shapes in serving.profiles[0].items()} if serving.profiles else {}
    for row in manifest["inputs"]:
        known = usual.get(row["name"]) or [_size(dim, manifest) for dim in row["shape"]]
        sizes = list(known)[1:] if batched else list(known)
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
