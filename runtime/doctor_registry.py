"""Ask TensorRT's plugin registry, and the plugin's library, in a process of its own (`ask`), as both may end it.

`python -m rmsnorm_deploy.runtime.doctor_registry MODULE LIBRARY` prints the answer as JSON; either may be empty.
Neither `Runtime` nor `Builder` is touched: without a driver they end the process.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..models.errors import RmsnormDeployError
from ..plugins import contract

_SECONDS = 60.0


def ask(module: str, library: str | None) -> dict[str, Any]:
    """What is registered in a product, or what a library says about itself.

    Args:
        module: `tensorrt` or `tensorrt_rtx`, to load the library into its registry; empty to read the library alone.
        library: the library's path; None for the registry without it.

    Returns:
        `creators` and `problem`; of a library alone, `info` too.
    """
    command = [sys.executable, "-m", __name__, module, library or ""]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False, env=environment,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"creators": [], "problem": " ".join(str(error).split())}
    except (ValueError, IndexError):
        lines = done.stderr.strip().splitlines()
        return {
            "creators": [],
            "problem": f"the process ended with code {done.returncode}{': ' + lines[-1] if lines else ''}",
        }


def answer(module: str, library: str) -> dict[str, Any]:
    """See `ask`; in this process."""
    from ..plugins.tensorrt.library import read_library
    from .engines.plugin_creators import creator_key, load_library

    try:
        if not module:
            info = read_library(Path(library)).to_dict()
            return {"creators": info["creators"], "problem": "", "info": info}
        trt = importlib.import_module(module)
        problem = ""
        try:
            if library:
                load_library(trt, Path(library))
        except RmsnormDeployError as error:
            problem = str(error)
        keys = [creator_key(creator) for creator in trt.get_plugin_registry().all_creators]
        own = [key for key in keys if key[2] == contract.PLUGIN_NAMESPACE]
        names = ("name", "version", "namespace")
        return {"creators": [dict(zip(names, key, strict=True)) for key in own], "problem": problem}
    except Exception as error:  # a product that is damaged may raise any error
        return {"creators": [], "problem": " ".join(str(error).split()) or type(error).__name__}


if __name__ == "__main__":
    print(json.dumps(answer(*sys.argv[1:3])))
