"""Run the worker process (`run_worker`): start it, forward its progress, limit its memory and read its result."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...models import errors
from ...models.errors import RmsnormDeployError
from ...plugins.tensorrt import library
from ..engines.api import flavor_of, library_folders, link_libraries
from ..tensorrt import worker
from .options import BuildOptions

# The first line of every log, which identifies a log of this package.
LOG_HEADER: Final = "# rmsnorm build"
# The folder of links to TensorRT's libraries.
LINKS: Final = "lib"
_POLL_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a build.

    Attributes:
        phase: the current phase; during the build, TensorRT's name of it.
        step: number of completed steps of the phase, or None.
        steps: number of steps of the phase, or None.
    """

    phase: str
    step: int | None = None
    steps: int | None = None


def run_worker(
    request: dict[str, Any], folder: Path, options: BuildOptions, tell: Callable[[Progress], None]
) -> dict[str, Any]:
    """Run one request in a separate process.

    Args:
        request: see `request_of`.
        folder: a new folder for the request, the log and the result.
        options: the runtime and the memory limit.
        tell: called with the progress of the build.

    Returns:
        The worker's result.

    Raises:
        RmsnormDeployError: the worker reported an error, or it ended unexpectedly.
    """
    links = folder / LINKS
    links.mkdir()
    link_libraries(options.runtime, links)
    reading, writing = os.pipe()
    request = {**request, "events": writing, "parent": os.getpid()}
    (folder / worker.REQUEST).write_text(json.dumps(request), encoding="utf-8")
    log = folder / worker.LOG
    log.write_text(f"{LOG_HEADER} {request['shown']}\n", encoding="utf-8")
    command = [sys.executable, "-m", "rmsnorm_deploy.runtime.tensorrt.worker", str(folder)]
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=(writing,),
                start_new_session=True, env=_environment(request, options.runtime, links),
            )  # fmt: skip
    finally:
        os.close(writing)
    listener = _Listener(reading, tell)
    listener.start()
    try:
        over = _wait(process, options.memory_limit, listener)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        listener.join()
    if listener.error is not None:
        raise listener.error
    return _answer(folder, process.returncode, over, options)


class _Listener(threading.Thread):
    """Forwards the worker's progress. An exception of the receiver ends the build and is raised by `run_worker`."""

    def __init__(self, reading: int, tell: Callable[[Progress], None]) -> None:
        super().__init__(daemon=True)
        self._reading, self._tell = reading, tell
        self.error: BaseException | None = None

    def run(self) -> None:
        with os.fdopen(self._reading, encoding="utf-8") as events:
            for line in events:
                try:
                    progress = Progress(**json.loads(line))
                except (ValueError, TypeError):  # an incomplete line: the worker was terminated
                    continue
                if self.error is None:
                    try:
                        self._tell(progress)
                    except BaseException as error:
                        self.error = error


def _environment(request: dict[str, Any], runtime: str, links: Path) -> dict[str, str]:
    places = [str(links), *map(str, library_folders(runtime)), os.environ.get("LD_LIBRARY_PATH", "")]
    found = {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(place for place in places if place),
        "PYTHONUNBUFFERED": "1",
        library.ARCHITECTURES_VARIABLE: ",".join(map(str, request["architectures"])),
    }
    nvrtc = library.find_nvrtc()
    if nvrtc is not None:
        found.setdefault(library.NVRTC_VARIABLE, str(nvrtc))
    return found


def _wait(process: subprocess.Popen[bytes], limit: int | None, listener: _Listener) -> int | None:
    """Wait for the worker; returns its memory in MiB if that exceeded the limit and it was killed, else None."""
    while listener.error is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_SECONDS)
            return None
        taken = _resident(process.pid) if limit is not None else 0
        if limit is not None and taken > limit:
            process.kill()
            return taken
    return None


def _resident(pid: int) -> int:
    """Resident memory of a process in MiB; 0 if unknown."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def _answer(folder: Path, code: int, over: int | None, options: BuildOptions) -> dict[str, Any]:
    title = flavor_of(options.runtime).title
    if over is not None:
        raise RmsnormDeployError(
            f"{title}'s builder used {over} MiB of memory, more than --memory-limit {options.memory_limit}, and was "
            "terminated. Raise the limit, or reduce the largest shapes of the profiles."
        )
    try:
        result: dict[str, Any] = json.loads((folder / worker.RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RmsnormDeployError(f"{title}'s builder {_ending(code)}: {_last_lines(folder / worker.LOG)}") from None
    if "error" in result:
        kind = getattr(errors, result["error"]["kind"], RmsnormDeployError)
        raise kind(result["error"]["message"])
    if code:
        raise RmsnormDeployError(f"{title}'s builder {_ending(code)} after it had built the engine.")
    return result


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"was terminated by {name}{hint}"


def _last_lines(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    return " | ".join(line[:300] for line in lines[-5:]) or "its log is empty"
