"""The inference protocol of KServe, version 2, over HTTP: arrays of a request, and of an answer.

Source: the Open Inference Protocol of KServe, and its extension for binary data by Triton Inference Server, in which
arrays follow the JSON as bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...models.dtypes import KSERVE_NAMES, numpy_dtype
from ...models.errors import UsageError
from ..runners.base import Array, TensorInfo

HEADER_LENGTH = "Inference-Header-Content-Length"
_DTYPES = {datatype: dtype for dtype, datatype in KSERVE_NAMES.items()}
_SIZE, _BINARY, _ALL_BINARY = "binary_data_size", "binary_data", "binary_data_output"


@dataclass(frozen=True, slots=True)
class Request:
    """A request to run a model.

    Attributes:
        id: of the request, which the answer repeats; empty for none.
        feeds: the inputs by name.
        outputs: the outputs that are wanted, and whether each is sent as bytes; empty for all.
        binary: whether outputs are sent as bytes where `outputs` is empty.
    """

    id: str
    feeds: dict[str, Array]
    outputs: dict[str, bool]
    binary: bool


def parse_request(body: bytes, header_length: str | None) -> Request:
    """The content of a request.

    Args:
        body: of the HTTP request.
        header_length: the number of its bytes that are JSON; None if all are.

    Raises:
        UsageError: it is not of the protocol; the message names the field.
    """
    end = len(body)
    if header_length is not None:
        if not header_length.isdecimal() or int(header_length) > len(body):
            raise UsageError(f"{HEADER_LENGTH}: expected a number of at most {len(body)}, got {header_length[:40]!r}.")
        end = int(header_length)
    try:
        content = json.loads(body[:end])
    except (ValueError, RecursionError) as error:
        raise UsageError(f"expected JSON, got: {str(error)[:200]}") from error
    if not isinstance(content, dict) or not isinstance(content.get("inputs"), list):
        raise UsageError("expected a JSON object with a list of inputs.")
    feeds, rest = {}, memoryview(body)[end:]
    for row in content["inputs"]:
        name, shape, dtype = _head(row)
        if name in feeds:
            raise UsageError(f"input {name}: expected once, got twice.")
        size = _parameters(row).get(_SIZE)
        if size is None:
            feeds[name] = _from_json(row.get("data"), name, shape, dtype)
            continue
        feeds[name] = _from_bytes(rest, size, name, shape, dtype)
        rest = rest[size:]
    if rest:
        raise UsageError(f"expected no bytes after those of the inputs, got {len(rest)}.")
    outputs = content.get("outputs") or []
    if not isinstance(outputs, list) or not all(
        isinstance(row, dict) and isinstance(row.get("name"), str) for row in outputs
    ):
        raise UsageError("outputs: expected a list of objects with a name.")
    binary = bool(_parameters(content).get(_ALL_BINARY))
    wanted = {row["name"]: bool(_parameters(row).get(_BINARY, binary)) for row in outputs}
    return Request(str(content.get("id") or ""), feeds, wanted, binary)


def answer(request: Request, results: Mapping[str, Array], name: str, version: str) -> tuple[bytes, int | None]:
    """The body of the answer to a request, and the number of its bytes that are JSON; None if all are.

    Args:
        request: the request.
        results: the outputs by name.
        name: of the model.
        version: of the model.

    Raises:
        UsageError: an output that is wanted does not exist, or cannot be sent as JSON.
    """
    unknown = [output for output in request.outputs if output not in results]
    if unknown:
        raise UsageError(f"outputs: expected some of {', '.join(results)}, got {', '.join(unknown)}.")
    rows, parts = [], []
    for output in request.outputs or results:
        array = np.ascontiguousarray(results[output])
        row: dict[str, Any] = {"name": output, "datatype": _datatype(array, output), "shape": list(array.shape)}
        if request.outputs.get(output, request.binary):
            parts.append(array.tobytes())
            row["parameters"] = {_SIZE: array.nbytes}
        else:
            row["data"] = _to_json(array, output)
        rows.append(row)
    content: dict[str, Any] = {"model_name": name, "model_version": version, "outputs": rows}
    if request.id:
        content["id"] = request.id
    text = json.dumps(content).encode()
    return b"".join([text, *parts]), len(text) if parts else None


def metadata(name: str, version: str, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]) -> dict[str, Any]:
    """What the protocol says of a model; a dim of any size is -1."""
    return {
        "name": name,
        "versions": [version],
        "platform": "rmsnorm-deploy",
        "inputs": [_described(info) for info in inputs],
        "outputs": [_described(info) for info in outputs],
    }


def _described(info: TensorInfo) -> dict[str, Any]:
    shape = [dim if isinstance(dim, int) else -1 for dim in info.shape or ()]
    return {"name": info.name, "datatype": KSERVE_NAMES.get(info.dtype, info.dtype), "shape": shape}


def _head(row: Any) -> tuple[str, tuple[int, ...], Any]:
    """Name, shape and dtype of an input."""
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        raise UsageError("inputs: expected objects with a name.")
    name, shape, datatype = row["name"], row.get("shape"), row.get("datatype")
    sizes = isinstance(shape, list) and all(isinstance(size, int) and not isinstance(size, bool) for size in shape)
    if not sizes or any(not 0 <= size < 1 << 31 for size in shape or ()):
        raise UsageError(f"input {name}: shape: expected a list of sizes, got {str(shape)[:80]}.")
    if datatype not in _DTYPES:
        raise UsageError(f"input {name}: datatype: expected one of {', '.join(_DTYPES)}, got {str(datatype)[:40]}.")
    return name, tuple(shape or ()), numpy_dtype(_DTYPES[datatype])


def _parameters(row: Mapping[str, Any]) -> Mapping[str, Any]:
    found = row.get("parameters")
    return found if isinstance(found, dict) else {}


def _from_bytes(rest: memoryview, size: Any, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    if size != expected or len(rest) < expected:
        got = size if size != expected else len(rest)
        raise UsageError(f"input {name}: expected {expected} bytes for shape {list(shape)}, got {got}.")
    # A copy, because the bytes of a request are aligned to nothing.
    return np.frombuffer(bytes(rest[:expected]), dtype).reshape(shape)


def _from_json(data: Any, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
    if not isinstance(data, list):
        raise UsageError(f"input {name}: data: expected a list, got {type(data).__name__}.")
    kind = np.dtype(dtype)
    try:
        given = np.array(data)
        numbers = given.dtype.kind in ("b" if kind.kind == "b" else "iuf" if kind.kind not in "iu" else "iu")
        if given.size and not numbers:
            raise ValueError(f"elements of {given.dtype}")
        if kind.kind in "iu" and given.size:
            limits = np.iinfo(kind)
            if int(given.min()) < limits.min or int(given.max()) > limits.max:
                raise ValueError(f"numbers beyond {kind.name}")
        return given.astype(kind).reshape(shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise UsageError(
            f"input {name}: data: expected {math.prod(shape)} elements of {kind.name} for shape {list(shape)}, "
            f"got: {str(error)[:160]}."
        ) from error


def _to_json(array: Array, name: str) -> list[Any]:
    flat = array.reshape(-1)
    if array.dtype.name in ("float16", "bfloat16"):
        flat = flat.astype(np.float32)
    if flat.dtype.kind == "f" and not np.isfinite(flat).all():
        raise UsageError(f"output {name}: it has infinities or NaN, which JSON does not; ask for binary data.")
    values: list[Any] = flat.tolist()
    return values


def _datatype(array: Array, name: str) -> str:
    found = KSERVE_NAMES.get(array.dtype.name)
    if found is None:
        raise UsageError(f"output {name}: expected a dtype of the protocol, got {array.dtype.name}.")
    return found
