"""How many modules one has to open to follow a command: those whose functions run, from the command line to the result.

`python -m tests.helpers.journeys` counts four journeys: validate, export, rewrite, and from a NormSpec to a report.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

JOURNEYS = {
    "export": ("export", "builtin:small", "-o", "{folder}/out", "--target", "ort"),
    "validate": ("validate", "{folder}/out", "--against", "builtin:small", "--shape", "2x5"),
    "rewrite": ("rewrite", "{folder}/plain/model.onnx", "-o", "{folder}/new", "--target", "ort"),
    "a NormSpec to the report": ("inspect", "builtin:small", "--made-up"),
}


def modules_of(arguments: list[str], root: Path) -> set[str]:
    """The files of the package under `root` in which a function runs while the command does."""
    from rmsnorm_deploy.cli.application import run

    seen: set[str] = set()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and not code.co_name.startswith("<"):
            seen.add(code.co_filename)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = run(arguments)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    if code not in (0, 1):
        raise RuntimeError(f"rmsnorm {' '.join(arguments)} ended with {code}")
    paths = {Path(name).resolve() for name in seen if name.endswith(".py")}
    folders = [root / name for name in ("models", "export", "plugins", "runtime", "src")]
    return {str(path.relative_to(root)) for path in paths if any(path.is_relative_to(folder) for folder in folders)}


def main(root: Path) -> None:
    """Print the number of modules for each journey; with `-v` their names too."""
    with tempfile.TemporaryDirectory() as folder:
        from rmsnorm_deploy.cli.application import run

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run(["export", "builtin:small", "-o", f"{folder}/plain"])
        for name, words in JOURNEYS.items():
            found = modules_of([word.format(folder=folder) for word in words], root)
            print(f"{name:26} {len(found)} modules")
            if "-v" in sys.argv:
                print("\n".join(f"    {path}" for path in sorted(found)))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] != "-v" else ".").resolve())
