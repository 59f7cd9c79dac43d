"""Errors that a user can act on, and the exit code that each one becomes on the command line.

They live in the lowest package so that every other one can raise them; the face re-exports them.
"""

from __future__ import annotations


class RmsnormDeployError(Exception):
    """Base of every error raised on purpose.

    Attributes:
        exit_code: what the command line exits with.

    The message says what was wrong, where, and what to do.
    """

    exit_code = 2


class UsageError(RmsnormDeployError):
    """An argument, a file or an input is wrong: exit code 2."""

    exit_code = 2


class UnsupportedError(RmsnormDeployError):
    """The combination asked for (target, opset, dtype, model) cannot be done: exit code 3."""

    exit_code = 3


class EnvironmentMissingError(RmsnormDeployError):
    """A package, provider, library or device is not there: exit code 4."""

    exit_code = 4


class MismatchError(RmsnormDeployError):
    """Two computations that had to agree do not: exit code 1."""

    exit_code = 1
