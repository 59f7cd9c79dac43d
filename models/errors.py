"""Errors that a user can act on, and the exit code of each on the command line.

They are defined in the lowest package so that every other one can raise them; `rmsnorm_deploy` re-exports them.
"""

from __future__ import annotations

from collections.abc import Sequence

BUG = 70  # EX_SOFTWARE of sysexits.h


class RmsnormDeployError(Exception):
    """Base of every error raised on purpose.

    Attributes:
        exit_code: the exit code of the command line.

    The message says what is wrong, where, and what to do.
    """

    exit_code = 2


class UsageError(RmsnormDeployError):
    """An argument, a file or an input is wrong: exit code 2."""

    exit_code = 2


class OutsideProfileError(UsageError):
    """The shapes of the inputs are outside of every optimization profile of an engine: exit code 2."""


class UnsupportedError(RmsnormDeployError):
    """The requested combination (target, opset, dtype, model) is not supported: exit code 3."""

    exit_code = 3


class EnvironmentMissingError(RmsnormDeployError):
    """A package, provider, library or device is missing: exit code 4."""

    exit_code = 4


class MismatchError(RmsnormDeployError):
    """Two computations that must agree differ: exit code 1."""

    exit_code = 1


# What Python says of a path such as ~name/file where there is no such user.
_NO_HOME = "Could not determine home directory."


def explained(error: BaseException) -> tuple[str, str, int]:
    """Kind, message and exit code of an error that some work ended with.

    An error that was not raised on purpose is one of the system or of the user's code, or else a bug: exit code 70.
    """
    kind = type(error).__name__
    if isinstance(error, RmsnormDeployError):
        return kind, str(error), error.exit_code
    if isinstance(error, SystemExit):
        return "UsageError", f"code that this command ran, such as the model's, exited with {error.code!r}.", 2
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("rmsnorm_deploy"):
        message = f"the package {error.name} is not installed. List what is missing with: rmsnorm doctor"
        return "EnvironmentMissingError", message, 4
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return "UsageError", f"{where}{error.strerror}", 2
    if isinstance(error, RuntimeError) and str(error) == _NO_HOME:
        return "UsageError", "the home folder that a path with ~ begins with is not known; write the whole path.", 2
    if isinstance(error, MemoryError):
        cause = f" ({error})" if str(error) else ""
        return "UsageError", f"this needs more memory than there is{cause}. Use smaller files or shapes.", 2
    first = " ".join(str(error).split())[:400]
    return kind, f"{kind}: {first} (this is a bug; run with RMSNORM_DEBUG=1 for the traceback)", BUG


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names and the number of the others, for a message: `a, b, c and 2 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
