"""A cache of engines (`EngineCache`), keyed by a hash of everything that an engine depends on.

A cache is a folder. Each entry is a folder in it, named by its key: the engine, its log, and its record with the
engine's hash. An entry whose engine does not have that hash is built again. An entry is locked during its build, so
that two simultaneous builds of one engine build it once.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...export.onnx_io.atomic_files import partial_folder
from ...export.onnx_io.owned_files import sha256
from ...models.errors import UsageError
from ...models.versions import installed_version
from ..engines.api import Flavor, cuda_device, flavor_of
from ..tensorrt import worker
from .engine_files import lock

if TYPE_CHECKING:
    from .plan import BuildPlan

RECORD: Final = "record.json"
_FILES: Final = (worker.ENGINE, worker.LOG, RECORD)
# Options that do not change the engine, or are part of the key in another form.
_WITHOUT_EFFECT: Final = (
    "memory_limit",
    "verbose",
    "plugin_library",
    "plugin",
    "timing_cache",
    "profiles",
    "architectures",
)


def engine_key(plan: BuildPlan) -> str:
    """A hash of what an engine depends on: model and weights, runtime, GPU, architectures, profiles, plugin, options.

    All weights are read to compute it.
    """
    flavor = flavor_of(plan.options.runtime)
    options = {name: value for name, value in plan.options.to_dict().items() if name not in _WITHOUT_EFFECT}
    content = {
        "model": sha256(plan.network.path),
        "weights": [sha256(file) for file in plan.network.external_files],
        "runtime": _runtime_versions(flavor),
        "architectures": list(plan.architectures),
        "gpu": None if flavor.architectures else cuda_device(),
        "profiles": [profile.to_dict() for profile in plan.profiles],
        "plugin": [plan.plugin.kind, plan.plugin.digest()],
        "options": options,
        "package": installed_version("rmsnorm-deploy"),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _runtime_versions(flavor: Flavor) -> dict[str, str]:
    """Versions of TensorRT's packages, or of its module if pip did not install it."""
    found = {name: version for name in flavor.distributions if (version := installed_version(name)) is not None}
    return found or {flavor.module: str(importlib.import_module(flavor.module).__version__)}


class CacheEntry:
    """The entry of one engine in the cache, while its lock is held."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, into: Path) -> dict[str, Any] | None:
        """Copy the engine and its log into a folder; returns its record, or None if there is no intact engine."""
        try:
            record: dict[str, Any] = json.loads((self._folder / RECORD).read_text(encoding="utf-8"))
            shutil.copyfile(self._folder / worker.ENGINE, into / worker.ENGINE)
            shutil.copyfile(self._folder / worker.LOG, into / worker.LOG)
            sound = sha256(into / worker.ENGINE) == record["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            sound = False
        if sound:
            return record
        for name in _FILES:
            (into / name).unlink(missing_ok=True)
        return None

    def write(self, source: Path, record: dict[str, Any]) -> None:
        """Copy the engine and log of a finished build into the cache."""
        with partial_folder(self._folder) as partial:
            for name in (worker.ENGINE, worker.LOG):
                shutil.copyfile(source / name, partial / name)
            (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            self._folder.mkdir(exist_ok=True)
            for name in _FILES:  # the record last: it contains the engine's hash
                (partial / name).replace(self._folder / name)


class EngineCache:
    """A folder of engines.

    Args:
        folder: the folder; it is created if it does not exist.

    Raises:
        UsageError: the folder cannot be created.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder).expanduser().absolute()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--cache: cannot create {self._folder}: {error.strerror or error}.") from error

    @contextmanager
    def entry(self, key: str) -> Iterator[CacheEntry]:
        """The entry of a key; other processes that use the same entry wait until the block exits."""
        try:
            file = (self._folder / f".{key}.lock").open("w")
        except OSError as error:
            raise UsageError(f"--cache: cannot write to {self._folder}: {error.strerror or error}.") from error
        with file:
            lock(file.fileno())
            yield CacheEntry(self._folder / key)
