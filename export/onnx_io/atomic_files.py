"""Writing a folder whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...models.companions import COMPANIONS
from ...models.errors import UsageError

MANIFEST = "manifest.json"
# What a server or a tokenizer needs beside the graph; copied where the model has it.


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well, and vanishes when it does not.

    An earlier export of ours at `path` is replaced; any other folder with files in it is refused and not touched.

    Raises:
        UsageError: the place cannot be written to, is full, or holds something else.
    """
    target = Path(path).expanduser().absolute()
    _check_replaceable(target)
    missing = _missing_parents(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        _remove_empty(missing)
        raise UsageError(f"cannot write to {target.parent}: {error.strerror or error}.") from error
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
        _move_into_place(partial, target)
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            raise
        raise UsageError(f"writing {target} failed: {error.strerror or error}. Nothing was left behind.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(missing)


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file in the folder of `path` that takes its name when the block ends well, and vanishes otherwise.

    Raises:
        UsageError: there is a file of that name, or the folder cannot be written to.
    """
    target = Path(path).expanduser().absolute()
    partial = target.with_name(f".{target.stem}.partial{target.suffix}")
    try:
        yield partial
        if target.exists():
            raise UsageError(f"{target} exists; name a new file.")
        partial.rename(target)
    except OSError as error:
        if isinstance(error, IsADirectoryError):
            raise
        raise UsageError(f"writing {target} failed: {error.strerror or error}. Nothing was left behind.") from error
    finally:
        partial.unlink(missing_ok=True)


def check_destination(path: str | os.PathLike[str]) -> None:
    """Find out whether `new_folder(path)` could be made, before slow work is done for it; nothing is left there.

    Raises:
        UsageError: the place cannot be written to, or holds something else.
    """
    target = Path(path).expanduser().absolute()
    _check_replaceable(target)
    existing = next((parent for parent in target.parents if parent.exists()), target.parent)
    try:
        Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=existing)).rmdir()
    except OSError as error:
        raise UsageError(f"cannot write to {existing}: {error.strerror or error}.") from error


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the config and tokenizer files that lie in `source`."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_replaceable(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} exists and is no folder; name another.")
    try:
        occupied = target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file()
    except OSError as error:
        raise UsageError(f"cannot read {target}: {error.strerror or error}") from error
    if occupied:
        raise UsageError(f"{target} holds files that no export wrote; name another folder, or empty it.")


def _move_into_place(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    try:
        target.rename(old / "old")
        try:
            partial.rename(target)
        except OSError:
            (old / "old").rename(target)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _missing_parents(target: Path) -> list[Path]:
    """The parent folders that would have to be made, innermost first."""
    return [parent for parent in target.parents if not parent.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty: something of ours, or of others, lives there now
            folder.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
