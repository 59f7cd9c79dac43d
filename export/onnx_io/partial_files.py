"""Temporary files and folders beside a result: locked while their process lives, deleted or put back by the next one.

Their names are `.NAME.rmsnorm-partial-XXXXXXXX`, or `.NAME.rmsnorm-earlier-XXXXXXXX` for the place of an earlier
result while it is replaced.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ...models.errors import UsageError
from .owned_files import delete_export, has_manifest

try:
    import fcntl
except ImportError:  # Windows has no advisory locks: what killed processes left is not deleted there
    fcntl = None  # type: ignore[assignment]

PARTIAL: Final = "rmsnorm-partial"
EARLIER: Final = "rmsnorm-earlier"
# Folder in which the earlier result stands while it is replaced, where folders cannot be exchanged.
KEPT: Final = "kept"


def locked_folder(target: Path, kind: str) -> tuple[Path, int]:
    while True:
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}.{kind}-", dir=target.parent))
        descriptor = os.open(made, os.O_RDONLY)
        if _locks(descriptor) and _is_open_as(descriptor, made):
            return made, descriptor
        os.close(descriptor)  # another process took the new folder for one that was left


def locked_file(target: Path) -> tuple[Path, int]:
    while True:
        # With the target's suffix, on which the format of a file can depend.
        descriptor, name = tempfile.mkstemp(
            prefix=f".{target.stem}.{PARTIAL}-", suffix=target.suffix, dir=target.parent
        )
        made = Path(name)
        if _locks(descriptor) and _is_open_as(descriptor, made):
            made.chmod(0o666 & ~umask())
            return made, descriptor
        os.close(descriptor)


def recover(target: Path) -> None:
    """Put back an earlier result that a killed process had moved away, and delete the temporary files that it left."""
    if fcntl is None:
        return
    try:
        entries = sorted(target.parent.iterdir())
    except OSError:
        return
    for entry in entries:
        kind = _temporary_kind(entry, target)
        if kind is None or entry.is_symlink():
            continue
        try:
            descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_open_as(descriptor, entry):
                _clean(entry, target, kind)
        except OSError:  # its process lives, or the file system has no locks
            pass
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes from a folder that several steps write to, until the block or the process ends.

    Nothing is kept from anyone where the file system has no locks.

    Raises:
        UsageError: another process has claimed it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(
                    f"{folder}: another process is writing there. Wait until it has ended, or end it."
                ) from error
            except OSError:
                pass
        yield
    finally:
        os.close(descriptor)


def discard(partial: Path) -> None:
    """Delete a temporary file or folder; of an earlier export, which has its name after an exchange, only our files."""
    with contextlib.suppress(OSError):
        if not partial.is_dir():
            partial.unlink(missing_ok=True)
        elif has_manifest(partial):
            delete_export(partial)
        else:
            shutil.rmtree(partial, ignore_errors=True)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _locks(descriptor: int) -> bool:
    """Lock an open file or folder without waiting; a file system without locks counts as locked."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_open_as(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False


def _temporary_kind(entry: Path, target: Path) -> str | None:
    """`PARTIAL` or `EARLIER` for a temporary name that belongs to `target`, else None."""
    for kind, stem, suffix in (
        (PARTIAL, target.name, ""),
        (PARTIAL, target.stem, target.suffix),
        (EARLIER, target.name, ""),
    ):
        if re.fullmatch(re.escape(f".{stem}.{kind}-") + "[a-z0-9_]{8}" + re.escape(suffix), entry.name):
            return kind
    return None


def _clean(entry: Path, target: Path, kind: str) -> None:
    if kind == PARTIAL:
        discard(entry)
        return
    kept = entry / KEPT
    if kept.is_dir() and not target.exists():
        kept.rename(target)
    elif kept.is_dir():
        delete_export(kept)
    with contextlib.suppress(OSError):
        entry.rmdir()
