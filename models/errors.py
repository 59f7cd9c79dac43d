"""Errors that a user can act on, and the exit code of each on the command line.

They are defined in the lowest package so that every other one can raise them; `rmsnorm_deploy` re-exports them.
"""

from __future__ import annotations

from collections.abc import Sequence


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


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names and the number of the others, for a message: `a, b, c and 2 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
