"""Hashes of the files that a recipe reads (`Hashes`), kept between runs, so that large ones are read once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from ...export.onnx_io.owned_files import sha256
from ...models.errors import UsageError
from ...models.regular_files import read_json
from ..report.text import write_text

SCHEMA: Final = "rmsnorm_deploy.hashes/1"
HASHES: Final = "hashes.json"
# Smaller files are read each time.
_KEPT_BYTES = 1 << 20


class _Known(BaseModel):
    model_config = ConfigDict(strict=True)

    bytes: int
    changed_ns: int
    sha256: str


class Hashes:
    """The hashes of files, by their content.

    Args:
        folder: the folder of a recipe's results, in which a file has the hashes of large files, with the size and the
            time of each when it was read.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / HASHES
        self._known = _read(self._file)
        self._used: dict[str, _Known] = {}

    def of(self, path: Path) -> str:
        """The SHA-256 of a file. A large one is not read if its size and time are those when it was read last.

        Raises:
            OSError: it cannot be read.
        """
        status = path.stat()
        if status.st_size < _KEPT_BYTES:
            return sha256(path)
        key, known = str(path), self._known.get(str(path))
        if known is None or (known.bytes, known.changed_ns) != (status.st_size, status.st_mtime_ns):
            known = _Known(bytes=status.st_size, changed_ns=status.st_mtime_ns, sha256=sha256(path))
        self._known[key] = self._used[key] = known
        return known.sha256

    def save(self) -> None:
        """Keep the hashes of the large files that were asked for; without any, no file is written.

        Raises:
            UsageError: the file cannot be written, or is another's.
        """
        if self._used and self._used != _read(self._file):
            content = {"schema": SCHEMA, "files": {key: known.model_dump() for key, known in self._used.items()}}
            write_text(json.dumps(content, indent=2) + "\n", self._file)


def _read(file: Path) -> dict[str, _Known]:
    """The hashes in a file; none if it cannot be read, as they can be computed again."""
    try:
        content = read_json(file, "")
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            return {}
        return {str(key): _Known.model_validate(value) for key, value in dict(content["files"]).items()}
    except (UsageError, OSError, ValidationError, KeyError, TypeError, ValueError):
        return {}
