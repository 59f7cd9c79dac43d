"""The process that rows run in (`Worker`): one that ends by itself or hangs is a failed row, not the end of all."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from .rows import FAILED, Report, Row, examine

OUTPUT: Final = "output.log"
_END: Final = ("", None)
# What happens to a row: runs it in this or in another process, with a limit in seconds.
Examine = Callable[[Row, Path, float, Report], None]


def _serve(calls: Connection) -> None:
    """Run the rows that come, with all output in the row's folder; ends with the connection."""
    while True:
        try:
            row, folder = calls.recv()
        except EOFError:
            return
        with (folder / OUTPUT).open("w", encoding="utf-8") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        examine(row, folder, lambda name, result: calls.send((name, result)))
        sys.stdout.flush()
        sys.stderr.flush()
        calls.send(_END)


class Worker:
    """A process that rows run in, one after the other. It is started again for another product and after a failure."""

    def __init__(self) -> None:
        self._process: Any = None
        self._calls: Connection | None = None
        self._runtime = ""

    def run(self, row: Row, folder: Path, limit: float, report: Report) -> None:
        """Run a row; a process that ends or takes too long fails the stage that it was in.

        Args:
            row: the row.
            folder: its folder.
            limit: seconds for all of its stages, with the start of the process.
            report: as in `examine`.
        """
        if self._runtime != row.runtime:
            self.stop()
        if self._calls is None:
            self._start(row.runtime)
        calls, ends = self._calls, time.monotonic() + limit
        assert calls is not None
        calls.send((row, folder))
        at, began, is_sound = "start", time.monotonic(), True
        while True:
            problem = None
            try:
                if not calls.poll(max(ends - time.monotonic(), 0)):
                    problem = f"took more than {limit:g} s"
                else:
                    name, result = calls.recv()
            except (EOFError, ConnectionError):
                self._process.join(10)
                problem = f"the process ended with exit code {self._process.exitcode}"
            if problem is not None:
                seconds = round(time.monotonic() - began, 2)
                report(at, {"state": FAILED, "text": problem, "seconds": seconds, "figures": {}})
                self.stop(at_once=True)
                return
            if (name, result) == _END:
                break
            at, began = name, time.monotonic()
            is_sound &= result is None or result["state"] != FAILED
            report(name, result)
        if not is_sound:  # an error of CUDA stays in the process
            self.stop()

    def _start(self, runtime: str) -> None:
        context = get_context("spawn")
        self._calls, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()
        self._runtime = runtime

    def stop(self, at_once: bool = False) -> None:
        """End the process; it may take 5 seconds unless it has to end at once."""
        if self._calls is None:
            return
        self._calls.close()
        self._process.join(0 if at_once else 5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._calls, self._process = None, None


def in_this_process(row: Row, folder: Path, limit: float, report: Report) -> None:
    """Run a row here, for a debugger; the limit is not applied."""
    examine(row, folder, report)
