"""TensorRT's messages (`logger_class`): written as they come, and kept for errors and results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final

SEVERITIES: Final = ("internal error", "error", "warning", "info", "verbose")
WARNING, VERBOSE = 2, 4
_KEPT_LINES: Final = 400


def logger_class(trt: Any) -> Any:
    """The class of a logger for this TensorRT.

    Its arguments are `write`, which receives each line; `verbose`, whether that includes verbose messages; and
    `begins`, the beginning of messages that are written in any case, and kept.
    """

    class Logger(trt.ILogger):
        """Writes the messages, and keeps those that matter. May be called from several threads."""

        def __init__(self, write: Callable[[str], None], verbose: bool = False, begins: str | None = None) -> None:
            super().__init__()
            self.write, self.verbose, self.begins = write, verbose, begins
            self.errors: deque[str] = deque(maxlen=_KEPT_LINES)
            self.warnings: deque[str] = deque(maxlen=_KEPT_LINES)
            self.kept: list[str] = []
            self.latest: deque[str] = deque(maxlen=_KEPT_LINES)

        def log(self, severity: Any, message: str) -> None:
            level = int(severity)
            line = f"[{SEVERITIES[level]}] {message}"
            is_kept = self.begins is not None and message.startswith(self.begins)
            if is_kept:
                self.kept.append(message)
            if level < WARNING:
                self.errors.append(" ".join(message.split()))
                # The messages before an error may be the only ones that name a file.
                for earlier in self.latest:
                    self.write(earlier)
                self.latest.clear()
            elif level == WARNING and message not in self.warnings:
                self.warnings.append(message)
            if level < VERBOSE or self.verbose or is_kept:
                self.write(line)
            else:
                self.latest.append(line)

    return Logger
