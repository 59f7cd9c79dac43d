"""Write folders and files completely or not at all, and check destinations before slow work."""

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


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `path` that is renamed to it when the block succeeds, and is deleted when it fails.

    An earlier export at `path` is replaced; any other folder with files in it is refused and not changed.

    Raises:
        UsageError: the path cannot be written to, the disk is full, or the path holds something else.
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
    """A temporary file beside `path` that is renamed to it when the block succeeds, and is deleted when it fails.

    Raises:
        UsageError: the file exists, or the folder cannot be written to.
    """
    target = Path(path).expanduser().absolute()
    partial = target.with_name(f".{target.stem}.partial{target.suffix}")
    try:
        yield partial
        if target.exists():
            raise UsageError(f"{target} exists; give a new file name.")
        partial.rename(target)
    except OSError as error:
        if isinstance(error, IsADirectoryError):
            raise
        raise UsageError(f"writing {target} failed: {error.strerror or error}. Nothing was left behind.") from error
    finally:
        partial.unlink(missing_ok=True)


def check_destination(path: str | os.PathLike[str]) -> None:
    """Check that `new_folder(path)` can be created, before slow work; nothing is left behind.

    Raises:
        UsageError: the path cannot be written to, or holds something else.
    """
    target = Path(path).expanduser().absolute()
    _check_replaceable(target)
    existing = next((parent for parent in target.parents if parent.exists()), target.parent)
    try:
        Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=existing)).rmdir()
    except OSError as error:
        raise UsageError(f"cannot write to {existing}: {error.strerror or error}.") from error


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the config and tokenizer files of a model's folder `source` to `folder`."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_replaceable(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} exists and is not a folder; give another path.")
    try:
        occupied = target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file()
    except OSError as error:
        raise UsageError(f"cannot read {target}: {error.strerror or error}") from error
    if occupied:
        raise UsageError(f"{target} holds files that no export wrote; give another folder, or empty it.")


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
    """The parent folders that do not exist, innermost first."""
    return [parent for parent in target.parents if not parent.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty: it holds other files now
            folder.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
