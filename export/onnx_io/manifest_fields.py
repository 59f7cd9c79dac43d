"""The fields of a manifest that are read, with their types, and `checked`, which names the field that is wrong.

Manifests come from other people. Unknown fields are allowed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ...models.errors import UsageError
from ...models.spec import NormSpec

_PROBLEMS = 5


def _spec(value: dict[str, Any]) -> dict[str, Any]:
    try:
        NormSpec.from_dict(value)
    except (UsageError, TypeError) as error:
        raise ValueError(str(error)) from error
    return value


def _text(value: str) -> str:
    if any(0xD800 <= ord(character) < 0xE000 for character in value):
        raise ValueError("a text that is not Unicode")
    return value


Text = Annotated[str, AfterValidator(_text)]
Spec = Annotated[dict[str, Any], AfterValidator(_spec)]
Dims = list[int | Text | None]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Deviation(_Fields):
    runtime: Text
    reason: Text
    at_most_ulp: float | None = None


class _Call(_Fields):
    deviations: list[_Deviation] = []


class _Site(_Fields):
    path: Text
    class_: Text | None = Field(default=None, alias="class")
    spec: Spec
    width: int | list[int] | None = None
    dtype: Text | None = None
    calls: list[_Call] = []


class _Refusal(_Fields):
    path: Text
    class_: Text = Field(default="", alias="class")
    reason: Text


class _Tensor(_Fields):
    name: Text
    dtype: Text | None = None
    shape: Dims = []


class _LinkedFile(_Fields):
    source: str | None = None
    bytes: int | None = None
    sample: str
    sha256: str | None = None


class _Attention(_Fields):
    path: Text
    spec: dict[str, Any] | None = None
    node: Text | None = None
    emits: Text | None = None
    reason: Text | None = None


class _Rotary(_Fields):
    nodes: int


class _Weights(_Fields):
    mode: Text
    files: dict[str, _LinkedFile] = {}


class _Quantized(_Fields):
    profile: Text
    operator: Text | None = None
    nodes: int
    left: dict[Text, int] = {}


class _Hub(_Fields):
    name: Text
    revision: Text | None = None
    subfolder: Text | None = None
    commit: Text


class ManifestFields(_Fields):
    """A manifest."""

    model: str = "model.onnx"  # these two may be file names that are not UTF-8
    source: str | None = None
    hub: _Hub | None = None
    target: Text | None = None
    dtype: Text | None = None
    elements: dict[Text, int] = {}
    opset: int | None = None
    with_past: bool = False
    restart_cache_above: int | None = None
    part: Text | None = None
    image_token_id: int | None = None
    audio_token_id: int | None = None
    image_grid_thw: list[list[int]] | None = None
    image_sizes: list[list[int]] | None = None
    image_merge_size: int | None = None
    components: list[Annotated[str, StringConstraints(pattern=r"^[a-z_]+$")]] = []
    models: dict[Text, str] = {}
    tokenizer: Text | None = None
    inputs: list[_Tensor] = []
    outputs: list[_Tensor] = []
    sites: list[_Site] = []
    refusals: list[_Refusal] = []
    attention: list[_Attention] = []
    in_place_cache: list[Text] = []
    requires: dict[Text, Text] = {}
    rotary: _Rotary | None = None
    notes: list[Text] = []
    files: dict[str, dict[str, Any]] = {}
    weights: _Weights | None = None
    quantized: _Quantized | None = None


_Model = TypeVar("_Model", bound=BaseModel)


def checked(path: Path, content: Any, fields: type[_Model], remedy: str) -> _Model:
    """Check the types of a file's fields.

    Args:
        path: the file, for messages.
        content: its JSON value.
        fields: the expected fields.
        remedy: what to do if a field is wrong, a sentence.

    Raises:
        UsageError: a field is missing or has another type: "FILE: FIELD: expected X, got Y".
    """
    try:
        return fields.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{path}: {field_problems(error)}. {remedy}") from error


def field_problems(error: ValidationError) -> str:
    """What is wrong with the fields of an object: "FIELD: expected X, got Y", separated by semicolons."""
    rows = error.errors(include_url=False)
    texts = [f"{'.'.join(map(str, row['loc'])) or 'the file'}: {field_problem(row)}" for row in rows[:_PROBLEMS]]
    more = f" and {len(rows) - _PROBLEMS} more" if len(rows) > _PROBLEMS else ""
    return "; ".join(texts) + more


def field_problem(row: Mapping[str, Any]) -> str:
    """What one of pydantic's rows says: "missing", or "expected X, got Y"."""
    return "missing" if row["type"] == "missing" else f"{_expected(row['msg'])}, got {_shown(row['input'])}"


def _expected(message: str) -> str:
    """pydantic's `Input should be a valid string` as `expected a valid string`."""
    message = re.sub(r" or instance of \w+$", "", message)
    return message.replace("Input should be", "expected").replace("Value error, ", "expected another value: ")


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
