"""Check the files of an exported folder against its manifest (`verify_folder`, `check_weights`)."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.errors import UsageError
from ...models.weights.digest import sample_digest
from .manifest import read_manifest
from .owned_files import sha256
from .read_model import ENGINE_SUFFIXES, read_model


@dataclass(frozen=True, slots=True)
class VerifiedFile:
    """A file of an exported folder.

    Attributes:
        name: its path in the folder.
        compared: what was compared with the manifest: `all bytes`; `a sample` of weights that were not hashed; `its
            size` of a file of which the manifest has no more; or `nothing`, where that differs already.
        problem: what is wrong, or None.
    """

    name: str
    compared: str
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The file as JSON values."""
        return {"name": self.name, "compared": self.compared, "problem": self.problem}


def verify_folder(folder: Path) -> list[VerifiedFile]:
    """Compare every file that the manifest of an exported folder lists: size, hash, and where weights are.

    Args:
        folder: an exported folder; of one with several models, all of them.

    Returns:
        The files, in the manifest's order.

    Raises:
        UsageError: the folder has no manifest that can be read.
    """
    manifest = read_manifest(folder)
    weights = _weights(folder, manifest)
    files = dict(manifest["files"])
    for name, row in weights.items():  # those to which a model in a checkpoint's folder refers are not its own files
        files.setdefault(name, {"bytes": row.get("bytes"), "sha256": None})
    found = [_verified(folder, name, row, weights.get(name)) for name, row in files.items()]
    broken = {file.name for file in found if file.problem is not None}
    for name in _models(folder, manifest):
        is_onnx = not name.endswith(ENGINE_SUFFIXES)  # a package can hold an engine
        problem = _graph_problem(folder / name) if is_onnx and name not in broken else None
        if problem is not None:
            found = [VerifiedFile(f.name, f.compared, problem) if f.name == name else f for f in found]
    return found


def check_weights(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Check, before a model runs, that its folder has the weights that were exported, by size and a sample.

    Raises:
        UsageError: a file is missing, has another size, or other weights.
    """
    for name, row in _own_weights(manifest).items():
        file = _verified(folder, name, {"bytes": row.get("bytes")}, {**row, "sha256": None})
        if file.problem is not None:
            raise UsageError(f"{folder / name}: {file.problem}. Export again, or restore the file.")


def _own_weights(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return dict((manifest.get("weights") or {}).get("files") or {})


def _weights(folder: Path, manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The linked files of the folder and of the models in it, by name."""
    found = _own_weights(manifest)
    for part in manifest.get("components", []):
        inner = _own_weights(read_manifest(folder / part))
        found |= {f"{part}/{name}": row for name, row in inner.items()}
    return found


def _models(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    parts = manifest.get("components", [])
    for part in parts:
        yield f"{part}/{read_manifest(folder / part).get('model', 'model.onnx')}"
    if manifest.get("models"):  # of a package of several
        yield from manifest["models"].values()
    elif not parts:
        yield manifest.get("model", "model.onnx")


def _verified(folder: Path, name: str, row: Mapping[str, Any], weights: Mapping[str, Any] | None) -> VerifiedFile:
    path = folder / name
    if Path(os.path.realpath(folder)) not in Path(os.path.realpath(path)).parents:
        return VerifiedFile(name, "nothing", "expected a file in the folder, got one outside of it")
    try:
        status = path.stat()
    except OSError:
        return VerifiedFile(name, "nothing", "expected a file, got none: it was moved or deleted")
    if not stat.S_ISREG(status.st_mode):
        return VerifiedFile(name, "nothing", "expected a regular file")
    if row.get("bytes") is not None and status.st_size != row["bytes"]:
        return VerifiedFile(
            name, "nothing", f"expected {row['bytes']} bytes, got {status.st_size}: it was changed after the export"
        )
    try:
        return _compared(path, name, row, weights)
    except (OSError, UsageError) as error:
        return VerifiedFile(name, "nothing", str(error))


def _compared(path: Path, name: str, row: Mapping[str, Any], weights: Mapping[str, Any] | None) -> VerifiedFile:
    other = "expected the bytes that were exported, got others: it was changed after the export"
    wanted = row.get("sha256") or (weights or {}).get("sha256")
    if wanted is not None:
        return VerifiedFile(name, "all bytes", None if sha256(path) == wanted else other)
    if weights is None:
        return VerifiedFile(name, "its size", None)
    return VerifiedFile(name, "a sample", None if sample_digest(path) == weights["sample"] else other)


def _graph_problem(path: Path) -> str | None:
    """What is wrong with the places of the weights in an ONNX file."""
    try:
        read_model(path)
    except UsageError as error:
        return str(error)
    return None
