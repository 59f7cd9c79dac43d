"""The command line `rmsnorm`.

Nothing heavy is imported before a command runs: `rmsnorm --help` must stay quick and work where torch or onnxruntime
are not installed.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rmsnorm_deploy.cli.application import app

__all__ = ["app", "main"]


def main() -> NoReturn:
    """Run the command that the process was called with, and exit with its code."""
    from rmsnorm_deploy.cli.application import run

    sys.exit(run(sys.argv[1:]))


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module 'rmsnorm_deploy.cli' has no attribute {name!r}")
    from rmsnorm_deploy.cli.application import app

    return app
