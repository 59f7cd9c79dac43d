"""Connect to a cluster of Ray (`connected`), and check that a node can do our work there (`check_node`)."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.errors import EnvironmentMissingError, UsageError
from ...models.versions import installed_version

LOCAL = "local"
_PACKAGE = "rmsnorm-deploy"
_MARK = ".rmsnorm-shared-"
# To wait for an answer of a cluster.
_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class SharedFolder:
    """A folder that every node must see, as the process that collects the results sees it.

    Attributes:
        path: the folder, absolute.
        mark: name of a file in it.
        content: of that file.
        version: of this package, which every node must have.
    """

    path: str
    mark: str
    content: str
    version: str | None


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The module `ray`, connected to a cluster. The block's end disconnects, and stops a cluster that it started.

    A process that is connected already stays so, and its cluster is used.

    Args:
        address: `local` starts a cluster on this machine; `auto` is the one that runs on this machine; HOST:PORT or
            ray://HOST:PORT is another.

    Raises:
        EnvironmentMissingError: Ray is not installed.
        UsageError: there is no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise EnvironmentMissingError(
            f"Ray is not installed ({error}). Install it with: pip install 'rmsnorm-deploy[ray]'"
        ) from error
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Otherwise Ray hides all GPUs from tasks that ask for none by an empty CUDA_VISIBLE_DEVICES, and warns of it.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
    _check_answers(address)
    try:
        with _own_signal_handlers():
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=_debugging(), **options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"ray: expected local, auto, HOST:PORT or ray://HOST:PORT of a cluster that runs, got {address!r}: {first}"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Check that something listens at HOST:PORT, for which Ray itself would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdecimal()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"ray: expected the address of a cluster that runs, got {address!r}, where nothing answers: {reason}. "
            "Start a cluster with: ray start --head"
        ) from error


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keep the handlers of this process, which end it in order; Ray's print a stack and end it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _debugging() -> bool:
    return os.environ.get("RMSNORM_DEBUG", "") not in ("", "0")


@contextmanager
def shared_folder(path: Path) -> Iterator[SharedFolder]:
    """A folder with a mark in it, by which a node knows that it sees the same; the block's end deletes the mark.

    Raises:
        UsageError: the mark cannot be written.
    """
    folder = SharedFolder(str(path), _MARK + secrets.token_hex(4), secrets.token_hex(16), installed_version(_PACKAGE))
    mark = path / folder.mark
    try:
        mark.write_text(folder.content, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written to: {error.strerror or error}.") from error
    try:
        yield folder
    finally:
        mark.unlink(missing_ok=True)


def check_node(folder: SharedFolder) -> None:
    """Check on a node that it has this version of the package, and sees the folder.

    Raises:
        EnvironmentMissingError: it does not.
    """
    here, version = socket.gethostname(), installed_version(_PACKAGE)
    if version != folder.version:
        raise EnvironmentMissingError(
            f"node {here}: expected {_PACKAGE} {folder.version}, as where the run was started, got {version}. "
            "Install the same version on every node."
        )
    try:
        found = (Path(folder.path) / folder.mark).read_text(encoding="utf-8")
    except OSError as error:
        found = f"{error.strerror or error}"
    if found != folder.content:
        raise EnvironmentMissingError(
            f"node {here}: expected to see {folder.path} as where the run was started, got: {found[:80]}. "
            "Write the results to a file system that all nodes share."
        )
