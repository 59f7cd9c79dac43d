"""Compiled kernels on disk, by the hash of everything that they depend on.

An entry is one file: the SHA-256 of the rest, then one line of JSON with the fields of CompiledKernel, then the image.
An entry that does not have its hash is compiled again. Several processes may write one entry: each writes a file of its
own and renames it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Final

from ...models.errors import UsageError
from ...models.regular_files import read_bytes

# The folder of the cache, or `off`.
VARIABLE: Final = "RMSNORM_KERNEL_CACHE"
# Part of every key: a new number where the files or the meaning of their fields change.
FORMAT: Final = 1
_LARGEST: Final = 16 << 20
_HASH_BYTES: Final = 64
_LOG: Final = logging.getLogger(__name__)


def cache_folder() -> Path | None:
    """The folder of the cache: that of RMSNORM_KERNEL_CACHE, or the default one; None if it is switched off."""
    given = os.environ.get(VARIABLE, "")
    if given.strip().lower() in ("off", "0"):
        return None
    if given:
        return Path(given).expanduser()
    # The specification of base directories ignores a path that is not absolute.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "rmsnorm-deploy" / "kernels"


def entry_key(content: dict[str, Any]) -> str:
    """The key of what a kernel depends on, as JSON values."""
    return hashlib.sha256(json.dumps([FORMAT, content], sort_keys=True).encode()).hexdigest()


def read_entry(key: str) -> dict[str, Any] | None:
    """The fields of the CompiledKernel of a key; None if there is no entry, or it is damaged."""
    folder = cache_folder()
    if folder is None or not (folder / key).exists():
        return None
    try:
        content = read_bytes(folder / key, _LARGEST)
        digest, body = content[:_HASH_BYTES], content[_HASH_BYTES:]
        if hashlib.sha256(body).hexdigest().encode() != digest:
            _LOG.warning("%s: the cached kernel is damaged, so it is compiled again.", folder / key)
            return None
        head, _, image = body.partition(b"\n")
        fields = json.loads(head)
        return None if fields.pop("key") != key else {**fields, "image": image}
    except (OSError, UsageError) as error:
        _LOG.warning("%s: the cached kernel cannot be read (%s), so it is compiled again.", folder / key, error)
        return None


def write_entry(key: str, fields: dict[str, Any]) -> None:
    """Write an entry, completely or not at all. Where the folder cannot be written to, nothing is written.

    Args:
        key: see `entry_key`.
        fields: those of the CompiledKernel: JSON values, and the bytes of the image.
    """
    folder = cache_folder()
    if folder is None:
        return
    head = {name: value for name, value in fields.items() if name != "image"}
    body = json.dumps({"key": key, **head}).encode() + b"\n" + fields["image"]
    partial = None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".partial-", delete=False) as file:
            partial = Path(file.name)
            file.write(hashlib.sha256(body).hexdigest().encode() + body)
        partial.replace(folder / key)
    except OSError as error:
        _LOG.warning("%s: the compiled kernel is not cached: %s", folder, error.strerror or error)
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
