"""Manifests with wrong types: the error names file, field, and what was expected."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from rmsnorm_deploy.export.onnx_io.manifest import SCHEMA, read_manifest
from rmsnorm_deploy.models.errors import UsageError

SITE = {"path": "norm", "class": None, "spec": {"eps": 1e-6}, "width": 8, "dtype": "float32", "calls": []}
MANIFEST = {
    "schema": SCHEMA, "model": "model.onnx", "dtype": None, "inputs": [{"name": "x", "dtype": "float32", "shape": [1]}],
    "sites": [SITE], "refusals": [{"path": "y", "class": "C", "reason": "none"}], "notes": [], "more": {"a": [1]},
}  # fmt: skip


def _changed(place: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    content = copy.deepcopy(MANIFEST)
    inner: Any = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return content


def test_unknown_fields_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    assert read_manifest(tmp_path) == MANIFEST


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("sites",), {"a": 1}, "sites: expected a valid list, got {'a': 1}"),
        (("sites",), None, "sites: expected a valid list, got None"),
        (("sites", 0), "a", "sites.0: expected a valid dictionary, got 'a'"),
        (("sites", 0, "path"), [1], "sites.0.path: expected a valid string, got [1]"),
        (("sites", 0, "path"), "\ud800", "sites.0.path: expected another value: a text that is not Unicode"),
        (("sites", 0, "class"), 5, "sites.0.class: expected a valid string, got 5"),
        (("sites", 0, "spec"), {}, "sites.0.spec: expected another value: not a NormSpec"),
        (("sites", 0, "spec"), {"eps": [1]}, "sites.0.spec: expected another value"),
        (("sites", 0, "width"), "8", "sites.0.width"),
        (("sites", 0, "calls"), 5, "sites.0.calls: expected a valid list, got 5"),
        (("inputs",), 5, "inputs: expected a valid list, got 5"),
        (("inputs", 0, "shape"), [1.5], "inputs.0.shape.0"),
        (("refusals", 0, "reason"), None, "refusals.0.reason: expected a valid string, got None"),
        (("model",), ["model.onnx"], "model: expected a valid string, got ['model.onnx']"),
        (("dtype",), 5, "dtype: expected a valid string, got 5"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, place: tuple[str | int, ...], value: Any, message: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(_changed(place, value)))
    with pytest.raises(UsageError) as caught:
        read_manifest(tmp_path)
    assert f"manifest.json: {message}" in str(caught.value)
    assert str(caught.value).endswith("Export again.")


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    content = _changed(("sites", 0), {"spec": {"eps": 1e-6}})
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"manifest\.json: sites\.0\.path: missing"):
        read_manifest(tmp_path)
