"""Check before slow work where a result may be written: only over what this package wrote, by real path."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ...models.errors import UsageError, few
from .owned_files import foreign_files
from .partial_files import PARTIAL, recover


def check_destination(path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Check that `new_folder(path)` can be created, before slow work; nothing is left behind.

    Args:
        path: the folder.
        inputs: files and folders that will be read: the folder may not be or contain one of them.

    Raises:
        UsageError: the path cannot be written to, holds something else, or contains an input.
    """
    target = real_place(path)
    for source in inputs:
        real = Path(os.path.realpath(source))
        if real == target:
            raise UsageError(f"{target} is the folder of the model itself, which is never changed; name another.")
        if target in real.parents:
            raise UsageError(f"{target} contains {source}, which is read and never changed; name another folder.")
    recover(target)
    check_replaceable(target)
    existing = next((parent for parent in target.parents if parent.exists()), target.parent)
    try:
        Path(tempfile.mkdtemp(prefix=f".{target.name}.{PARTIAL}-", dir=existing)).rmdir()
    except OSError as error:
        raise UsageError(f"cannot write to {existing}: {error.strerror or error}.") from error


def check_shared_folder(path: str | os.PathLike[str], names: Iterable[str]) -> Path:
    """Check that files can be written into a folder with other files, over none but those of an earlier export.

    Args:
        path: the folder.
        names: the names of the files.

    Returns:
        The folder by its real path.

    Raises:
        UsageError: there is no such folder, or it has a file of one of these names that an export did not write.
    """
    target = real_place(path)
    if not target.is_dir():
        raise UsageError(f"{target} is not a folder; name that of the checkpoint.")
    foreign = set(foreign_files(target)) if any((target / name).exists() for name in names) else set()
    taken = sorted(foreign.intersection(names))
    if taken:
        raise UsageError(f"{target} has {few(taken)}, which no export wrote; move it away, or name another folder.")
    return target


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
    target = real_place(place)
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


def real_place(path: str | os.PathLike[str]) -> Path:
    """The absolute path, with links in its parents and `..` resolved as the system does, and its last part kept."""
    given = Path(path).expanduser()
    if "\0" in str(given):
        raise UsageError(f"{str(given)!r} contains a NUL character; give another path.")
    if given.name in ("", ".."):
        return Path(os.path.realpath(given))
    return Path(os.path.realpath(given.parent)) / given.name


def check_replaceable(target: Path) -> None:
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
            f"{target} holds files that no export wrote, or that were changed since: {few(others)}. "
            "Name another folder, or move them away."
        )
