"""The three files of an engine: the engine, its record, TensorRT's log. Nothing that is not ours is replaced."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from ...export.onnx_io.atomic_files import sha256
from ...models.errors import UsageError
from ..tensorrt import worker
from .process import LINKS, LOG_HEADER

SCHEMA: Final = "rmsnorm_deploy.engine/1"
_WRITTEN: Final = "record.json"
_PARTIAL_FILES: Final = {
    worker.REQUEST, worker.RESULT, f"{worker.RESULT}.partial", worker.ENGINE, worker.LOG, LINKS, _WRITTEN,
}  # fmt: skip


def record_of(place: Path) -> Path:
    """The record's file beside an engine."""
    return place.with_name(place.name + ".json")


def log_of(place: Path) -> Path:
    """The log's file beside an engine."""
    return place.with_name(place.name + ".log")


def move_into_place(folder: Path, place: Path, record: dict[str, Any]) -> None:
    """Put the three files in place; the record, which knows the engine's hash, comes last."""
    written = folder / _WRITTEN
    written.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    try:
        with _alone(place.parent):
            (folder / worker.LOG).replace(log_of(place))
            (folder / worker.ENGINE).replace(place)
            written.replace(record_of(place))
    except OSError as error:
        raise UsageError(f"writing {place} failed: {error.strerror or error}.") from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let no other build put files into the folder meanwhile: three files of one build belong together."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        lock(opened)
        yield
    finally:
        os.close(opened)


def lock(descriptor: int) -> None:
    """Wait for the lock of an open file or folder; who closes it lets it go. Some file systems have no locks."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def keep_log(log: Path, place: Path) -> None:
    """Put a failed build's log where the engine's would be."""
    with contextlib.suppress(OSError):
        log.replace(log_of(place))


def check_place(place: Path) -> None:
    """Make sure that nothing is replaced which an earlier build did not write.

    Raises:
        UsageError: something else is there.
    """
    if place.name in ("", ".", "..") or place.is_dir():
        raise UsageError(f"-o: expected the engine's file, such as model.engine, got the directory {place}.")
    record, log = record_of(place), log_of(place)
    written = read_record(place)
    for file in (place, record):
        if _is_there(file) and (written is None or file.is_symlink() or not file.is_file()):
            raise UsageError(f"{file} exists and is not an engine that rmsnorm built; name another file.")
    if written is not None and place.is_file():
        same = place.stat().st_size == written.get("bytes") and sha256(place) == written.get("sha256")
        if not same:
            raise UsageError(
                f"{place} is not the engine that {record.name} describes; name another file, or remove this one."
            )
    if _is_there(log) and not _is_our_log(log):
        raise UsageError(f"{log} exists and is not the log of a build; name another engine.")


def _is_there(file: Path) -> bool:
    return file.exists() or file.is_symlink()


def _is_our_log(log: Path) -> bool:
    if log.is_symlink() or not log.is_file():
        return False
    try:
        with log.open("rb") as file:
            return file.read(len(LOG_HEADER)) == LOG_HEADER.encode()
    except OSError:
        return False


def check_not_input(place: Path, inputs: Iterable[Path]) -> None:
    """Make sure that no file of an engine is one that it is built from.

    Raises:
        UsageError: one is.
    """
    known = {file.resolve() for file in inputs}
    for file in (place, record_of(place), log_of(place)):
        if file.resolve() in known:
            raise UsageError(f"{file} is a file of the model; name another engine.")


@contextmanager
def partial_folder(place: Path) -> Iterator[Path]:
    """A folder beside an engine's place for a build's files; it vanishes at the end.

    What builds of this engine left that were killed at once is removed first.

    Raises:
        UsageError: the place cannot be written to.
    """
    prefix = f".{place.name}.partial-"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for left in place.parent.glob(f"{glob.escape(prefix)}*"):
            if _is_left(left):
                shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place.parent))
    except OSError as error:
        raise UsageError(f"cannot write to {place.parent}: {error.strerror or error}.") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_left(folder: Path) -> bool:
    """Whether a folder holds a build's files and nothing else, and the process that made it is gone."""
    if folder.is_symlink() or not folder.is_dir() or {file.name for file in folder.iterdir()} - _PARTIAL_FILES:
        return False
    try:
        parent = json.loads((folder / worker.REQUEST).read_text(encoding="utf-8"))["parent"]
        os.kill(parent, 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return False


def read_record(place: Path) -> dict[str, Any] | None:
    """The record beside an engine; None where there is none of ours."""
    file = record_of(place)
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError):
        return None
    if isinstance(content, dict) and content.get("schema") == SCHEMA and content.get("engine") == place.name:
        return content
    return None
