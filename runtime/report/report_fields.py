"""The fields of a report that `compare` and a replay read, with their types."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ...export.onnx_io.manifest_fields import Text


def _number(value: Any) -> Any:
    """JSON has no infinity and no NaN: reports contain them as texts."""
    return float(value) if value in ("inf", "-inf", "nan") else value


Number = Annotated[float, BeforeValidator(_number)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Figures(_Fields):
    max_ulp: Number | None = None
    mean_ulp: Number | None = None
    p999_ulp: Number | None = None
    max_abs: Number | None = None
    max_rel_row: Number | None = None
    kl: Number | None = None


class _Row(_Fields):
    passed: bool | None
    reason: Text | None = None
    figures: _Figures | None = None


class _Output(_Row):
    case: Text
    name: Text


class _Input(_Row):
    kind: Text


class _Norm(_Row):
    """A norm or an attention."""

    path: Text
    call: int | None = Field(default=None, ge=0)
    inputs: list[_Input] = []


class _Segment(_Row):
    name: Text


class ReportFields(_Fields):
    """A report of `validate` or `bisect`. A replay reads only its settings, so that the other fields may be missing."""

    verdict: Literal["pass", "fail", "cannot be judged"] | None = None
    summary: Text | None = None
    outputs: list[_Output] = []
    norms: list[_Norm] = []
    attentions: list[_Norm] = []
    segments: list[_Segment] = []
    settings: dict[str, Any] | None = None
    provenance: dict[str, Any] = {}
