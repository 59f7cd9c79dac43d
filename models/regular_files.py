"""Read files that are not trusted (`read_bytes`, `read_json`), and tell whether a file changed (`FileStamp`)."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError

# The largest JSON file that is read, in bytes: a report of a model with thousands of norms has a few dozen megabytes.
LARGEST_JSON = 256 << 20
# The deepest nesting of JSON: the files of this package have at most 8 levels.
DEEPEST_JSON = 100


@dataclass(frozen=True, slots=True)
class FileStamp:
    """The state of a file, to detect changes: its size in bytes, modification time in ns, and inode."""

    path: Path
    size: int
    changed_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileStamp:
        """The file's current state.

        Raises:
            OSError: the file does not exist.
        """
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ino)

    def check_unchanged(self, where: str = "") -> None:
        """Check that the file is as it was.

        Args:
            where: what reads the file, for the message, if that is another one.

        Raises:
            UsageError: the file was changed, replaced or removed.
        """
        try:
            same = FileStamp.of(self.path) == self
        except OSError:
            same = False
        if not same:
            raise UsageError(
                f"{f'{where}: ' if where else ''}{self.path} changed while it was in use, so the result is not "
                "reliable. Wait until no other program writes it, and start again."
            )


def regular_size(path: Path) -> int:
    """The size of a regular file in bytes, without opening it: devices and pipes may block or never end.

    Raises:
        UsageError: the path does not exist, or it is a folder, a device, a pipe or a socket.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except ValueError as error:  # a NUL character, or a character that file names cannot have
        raise UsageError(f"{str(path)!r}: cannot be read: not a file name ({error}).") from error
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{path}: expected a regular file, got {_kind(status.st_mode)}. Name a regular file.")
    return status.st_size


def read_bytes(path: Path, largest: int) -> bytes:
    """The content of a regular file: no more than its size, because some files below /proc have no end.

    Args:
        path: the file.
        largest: the most bytes that are read.

    Raises:
        UsageError: the file does not exist, is not a regular file, is larger, or cannot be read.
    """
    size = regular_size(path)
    if size > largest:
        raise UsageError(f"{path}: expected at most {largest} bytes, got {size}.")
    try:
        # The file may have become a pipe since: opening it must not wait for a writer.
        with os.fdopen(
            os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb"
        ) as file:
            return file.read(size)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}.") from error


def read_json(path: Path, remedy: str) -> Any:
    """The value of a JSON file.

    Args:
        path: the file.
        remedy: a sentence on what to do if it is not JSON.

    Raises:
        UsageError: the file cannot be read, has more than `LARGEST_JSON` bytes, is not JSON in UTF-8, or is nested
            more than `DEEPEST_JSON` deep.
    """
    data = read_bytes(path, LARGEST_JSON)
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError as error:
        raise _too_deep(path, remedy) from error
    except ValueError as error:  # also numbers with thousands of digits
        raise UsageError(f"{path} cannot be read as JSON ({error}). {remedy}") from error
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST_JSON:
            raise _too_deep(path, remedy)
        level = [item for inner in level for item in _items(inner) if isinstance(item, dict | list)]
    return value


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _too_deep(path: Path, remedy: str) -> UsageError:
    return UsageError(f"{path}: expected JSON of at most {DEEPEST_JSON} levels, got a deeper nesting. {remedy}")


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((name for matches, name in kinds if matches(mode)), "a special file")
