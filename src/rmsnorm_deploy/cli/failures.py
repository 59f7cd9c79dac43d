"""Convert exceptions to messages and exit codes of the command line."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import typer

from rmsnorm_deploy.models.errors import explained

SCHEMA = "rmsnorm_deploy.error/1"
INTERRUPTED, TERMINATED, PIPE_CLOSED = 130, 143, 141

# The parent of all errors about a command line, for which typer has no public name.
_COMMAND_LINE_ERROR: Any = typer.BadParameter.__base__


class Terminated(KeyboardInterrupt):
    """The process received SIGTERM: it cleans up as after Ctrl-C."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as the command line shows it.

    Attributes:
        kind: the class of the error, for programs.
        message: the message without a prefix; empty if the output was closed.
        exit_code: the exit code of the process.
    """

    kind: str
    message: str
    exit_code: int

    def to_dict(self) -> dict[str, Any]:
        """The failure as JSON values."""
        error = {"kind": self.kind, "message": self.message, "exit_code": self.exit_code}
        return {"schema": SCHEMA, "error": error}


def failure_of(error: BaseException) -> Failure:
    """The message and exit code of an exception."""
    if isinstance(error, _COMMAND_LINE_ERROR):
        return Failure("UsageError", _command_line_message(error), 2)
    if isinstance(error, Terminated):
        return Failure("Interrupted", "terminated; no incomplete files were left behind.", TERMINATED)
    if isinstance(error, KeyboardInterrupt):
        return Failure("Interrupted", "interrupted; no incomplete files were left behind.", INTERRUPTED)
    if isinstance(error, BrokenPipeError):
        return Failure(type(error).__name__, "", PIPE_CLOSED)
    return Failure(*explained(error))


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM raise an exception as Ctrl-C does, so that temporary files are deleted in both cases."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _command_line_message(error: Any) -> str:
    message = " ".join(str(error.format_message()).split())
    path = error.ctx.command_path if error.ctx is not None else "rmsnorm"
    return f"{message}{'' if message.endswith(('.', '?')) else '.'} See: {path} --help"
