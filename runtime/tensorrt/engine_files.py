"""The three files of an engine: the engine, its record, TensorRT's log. Files of other programs are never replaced."""

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

from ...export.onnx_io.owned_files import sha256
from ...models.errors import UsageError
from ..engines.engine_file import read_record, record_of
from ..tensorrt import worker
from .process import LINKS, LOG_HEADER

_WRITTEN: Final = "record.json"
_PARTIAL_FILES: Final = {
    worker.REQUEST, worker.RESULT, f"{worker.RESULT}.partial", worker.ENGINE, worker.LOG, LINKS, _WRITTEN,
}  # fmt: skip


def log_of(place: Path) -> Path:
    """The log's file beside an engine."""
    return place.with_name(place.name + ".log")


def move_into_place(folder: Path, place: Path, record: dict[str, Any]) -> None:
    """Move the three files into place; the record, which contains the engine's hash, comes last."""
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
    """Lock the folder, so that no other build writes its files at the same time: the three files belong together."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        lock(opened)
        yield
    finally:
        os.close(opened)


def lock(descriptor: int) -> None:
    """Wait for the lock of an open file or folder; closing it releases the lock. Some file systems have no locks."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def keep_log(log: Path, place: Path) -> None:
    """Move the log of a failed build to the place of the engine's log."""
    with contextlib.suppress(OSError):
        log.replace(log_of(place))


def check_place(place: Path) -> None:
    """Check that only files of an earlier build would be replaced.

    Raises:
        UsageError: another file exists there.
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
    """Check that no file of an engine is a file of the model.

    Raises:
        UsageError: a file of the engine is a file of the model.
    """
    known = {file.resolve() for file in inputs}
    for file in (place, record_of(place), log_of(place)):
        if file.resolve() in known:
            raise UsageError(f"{file} is a file of the model; name another engine.")


@contextmanager
def partial_folder(place: Path) -> Iterator[Path]:
    """A temporary folder beside the engine for the files of a build; it is removed at the end.

    Folders of killed builds of this engine are removed first.

    Raises:
        UsageError: the folder cannot be written to.
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
    """Whether a folder contains only files of a build whose process has ended."""
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
