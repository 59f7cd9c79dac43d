"""Write folders and files completely or not at all, and check destinations before slow work.

A result is written under a temporary name beside its place, `.NAME.rmsnorm-partial-XXXXXXXX`, which is locked while its
process lives. Where a process was killed, the next write to the same place deletes what it left.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ...models.companions import companion_files
from ...models.errors import UsageError
from .owned_files import delete_export, foreign_files, has_manifest

try:
    import fcntl
except ImportError:  # Windows has no advisory locks: what killed processes left is not deleted there
    fcntl = None  # type: ignore[assignment]

_PARTIAL: Final = "rmsnorm-partial"
_EARLIER: Final = "rmsnorm-earlier"
# Folder in which the earlier result stands while it is replaced, where folders cannot be exchanged.
_KEPT: Final = "kept"


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block succeeds, and is deleted when it fails.

    An earlier export at `path` is replaced at once, where the system can exchange two folders. A folder in which there
    is anything that an export did not write is refused and not changed. The new folder has the earlier one's mode.

    Raises:
        UsageError: the path cannot be written to, the disk is full, or the path holds something else.
    """
    target = _place(path)
    _recover(target)
    _check_replaceable(target)
    missing = _missing_parents(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial, lock = _locked_folder(target, _PARTIAL)
    except OSError as error:
        _remove_empty(missing)
        raise UsageError(f"cannot write to {target.parent}: {error.strerror or error}.") from error
    try:
        partial.chmod(stat.S_IMODE(target.stat().st_mode) if target.is_dir() else 0o777 & ~_umask())
        yield partial
        _move_into_place(partial, target)
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            raise
        raise UsageError(f"writing {target} failed: {error.strerror or error}. Nothing was left behind.") from error
    finally:
        _discard(partial)
        os.close(lock)
        _remove_empty(missing)


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
    _recover(target)
    partial: Path | None = None
    try:
        partial, lock = _locked_file(target)
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


def check_new_file(path: str | os.PathLike[str], replaces: Callable[[Path], bool] | None = None) -> Path:
    """Check that `new_file` can write a path, before slow work; returns the path by its real folder.

    Raises:
        UsageError: its folder does not exist; or the path is a link, a folder or a device, or a file that may not be
            replaced.
    """
    place = Path(path).expanduser()
    try:
        status = place.lstat()
        exists = True
    except FileNotFoundError:
        exists = False
    except (OSError, ValueError) as error:
        raise UsageError(f"{place}: cannot be written to: {getattr(error, 'strerror', None) or error}.") from error
    if exists and stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{place} is a folder; give a file name.")
    if not place.absolute().parent.is_dir():
        raise UsageError(f"{place}: the folder {place.absolute().parent} does not exist.")
    target = _place(place)
    if not exists:
        return target
    if stat.S_ISLNK(status.st_mode):
        raise UsageError(f"{place} is a link to {os.readlink(place)}; name a file.")
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{place} is not a regular file, such as a device or a pipe; name a file.")
    if replaces is None:
        raise UsageError(f"{place} exists; give a new file name.")
    if not replaces(target):
        raise UsageError(f"{place} exists and rmsnorm did not write it; name another file, or delete it first.")
    return target


def check_distinct(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None]) -> None:
    """Check that no two outputs of a command are one file, and that none is one of its inputs.

    Args:
        outputs: files that will be written, by the option that names them; None where the option was not given.
        inputs: files that will be read, by option or argument.

    Raises:
        UsageError: two of them are one file.
    """
    seen: dict[str, str] = {}
    for option, path in [*inputs.items(), *outputs.items()]:
        if path is None:
            continue
        real = os.path.realpath(path.expanduser())
        if option in outputs and real in seen:
            raise UsageError(f"{seen[real]} and {option} both name {path}; name another file for {option}.")
        seen.setdefault(real, option)


