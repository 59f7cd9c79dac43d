"""Which of TensorRT and TensorRT-RTX can run engines on this machine (`usable`), and what the machine is."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rmsnorm_deploy import __version__
from rmsnorm_deploy.export.onnx_io.manifest import versions
from rmsnorm_deploy.models.errors import RmsnormDeployError
from rmsnorm_deploy.runtime.engines import api
from rmsnorm_deploy.runtime.engines import device as devices

ROOT: Final = Path(__file__).parents[2]


def usable(wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """The products that can run engines here, and for each other one why not.

    Args:
        wanted: names of `api.RUNTIMES`; of the others nothing is said.
    """
    gpu = api.cuda_device()
    if gpu is None:
        return [], ["expected an NVIDIA GPU and its driver, got none"]
    try:
        devices.open_device()
    except RmsnormDeployError as error:
        return [], [str(error)]
    found, reasons = [], []
    for name in wanted:
        flavor = api.flavor_of(name)
        if not api.is_installed(name):
            reasons.append(f"{flavor.title} is not installed ({flavor.install})")
        elif flavor.architectures and gpu[1] not in flavor.architectures:
            known = ", ".join(f"sm_{number}" for number in flavor.architectures)
            reasons.append(f"{flavor.title} supports {known}; {gpu[0]} is sm_{gpu[1]}")
        else:
            found.append(name)
    return found, reasons


def machine(runtimes: Sequence[str]) -> dict[str, Any]:
    """Versions and devices, as JSON values."""
    import torch

    gpu = api.cuda_device()
    return {
        "rmsnorm_deploy": __version__,
        "commit": _answer("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "gpu": None if gpu is None else {"name": gpu[0], "architecture": f"sm_{gpu[1]}"},
        "driver": _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "runtimes": {name: _version(name) for name in runtimes},
        "cuda_of_torch": torch.version.cuda,
        "platform": platform.platform(),
        "versions": versions(),
    }


def _version(runtime: str) -> str:
    try:
        return api.Api(runtime).version
    except RmsnormDeployError as error:
        return str(error)


def _answer(*command: str) -> str | None:
    """The first line that a program prints; None if it fails or does not exist."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return next(iter(done.stdout.splitlines()), None)
    return None
