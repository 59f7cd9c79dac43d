"""What the source of a model names (`source_kind`, `located`), and whether it changed since (`fingerprint`)."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, Literal

from ...export.onnx_io.owned_files import sha256
from ...models.errors import UsageError

Kind = Literal["builtin", "file", "module", "folder", "hub", "missing"]
# Files up to this size are hashed; of larger ones, size and time are compared.
_HASHED_BYTES = 1 << 20


def source_kind(source: str, base: Path) -> Kind:
    """What a source names, as `load_model` reads it.

    Args:
        source: the text.
        base: the folder that relative paths are relative to.

    Returns:
        `builtin`; `file` (`file.py:factory`); `module` (`package.module:factory`); `folder`; `hub`; or `missing`, a
        path at which there is no folder or no file.
    """
    name, colon, _ = source.rpartition(":")
    place = _place(source, base)
    if colon and name == "builtin":
        return "builtin"
    if source and place.is_dir():
        return "folder"
    if colon and name.endswith(".py"):
        return "file" if _place(name, base).is_file() else "missing"
    if colon and name:
        return "module"
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or not source or place.exists()
    return "missing" if is_path else "hub"


def located(source: str, base: Path) -> str:
    """The source with an absolute path, where it names a folder or a file."""
    match source_kind(source, base):
        case "folder":
            return str(_place(source, base))
        case "file":
            name, _, factory = source.rpartition(":")
            return f"{_place(name, base)}:{factory}"
        case "builtin" | "module" | "hub" | "missing":
            return source


def fingerprint(source: str, base: Path) -> Any:
    """A JSON value that differs when the source does.

    Of a folder, the names, sizes and times of its files, and the hash of small ones; of `file.py:factory`, the hash of
    the file, not of what it imports or reads; of others, the text.

    Raises:
        UsageError: a file cannot be read.
    """
    try:
        match source_kind(source, base):
            case "folder":
                return _folder(_place(source, base))
            case "file":
                return sha256(_place(source.rpartition(":")[0], base))
            case "builtin" | "module" | "hub" | "missing":
                return source
    except OSError as error:
        raise UsageError(f"{error.filename}: cannot be read: {error.strerror or error}.") from error


def file_fingerprint(path: Path) -> list[Any]:
    """Size and time in ns of a file, and the hash of a small one; its kind alone, if it is not a regular file.

    Raises:
        OSError: it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        return [stat.S_IFMT(status.st_mode)]
    digest = [sha256(path)] if status.st_size <= _HASHED_BYTES else []
    return [status.st_size, status.st_mtime_ns, *digest]


def _folder(folder: Path) -> dict[str, list[Any]]:
    found = {}
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = Path(place) / name
            relative = os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace")
            found[relative] = file_fingerprint(path) if path.exists() else []
    return found


def _place(path: str, base: Path) -> Path:
    return Path(os.path.abspath(base / Path(path).expanduser()))
