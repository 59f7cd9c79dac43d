"""The command line `rmsnorm`.

No heavy library is imported before a command runs: `rmsnorm --help` must be fast and work without torch and
onnxruntime.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rmsnorm_deploy.cli.application import app

__all__ = ["app", "main"]


def main() -> NoReturn:
    """Run the command of the process's arguments, and exit with its exit code."""
    from rmsnorm_deploy.cli.application import run

    sys.exit(run(sys.argv[1:]))


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module 'rmsnorm_deploy.cli' has no attribute {name!r}")
    from rmsnorm_deploy.cli.application import app

    return app
