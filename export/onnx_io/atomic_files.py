"""Write folders and files completely or not at all.

A result is written under a temporary name beside its place and takes the place in one step. Where a process was killed,
the next write to the same place deletes what it left.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from ...models.companions import companion_files
from ...models.errors import UsageError, few
from .destinations import check_new_file, check_replaceable, check_shared_folder, real_place
from .owned_files import delete_export, foreign_files
from .partial_files import EARLIER, KEPT, PARTIAL, discard, locked_file, locked_folder, recover, umask


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block succeeds, and is deleted when it fails.

    An earlier export at `path` is replaced at once, where the system can exchange two folders. A folder in which there
    is anything that an export did not write is refused and not changed. The new folder has the earlier one's mode.

    Raises:
        UsageError: the path cannot be written to, the disk is full, or the path holds something else.
    """
    target = real_place(path)
    recover(target)
    check_replaceable(target)
    missing = _missing_parents(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial, lock = locked_folder(target, PARTIAL)
    except OSError as error:
        _remove_empty(missing)
        raise UsageError(f"cannot write to {target.parent}: {error.strerror or error}.") from error
    try:
        partial.chmod(stat.S_IMODE(target.stat().st_mode) if target.is_dir() else 0o777 & ~umask())
        yield partial
        _move_into_place(partial, target)
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            raise
        raise UsageError(f"writing {target} failed: {error.strerror or error}. Nothing was left behind.") from error
    finally:
        discard(partial)
        os.close(lock)
        _remove_empty(missing)


@contextmanager
def into_folder(path: str | os.PathLike[str], last: tuple[str, ...]) -> Iterator[Path]:
    """A temporary folder whose files are moved into an existing folder when the block succeeds.

    Each file takes its place in one step, and replaces only what an earlier export wrote there.

    Args:
        path: the folder, which has other files that are not changed.
        last: names of files that are moved last, in this order.

    Raises:
        UsageError: the folder does not exist, cannot be written to, or has a file of one of these names that an export
            did not write.
    """
    target = check_shared_folder(path, last)
    recover(target / last[0])
    try:
        partial, lock = locked_folder(target / last[0], PARTIAL)
    except OSError as error:
        raise UsageError(f"cannot write to {target}: {error.strerror or error}.") from error
    try:
        yield partial
        names = [file.name for file in partial.iterdir() if file.name not in last]
        names += [name for name in last if (partial / name).exists()]
        check_shared_folder(target, tuple(names))
        for name in names:
            os.replace(partial / name, target / name)
    except OSError as error:
        raise UsageError(f"writing to {target} failed: {error.strerror or error}.") from error
    finally:
        discard(partial)
        os.close(lock)


@contextmanager
def new_file(path: str | os.PathLike[str], replaces: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """A temporary file beside `path` that is renamed to it when the block succeeds, and is deleted when it fails.

    Args:
        path: the file; its folder must exist.
        replaces: says of an existing file whether it may be replaced, and then keeps its mode; no file may when None.

    Raises:
        UsageError: the file exists and may not be replaced, or the folder cannot be written to.
    """
    target = check_new_file(path, replaces)
    recover(target)
    partial: Path | None = None
    try:
        partial, lock = locked_file(target)
        try:
            yield partial
            check_new_file(target, replaces)
            if target.exists():
                partial.chmod(stat.S_IMODE(target.stat().st_mode))
                os.replace(partial, target)
            else:
                _rename_to_free(partial, target)
        finally:
            os.close(lock)
    except OSError as error:
        if isinstance(error, IsADirectoryError):
            raise
        raise UsageError(f"writing {target} failed: {error.strerror or error}. Nothing was left behind.") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A locked temporary folder beside `target`, which is deleted at the end; what killed processes left is deleted.

    Raises:
        OSError: the folder cannot be created.
    """
    recover(target)
    partial, lock = locked_folder(target, PARTIAL)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copy the config and tokenizer files of a model's folder `source` to `folder`, with their modes.

    A file that `folder` has already is not replaced.

    Returns:
        Notes for the user on files that were not copied.
    """
    files, notes = companion_files(source)
    for file in files:
        if (folder / file.name).exists():
            notes.append(f"{file.name} was not copied, because a file of the model has that name")
            continue
        shutil.copy(file, folder / file.name)
    return notes


def restrict_mode(path: Path, sources: Iterable[Path]) -> None:
    """Take from a file each right to read and write that one of the files it was made from does not grant."""
    mode = stat.S_IMODE(path.stat().st_mode)
    for source in sources:
        with contextlib.suppress(OSError):
            mode &= stat.S_IMODE(source.stat().st_mode) | stat.S_IRUSR | stat.S_IWUSR
    path.chmod(mode)


def copy_or_link(source: Path, place: Path, mode: Literal["copy", "link"]) -> bool:
    """Copy a file, or hard-link it where the file system can; whether it was linked."""
    if mode == "link":
        with contextlib.suppress(OSError):  # another file system, one without hard links, or a file of another user
            os.link(source, place)
            return True
    shutil.copyfile(source, place)
    restrict_mode(place, [source])
    return False


def _move_into_place(partial: Path, target: Path) -> None:
    if not target.exists():
        _rename_to_free(partial, target)
        return
    if _exchange(partial, target):
        others = delete_export(partial)  # the earlier export, which has the temporary name now
        if others:
            _exchange(partial, target)
            raise UsageError(f"{target}: {few(others)} appeared during the export; move it away, and export again.")
        return
    earlier, lock = locked_folder(target, EARLIER)
    try:
        target.rename(earlier / KEPT)
        try:
            others = foreign_files(earlier / KEPT)
            if others:
                raise UsageError(f"{target}: {few(others)} appeared during the export; move it away, and export again.")
            _rename_to_free(partial, target)
        except BaseException:
            (earlier / KEPT).rename(target)
            raise
        delete_export(earlier / KEPT)
    finally:
        with contextlib.suppress(OSError):
            earlier.rmdir()
        os.close(lock)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step; False where the system or the file system cannot."""
    library = ctypes.CDLL(None, use_errno=True) if sys.platform in ("linux", "darwin") else None
    first, second = os.fsencode(a), os.fsencode(b)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        at_cwd, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)
        code = library.renameat2(at_cwd, first, at_cwd, second, exchange)  # type: ignore[union-attr]
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        code = library.renamex_np(first, second, 2)  # type: ignore[union-attr]  # RENAME_SWAP
    else:
        return False
    if code == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(b))


def _rename_to_free(partial: Path, target: Path) -> None:
    """Rename a file or folder to a name that must be free."""
    if partial.is_dir():
        partial.rename(target)  # refuses a file and a folder that is not empty
        return
    try:
        os.link(partial, target)
    except FileExistsError as error:
        raise UsageError(f"{target} appeared while it was written; give a new file name.") from error
    except OSError:  # a file system without hard links
        if target.exists():
            raise UsageError(f"{target} appeared while it was written; give a new file name.") from None
        partial.rename(target)


def _missing_parents(target: Path) -> list[Path]:
    """The parent folders that do not exist, innermost first."""
    return [parent for parent in target.parents if not parent.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty: it holds other files now
            folder.rmdir()