def check_destination(path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Check that `new_folder(path)` can be created, before slow work; nothing is left behind.

    Args:
        path: the folder.
        inputs: files and folders that will be read: the folder may not be or contain one of them.

    Raises:
        UsageError: the path cannot be written to, holds something else, or contains an input.
    """
    target = _place(path)
    for source in inputs:
        real = Path(os.path.realpath(source))
        if real == target:
            raise UsageError(f"{target} is the folder of the model itself, which is never changed; name another.")
        if target in real.parents:
            raise UsageError(f"{target} contains {source}, which is read and never changed; name another folder.")
    _recover(target)
    _check_replaceable(target)
    existing = next((parent for parent in target.parents if parent.exists()), target.parent)
    try:
        Path(tempfile.mkdtemp(prefix=f".{target.name}.{_PARTIAL}-", dir=existing)).rmdir()
    except OSError as error:
        raise UsageError(f"cannot write to {existing}: {error.strerror or error}.") from error


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


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A locked temporary folder beside `target`, which is deleted at the end; what killed processes left is deleted.

    Raises:
        OSError: the folder cannot be created.
    """
    _recover(target)
    partial, lock = _locked_folder(target, _PARTIAL)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _place(path: str | os.PathLike[str]) -> Path:
    """The absolute path, with links in its parents and `..` resolved as the system does, and its last part kept."""
    given = Path(path).expanduser()
    if "\0" in str(given):
        raise UsageError(f"{str(given)!r} contains a NUL character; give another path.")
    if given.name in ("", ".."):
        return Path(os.path.realpath(given))
    return Path(os.path.realpath(given.parent)) / given.name


def _check_replaceable(target: Path) -> None:
    try:
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise UsageError(f"{target} exists and is not a folder; give another path.")
        working = Path(os.path.realpath(os.curdir))
        if target == working or target in working.parents:
            raise UsageError(f"{target} is the working directory, or contains it; name a folder in it.")
        others = foreign_files(target) if target.is_dir() else []
    except OSError as error:
        raise UsageError(f"cannot read {target}: {error.strerror or error}") from error
    if others:
        raise UsageError(
            f"{target} holds files that no export wrote, or that were changed since: {_some(others)}. "
            "Name another folder, or move them away."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _move_into_place(partial: Path, target: Path) -> None:
    if not target.exists():
        _rename_to_free(partial, target)
        return
    if _exchange(partial, target):
        others = foreign_files(partial)  # of the earlier export, which has the temporary name now
        if others:
            _exchange(partial, target)
            raise UsageError(f"{target}: {_some(others)} appeared during the export; move it away, and export again.")
        delete_export(partial)
        return
    earlier, lock = _locked_folder(target, _EARLIER)
    try:
        target.rename(earlier / _KEPT)
        try:
            others = foreign_files(earlier / _KEPT)
            if others:
                raise UsageError(
                    f"{target}: {_some(others)} appeared during the export; move it away, and export again."
                )
            _rename_to_free(partial, target)
        except BaseException:
            (earlier / _KEPT).rename(target)
            raise
        delete_export(earlier / _KEPT)
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


def _locked_folder(target: Path, kind: str) -> tuple[Path, int]:
    while True:
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}.{kind}-", dir=target.parent))
        descriptor = os.open(made, os.O_RDONLY)
        if _locks(descriptor) and _is_open_as(descriptor, made):
            return made, descriptor
        os.close(descriptor)  # another process took the new folder for one that was left


def _locked_file(target: Path) -> tuple[Path, int]:
    while True:
        # With the target's suffix, on which the format of a file can depend.
        descriptor, name = tempfile.mkstemp(
            prefix=f".{target.stem}.{_PARTIAL}-", suffix=target.suffix, dir=target.parent
        )
        made = Path(name)
        if _locks(descriptor) and _is_open_as(descriptor, made):
            made.chmod(0o666 & ~_umask())
            return made, descriptor
        os.close(descriptor)


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


def _recover(target: Path) -> None:
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


def _temporary_kind(entry: Path, target: Path) -> str | None:
    """`_PARTIAL` or `_EARLIER` for a temporary name that belongs to `target`, else None."""
    for kind, stem, suffix in (
        (_PARTIAL, target.name, ""),
        (_PARTIAL, target.stem, target.suffix),
        (_EARLIER, target.name, ""),
    ):
        if re.fullmatch(re.escape(f".{stem}.{kind}-") + "[a-z0-9_]{8}" + re.escape(suffix), entry.name):
            return kind
    return None


def _clean(entry: Path, target: Path, kind: str) -> None:
    if kind == _PARTIAL:
        _discard(entry)
        return
    kept = entry / _KEPT
    if kept.is_dir() and not target.exists():
        kept.rename(target)
    elif kept.is_dir():
        delete_export(kept)
    with contextlib.suppress(OSError):
        entry.rmdir()


def _discard(partial: Path) -> None:
    """Delete a temporary file or folder; of an earlier export, which has its name after an exchange, only our files."""
    with contextlib.suppress(OSError):
        if not partial.is_dir():
            partial.unlink(missing_ok=True)
        elif has_manifest(partial):
            delete_export(partial)
        else:
            shutil.rmtree(partial, ignore_errors=True)


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
