"""Open an exported model (`open_exported`): a folder with a manifest, a single .onnx file, or an engine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...export.onnx_io.manifest import read_manifest
from ...export.onnx_io.verify import check_weights
from ...models.errors import UsageError
from ...models.regular_files import regular_size
from ..engines.engine_file import is_engine, read_record


@dataclass(frozen=True, slots=True)
class Exported:
    """An exported model on disk.

    Attributes:
        model: the .onnx file, or the engine.
        folder: the exported folder, or None for a single file; of an engine, the folder that it was built from, if it
            is still there.
        manifest: its manifest, empty for a single file.
        is_engine: whether the model is an engine.
        end_tokens: of an engine, the end-of-sequence ids of the folder that it was built from.
    """

    model: Path
    folder: Path | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    is_engine: bool = False
    end_tokens: tuple[int, ...] = ()

    @property
    def dtype(self) -> str | None:
        """Dtype of the exported model; None if the manifest does not contain it."""
        return self.manifest.get("dtype")


def open_exported(path: str | Path) -> Exported:
    """Open an exported folder, an .onnx file or an engine.

    Raises:
        UsageError: the path does not exist, it is none of these, or the weights of a folder are not those exported.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        manifest = read_manifest(place)
        parts = manifest.get("components", [])
        if parts:
            raise UsageError(
                f"{place} holds several models: {', '.join(parts)}. Name one of them, such as {place / parts[-1]}."
            )
        if manifest.get("models"):
            names = [str(place / file) for file in manifest["models"].values()]
            raise UsageError(f"{place} holds several models for a server. Name one of them: {', '.join(names)}.")
        name = manifest.get("model", "model.onnx")
        model = place / name
        try:
            real = Path(os.path.realpath(model))
        except ValueError as error:  # a NUL character, or one that file names cannot have
            raise UsageError(f"{place}: its manifest names the model {name!r}, which is not a file name.") from error
        if Path(os.path.realpath(place)) not in real.parents:
            raise UsageError(f"{place}: its manifest names the model {name!r}, which is outside of the folder.")
        if not model.is_file():
            raise UsageError(f"{place}: its manifest names the model {name!r}, which is missing; export again.")
        if is_engine(model):  # of a package
            return open_exported(model)
        check_weights(place, manifest)
        return Exported(model, place, manifest)
    if "\0" in str(place) or not place.exists():
        raise UsageError(f"{place} does not exist; name an exported folder, an .onnx file or an engine.")
    regular_size(place)  # refuses devices and pipes
    if is_engine(place):
        built_from = (read_record(place) or {}).get("model") or {}
        folder = None if built_from.get("folder") is None else Path(built_from["folder"])
        found = folder if folder is not None and folder.is_dir() else None
        ends = tuple(built_from.get("end_tokens") or ())
        return Exported(place, found, dict(built_from.get("manifest") or {}), is_engine=True, end_tokens=ends)
    return Exported(place)


def component_folders(path: str | Path) -> dict[str, Path]:
    """The folders of the models in an exported folder, by name; empty for a folder of one model, and for a file.

    Raises:
        UsageError: the folder has no manifest that can be read, or one of the models is missing.
    """
    place = Path(path).expanduser()
    if not place.is_dir():
        return {}
    names = read_manifest(place).get("components", [])
    folders = {name: place / name for name in names}
    missing = [name for name, folder in folders.items() if not folder.is_dir()]
    if missing:
        raise UsageError(f"{place}: its manifest names the models {', '.join(names)}, but {missing[0]} is missing.")
    return folders
