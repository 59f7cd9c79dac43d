"""What the source of a model or of inputs names (`source_kind`, `located`), and whether it changed (`fingerprint`)."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, Literal

from ...export.onnx_io.owned_files import sha256
from ...models.errors import RmsnormDeployError, UsageError
from ..inputs.arrays import ARRAY_SUFFIXES
from .hashes import Hashes

Kind = Literal["builtin", "file", "module", "folder", "onnx", "arrays", "hub", "missing"]
# Files of this size count by their content only if a model may be loaded from them, unlike the state of an optimizer.
_LARGE = 1 << 20
_READ = (
    ".safetensors",
    ".bin",
    ".json",
    ".model",
    ".txt",
    ".py",
    ".jinja",
    ".tiktoken",
    ".onnx",
    ".data",
    *ARRAY_SUFFIXES,
)


def source_kind(source: str, base: Path) -> Kind:
    """What a source names, as `load_model`, `rewrite_model` and `load_cases` read it.

    Args:
        source: the text.
        base: the folder that relative paths are relative to.

    Returns:
        `builtin`; `file` (`file.py:factory`); `module` (`package.module:factory`); `folder`; `onnx` and `arrays`, by
        the suffix of a file; `hub`; or `missing`, a path at which there is no folder or no such file.
    """
    name, colon, _ = source.rpartition(":")
    place = _place(source, base)
    if "\0" in source:
        return "missing"
    if colon and name == "builtin":
        return "builtin"
    # functions of os.path say False of a path that no system can have, such as one that is too long
    if source and os.path.isdir(place):
        return "folder"
    if place.suffix in (".onnx", *ARRAY_SUFFIXES):
        return "missing" if not os.path.isfile(place) else "onnx" if place.suffix == ".onnx" else "arrays"
    if colon and name.endswith(".py"):
        return "file" if os.path.isfile(_place(name, base)) else "missing"
    if colon and name:
        return "module"
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or not source or os.path.exists(place)
    return "missing" if is_path else "hub"


def located(source: str, base: Path) -> str:
    """The source with an absolute path, where it names a folder or a file."""
    match source_kind(source, base):
        case "folder" | "onnx" | "arrays":
            return str(_place(source, base))
        case "file":
            name, _, factory = source.rpartition(":")
            return f"{_place(name, base)}:{factory}"
        case "builtin" | "module" | "hub" | "missing":
            return source


def fingerprint(source: str, base: Path, hashes: Hashes) -> Any:
    """A JSON value that differs when the source does; it has no times, which each checkout of a repository changes.

    Of files, of the files of a folder, and of the external data of an .onnx file, the names and hashes; of large files
    in a folder that no model is loaded from, the sizes; of `file.py:factory`, the hash of the file, not of what it
    imports or reads; of others, the text.

    Raises:
        UsageError: a file cannot be read.
    """
    try:
        match source_kind(source, base):
            case "folder":
                return _folder(_place(source, base), hashes)
            case "arrays":
                return _hash(_place(source, base), hashes)
            case "onnx":
                return _onnx(_place(source, base), hashes)
            case "file":
                return sha256(_place(source.rpartition(":")[0], base))
            case "builtin" | "module" | "hub" | "missing":
                return source
    except OSError as error:
        raise UsageError(f"{error.filename}: cannot be read: {error.strerror or error}.") from error


def _hash(path: Path, hashes: Hashes) -> str:
    """The hash of a file; its kind, if it is not a regular file."""
    mode = path.stat().st_mode
    return hashes.of(path) if stat.S_ISREG(mode) else f"kind {stat.S_IFMT(mode)}"


def _onnx(path: Path, hashes: Hashes) -> list[Any]:
    """The file, and its external data; the file alone, if it is not one that can be read, which its row says."""
    from ...export.onnx_io.read_model import read_model

    try:
        others = sorted(read_model(path).external_files)
    except RmsnormDeployError:
        others = []
    return [_hash(path, hashes), *([os.path.relpath(other, path.parent), _hash(other, hashes)] for other in others)]


def _folder(folder: Path, hashes: Hashes) -> dict[str, str]:
    found = {}
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = Path(place) / name
            relative = os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace")
            found[relative] = _file_in_folder(path, hashes) if path.exists() else "missing"
    return found


def _file_in_folder(path: Path, hashes: Hashes) -> str:
    size = path.stat().st_size
    is_read = size < _LARGE or path.suffix in _READ
    return _hash(path, hashes) if is_read else f"{size} bytes"


def _place(path: str, base: Path) -> Path:
    return Path(os.path.abspath(base / home_expanded(path)))


def home_expanded(path: str) -> Path:
    """A path with the home folder in place of `~`; as it is, where that of a user is not known."""
    return Path(os.path.expanduser(path))
