"""The C++ library with both plugins: where it is, and what one says of itself."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
from pathlib import Path
from typing import Any, Final

LIBRARY_NAME: Final = "librmsnorm_deploy.so"
REGISTERING_NAME: Final = "librmsnorm_deploy_register.so"
# The library's place, where it is not the usual one.
LIBRARY_VARIABLE: Final = "RMSNORM_DEPLOY_PLUGIN"
# What the library reads when it compiles kernels: NVRTC's file, and the architectures, such as `86,89`.
NVRTC_VARIABLE: Final = "RMSNORM_DEPLOY_NVRTC"
ARCHITECTURES_VARIABLE: Final = "RMSNORM_DEPLOY_ARCHITECTURES"


def default_folder() -> Path:
    """Where `rmsnorm plugin build` puts the library."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "rmsnorm-deploy" / "plugin"


def find_library() -> Path | None:
    """The library that is used where none is named: the variable's, else the one that was built; None without one."""
    named = os.environ.get(LIBRARY_VARIABLE)
    place = Path(named).expanduser() if named else default_folder() / LIBRARY_NAME
    return place if place.is_file() else None


def find_nvrtc() -> Path | None:
    """NVRTC's library as pip brought it; None leaves it to the system's loader."""
    for module, pattern in (("nvidia.cu13", "lib/libnvrtc.so.*"), ("nvidia.cuda_nvrtc", "lib/libnvrtc.so.*")):
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            continue
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            found = sorted(Path(place).glob(pattern))
            if found:
                return found[-1]
    return None


def kernels_report(library: Path) -> list[dict[str, Any]]:
    """The kernels that a loaded library compiled in this process: operator, width, dtype, architectures, bytes."""
    return json.loads(_text(library, "rmsnorm_deploy_kernels") or "[]")


def last_error(library: Path) -> str:
    """What a loaded library last refused in this process; empty where it refused nothing."""
    return _text(library, "rmsnorm_deploy_last_error")


def _text(library: Path, function: str) -> str:
    entry = getattr(ctypes.CDLL(str(library)), function)
    entry.restype = ctypes.c_char_p
    return (entry() or b"").decode(errors="replace")
