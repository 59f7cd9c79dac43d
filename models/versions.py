"""The versions of other libraries that this package works with, and whether the installed ones are among them.

The lower bounds are those of `pyproject.toml`; `make test-versions` tries both ends.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Library:
    """The supported versions of a library.

    Attributes:
        distribution: its name for pip.
        oldest: the lowest supported version.
        newest: the highest version that was tried; a later one may work.
        install: the command that installs a supported version.
    """

    distribution: str
    oldest: str
    newest: str
    install: str


_PACKAGE = "pip install --upgrade rmsnorm-deploy"
LIBRARIES: Final = (
    Library("torch", "2.11", "2.13", _PACKAGE),
    Library("onnx", "1.20", "1.23", _PACKAGE),
    Library("onnx-ir", "1.0", "1.1", _PACKAGE),
    Library("onnxscript", "0.7", "0.7", _PACKAGE),
    Library("numpy", "1.26", "2.4", _PACKAGE),
    Library("ml_dtypes", "0.5", "0.6", _PACKAGE),
    Library("transformers", "5.15", "5.24", 'pip install --upgrade "rmsnorm-deploy[hf]"'),
    Library("onnxruntime", "1.23", "1.32", 'pip install --upgrade "rmsnorm-deploy[cpu]"'),
    Library("onnxruntime-gpu", "1.23", "1.32", 'pip install --upgrade "rmsnorm-deploy[gpu]"'),
)
_BY_NAME: Final = {library.distribution: library for library in LIBRARIES}


def installed_version(distribution: str) -> str | None:
    """Version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def too_old(distribution: str) -> str:
    """Why the installed version of a library is not supported, with the command that installs one; empty if it is.

    A library that is not installed is not too old.
    """
    library, version = _BY_NAME[distribution], installed_version(distribution)
    if version is None or _numbers(version) >= _numbers(library.oldest):
        return ""
    return f"expected {distribution} {library.oldest} or later, got {version}. Install it with: {library.install}"


def older(version: str, wanted: str) -> bool:
    """Whether a version, such as `1.26.1`, is lower than another, such as `1.27`."""
    return _numbers(version) < _numbers(wanted)


def newer_than_tested(distribution: str) -> str:
    """A remark if the installed version of a library is later than the last one that was tried, else empty."""
    library, version = _BY_NAME[distribution], installed_version(distribution)
    newest = _numbers(library.newest)
    if version is None or _numbers(version)[: len(newest)] <= newest:
        return ""
    return (
        f"{distribution} {version} is later than {library.newest}, the latest that was tested. If it causes errors: "
        f'pip install "{distribution}=={library.newest}.*"'
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
