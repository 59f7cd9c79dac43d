"""What this package wrote: the files of an earlier export (`foreign_files`) and single reports (`is_own_report`).

Only these are ever replaced or deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import zipfile
from pathlib import Path
from typing import Any, Final

MANIFEST: Final = "manifest.json"
MANIFEST_SCHEMAS: Final = "rmsnorm_deploy.manifest/"
# The comment of an .npz file that this package writes; zip archives have one, at their end.
NPZ_MARK: Final = b"rmsnorm_deploy.arrays/1"
HTML_MARK: Final = '<meta name="generator" content="rmsnorm-deploy">'
XML_MARK: Final = "<!-- rmsnorm-deploy -->"
# Files up to this size are compared with the hash of the manifest, larger ones only with its size.
_HASHED_BYTES = 64 << 20
_LARGEST_MANIFEST = 256 << 20
_HEAD = 4096
_JSON_REPORT = re.compile(rb'\s*\{\s*"schema": "rmsnorm_deploy\.(?!manifest/|engine/)')


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def foreign_files(folder: Path) -> list[str]:
    """The names of what is in a folder and was not written by an export, or was changed since.

    Args:
        folder: an existing folder.

    Returns:
        Paths relative to the folder, sorted; empty for an empty folder and for an export as it was written. All files,
        where the folder has no manifest of this package.

    Raises:
        OSError: the folder cannot be read.
    """
    listed = _listed(folder)
    found = []
    for place, folders, files in os.walk(folder, onerror=_fail):
        base = Path(place)
        for name in sorted([*files, *(f for f in folders if (base / f).is_symlink())]):
            path = base / name
            relative = path.relative_to(folder).as_posix()
            if relative not in listed or not _as_written(path, listed[relative]):
                found.append(relative)
        if base != folder and not files and not folders:
            found.append(f"{base.relative_to(folder).as_posix()}/")
    return sorted(found)


def delete_export(folder: Path) -> list[str]:
    """Delete an earlier export: the files that its manifest lists, and the folders that are empty then.

    Returns:
        What else the folder contains, see `foreign_files`; then nothing is deleted.

    Raises:
        OSError: a file cannot be deleted.
    """
    others = foreign_files(folder)
    if others:
        return others
    listed = _listed(folder)
    for name in sorted(listed, key=lambda name: name == MANIFEST):  # the manifest last: it says what is ours
        path = folder / name
        if not path.is_symlink() and path.is_file():
            path.unlink()
    for place, _, _ in os.walk(folder, topdown=False):
        if not any(Path(place).iterdir()):
            Path(place).rmdir()
    return []


def has_manifest(folder: Path) -> bool:
    """Whether a folder has a manifest that this package wrote."""
    return bool(_listed(folder))


def is_own_report(path: Path) -> bool:
    """Whether a file is a report (JSON, HTML or JUnit) or an .npz file that this package wrote."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        with path.open("rb") as file:
            head = file.read(_HEAD)
        if head.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                return archive.comment == NPZ_MARK
    except (OSError, zipfile.BadZipFile):
        return False
    html = head.lower().startswith(b"<!doctype html") and HTML_MARK.encode() in head
    xml = head.startswith(b"<?xml") and XML_MARK.encode() in head
    return html or xml or _JSON_REPORT.match(head) is not None


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    """The files that a manifest of this package lists, and the manifest itself; empty without such a manifest."""
    path = folder / MANIFEST
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_MANIFEST:
            return {}
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(manifest, dict) or not str(manifest.get("schema")).startswith(MANIFEST_SCHEMAS):
        return {}
    files = manifest.get("files")
    if not isinstance(files, dict):
        return {}
    entries = {name: row for name, row in files.items() if isinstance(row, dict) and _is_inside(name)}
    return {**entries, MANIFEST: {}}


def _is_inside(name: str) -> bool:
    """Whether a relative path names a file below the folder."""
    parts = name.split("/")
    return bool(name) and not name.startswith("/") and not any(part in ("", ".", "..") for part in parts)


def _as_written(path: Path, row: dict[str, Any]) -> bool:
    """Whether a file is a regular file with the size and the hash that its manifest gives."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        return False
    if row.get("bytes", status.st_size) != status.st_size:
        return False
    wanted = row.get("sha256")
    return wanted is None or status.st_size > _HASHED_BYTES or sha256(path) == wanted


def _fail(error: OSError) -> None:
    raise error
