"""The manifest of an exported model: target, norms, notes, versions, and the hash of every file."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...models.errors import UsageError
from ...models.regular_files import read_json
from ...models.versions import installed_version
from .owned_files import MANIFEST, sha256

SCHEMA = "rmsnorm_deploy.manifest/2"
_VERSIONS = ("rmsnorm-deploy", "torch", "onnx", "onnx-ir", "onnxscript", "transformers", "onnxruntime", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that affect the result."""
    installed = {name: installed_version(name) for name in _VERSIONS}
    return {"python": platform.python_version(), **{name: text for name, text in installed.items() if text is not None}}


def deviation_rows(manifest: dict[str, Any], runtime: str | None = None) -> list[dict[str, Any]]:
    """The cases in which an exported model does not round as its modules do, each once, with the paths of its norms.

    Args:
        manifest: manifest of the exported folder.
        runtime: only cases that occur in this runtime; None for every runtime.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for site in manifest.get("sites", ()):
        for deviation in (d for call in site.get("calls", ()) for d in call.get("deviations", ())):
            if runtime is not None and deviation["runtime"] not in ("any", runtime):
                continue
            row = found.setdefault(
                (deviation["runtime"], deviation["reason"]), {"at_most_ulp": None, **deviation, "sites": []}
            )
            if site["path"] not in row["sites"]:
                row["sites"].append(site["path"])
    return list(found.values())


def tensor_rows(values: list[ir.Value]) -> list[dict[str, Any]]:
    """Graph inputs or outputs as JSON: name, dtype, shape (numbers, or names of dynamic dims)."""
    rows = []
    for value in values:
        shape = [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]
        dtype = value.dtype.numpy().name if value.dtype is not None else None
        rows.append({"name": value.name, "dtype": dtype, "shape": shape})
    return rows


def write_manifest(
    folder: Path, content: dict[str, Any], hashes: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """Add schema, versions and the hash of every file in `folder`, and write the manifest there.

    Args:
        folder: the new folder.
        content: the other fields of the manifest.
        hashes: the hashes of files that are not read, by name; None for a copy or link of a large weight file.
    """
    hashes = hashes or {}
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": hashes[name] if name in hashes else sha256(path)}
    manifest = {"schema": SCHEMA, "versions": versions(), **content, "files": files}
    with (folder / MANIFEST).open("x", encoding="utf-8") as file:  # never over a file of the model
        file.write(_json_lines(manifest))
    return manifest


def _json_lines(content: dict[str, Any]) -> str:
    """JSON with one line for each entry and for each item of a list, because there may be thousands of norms."""
    entries = []
    for key, value in content.items():
        items = ",\n    ".join(json.dumps(item) for item in value) if isinstance(value, list) and value else None
        entries.append(f"  {json.dumps(key)}: " + (json.dumps(value) if items is None else f"[\n    {items}\n  ]"))
    return "{\n" + ",\n".join(entries) + "\n}\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an exported folder.

    Raises:
        UsageError: there is none, it has another schema, or one of its fields has another type.
    """
    path = folder / MANIFEST
    if not path.exists():
        inside = sorted(str(found.parent) for found in folder.glob(f"*/{MANIFEST}"))
        remedy = f"Name one of those inside: {', '.join(inside)}" if inside else "Make one with: rmsnorm export"
        raise UsageError(f"{folder} has no {MANIFEST}, so it is not an exported folder. {remedy}")
    manifest = read_json(path, "Export again.")
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise UsageError(f"{path}: expected schema {SCHEMA!r}, got {found!r}. Export again.")
    from .manifest_fields import ManifestFields, checked

    checked(path, manifest, ManifestFields, "Export again.")
    return manifest
