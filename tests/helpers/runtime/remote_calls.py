"""Functions that a cluster calls in its own processes."""

from __future__ import annotations

import os
from pathlib import Path

from rmsnorm_deploy.models.errors import UsageError


def add(first: int, second: int) -> int:
    return first + second


def die_once(mark: str) -> int:
    """Kill the process, unless the file is there; returns the number of calls."""
    path = Path(mark)
    count = len(path.read_text()) + 1 if path.exists() else 1
    path.write_text("x" * count)
    if count == 1:
        os._exit(9)
    return count


def die() -> None:
    os._exit(9)


def refuse(mark: str) -> None:
    """Raise, and count the calls in a file."""
    with Path(mark).open("a", encoding="utf-8") as file:
        file.write("x")
    raise UsageError("expected something else, got this.")
