"""An engine on disk (`EngineFile`): what it is, which product runs it, and whether it is still what was built."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ...export.onnx_io.read_model import ENGINE_SUFFIXES
from ...models.errors import EnvironmentMissingError, UsageError
from ...models.regular_files import read_json, regular_size
from .api import FLAVORS, RUNTIMES, RuntimeName, flavor_name, flavor_of, is_installed

SCHEMA: Final = "rmsnorm_deploy.engine/1"


def record_of(place: Path) -> Path:
    """The record's file beside an engine."""
    return place.with_name(place.name + ".json")


def read_record(place: Path) -> dict[str, Any] | None:
    """The record beside an engine; None if this package did not write one."""
    file = record_of(place)
    try:
        content = read_json(file, "")
    except UsageError:
        return None
    if isinstance(content, dict) and content.get("schema") == SCHEMA and content.get("engine") == place.name:
        return content
    return None


def is_engine(place: Path) -> bool:
    """Whether a path names an engine: by the record beside it, or by its suffix."""
    return not place.is_dir() and (read_record(place) is not None or place.suffix.lower() in ENGINE_SUFFIXES)


@dataclass(frozen=True, slots=True)
class EngineFile:
    """An engine on disk.

    Attributes:
        path: its file.
        runtime: the product that runs it.
        record: what `rmsnorm build` wrote about it; empty if another program built it.
    """

    path: Path
    runtime: RuntimeName
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the exported folder that it was built from; empty if there was none."""
        return dict(self.record.get("model", {}).get("manifest") or {})

    @property
    def model(self) -> Path | None:
        """The .onnx file that it was built from; None if unknown."""
        place = self.record.get("model", {}).get("path")
        return None if place is None else Path(place)

    def dims(self) -> dict[str, list[int | str | None]]:
        """Sizes and names of the dims of each input, as the .onnx file has them."""
        return {row["name"]: row["dims"] for row in self.record.get("inputs", ())}

    def read(self) -> bytes:
        """The content of the file, which is the one that was built.

        Raises:
            UsageError: its size or its hash is not that of the record.
        """
        size, wanted = self.path.stat().st_size, self.record.get("bytes")
        content, problem = b"", None
        if wanted not in (None, size):
            problem = f"expected {wanted} bytes, got {size}"
        else:
            content = self.path.read_bytes()
            if self.record and hashlib.sha256(content).hexdigest() != self.record["sha256"]:
                problem = "its SHA-256 is another one"
        if problem is not None:
            raise UsageError(
                f"{self.path} is not the engine that {record_of(self.path).name} describes: {problem}. It was changed "
                "or replaced after it was built. Build it again: rmsnorm build."
            )
        return content


def open_engine_file(path: str | Path, runtime: str | None = None) -> EngineFile:
    """The engine of a path.

    Args:
        path: its file.
        runtime: the product that runs it; None for the one that its record names, or else the one that is installed.

    Raises:
        UsageError: the file does not exist or is empty; or the record names another product.
        EnvironmentMissingError: nothing says which product built the engine.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise UsageError(f"{place} does not exist; name an engine, such as rmsnorm build writes.")
    if regular_size(place) == 0:
        raise UsageError(f"{place} is empty; expected an engine. Build it again: rmsnorm build.")
    record = read_record(place)
    if record is None:
        return EngineFile(place, _runtime_without_record(place, runtime))
    built_by = flavor_of(record["runtime"]["name"])
    if runtime is not None and flavor_of(runtime) is not built_by:
        raise UsageError(f"{place} was built by {built_by.title}, so {flavor_of(runtime).title} cannot run it.")
    return EngineFile(place, record["runtime"]["name"], record)


def _runtime_without_record(place: Path, runtime: str | None) -> RuntimeName:
    if runtime is not None:
        return flavor_name(runtime)
    installed = [name for name in RUNTIMES if is_installed(name)]
    if len(installed) == 1:
        return installed[0]
    known = " and ".join(FLAVORS[name].title for name in RUNTIMES)
    found = f"{known} are both installed" if installed else f"neither {known.replace(' and ', ' nor ')} is installed"
    raise EnvironmentMissingError(
        f"{place} has no record ({record_of(place).name}) that names the product that built it, and {found}. Give "
        f"--runner {' or --runner '.join(RUNTIMES)}."
    )
