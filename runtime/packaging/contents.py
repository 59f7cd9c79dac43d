"""What a package holds (`Contents`): of an exported folder (`of_folder`), or of an engine (`of_engine`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ...export.onnx_io.manifest import read_manifest
from ...export.onnx_io.owned_files import sha256
from ...export.onnx_io.verify import verify_folder
from ...models.errors import UnsupportedError, UsageError, few
from ..engines.engine_file import open_engine_file, record_of

VERSION = "1"


class Source(NamedTuple):
    """A file that is copied or linked; its hash, where that is known."""

    path: Path
    sha256: str | None


@dataclass(slots=True)
class Contents:
    """What a package holds; paths are relative to it.

    Attributes:
        source: what is packaged, for messages.
        model: the file of the model.
        manifest: the fields of the package's manifest, without schema, versions and files.
        files: files that are copied or linked.
        sha256: the hash of the model, by which a validation report names it.
        texts: files that are written.
        scripts: those of the texts that are programs.
        notes: remarks for the user.
        record: of an engine, what `rmsnorm build` wrote about it.
        parts: of an export of several models, the contents of each, by the name that it has in the package.
    """

    source: Path
    model: str
    manifest: dict[str, Any]
    files: dict[str, Source]
    sha256: str | None
    texts: dict[str, str] = field(default_factory=dict)
    scripts: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Contents] = field(default_factory=dict)

    @property
    def hashes(self) -> set[str | None]:
        """The hashes of the models, by which validation reports name them."""
        return {part.sha256 for part in self.parts.values()} or {self.sha256}


def of_parts(source: Path, name: str) -> Contents:
    """The files of an exported folder of several models, such as an encoder and its decoder.

    Args:
        source: the folder.
        name: of the package: its models are NAME-PART, in folders of these names.

    Raises:
        UsageError: a file is missing or was changed.
        UnsupportedError: weights are not in it.
    """
    manifest = read_manifest(source)
    whole = Contents(source, "", {}, {}, None)
    _check_unchanged(source)  # its models too
    for part in manifest["components"]:
        own = read_manifest(source / part)
        _check_weights(source / part, own)
        whole.parts[f"{name}-{part}"] = _one_model(source / part, own, f"{name}-{part}/{VERSION}/")
    inner = tuple(f"{part}/" for part in manifest["components"])
    for file, row in manifest["files"].items():
        if not file.startswith(inner):
            whole.files[file] = Source(Path(os.path.realpath(source / file)), row.get("sha256"))
    weights: dict[str, Any] = {}
    for contents in whole.parts.values():
        whole.files |= contents.files
        weights |= (contents.manifest.get("weights") or {}).get("files") or {}
    left_out = ("schema", "files", "components", "weights")
    whole.manifest = {key: value for key, value in manifest.items() if key not in left_out}
    whole.manifest["models"] = {
        part: contents.model for part, contents in zip(manifest["components"], whole.parts.values(), strict=True)
    }
    if weights:
        whole.manifest["weights"] = {"mode": "copy", "files": weights}
    return whole


def of_folder(source: Path, inner: str) -> Contents:
    """The files of an exported folder, which must be as they were exported.

    Args:
        source: the folder.
        inner: the folder in the package for the model and its weights, ending in a slash; empty for the package itself.

    Raises:
        UsageError: a file is missing or was changed.
        UnsupportedError: the folder has several models, or its weights are not in it.
    """
    manifest = read_manifest(source)
    if manifest.get("models"):
        raise UnsupportedError(
            f"{source}: expected an exported folder, got a package. Package the folder it was made of."
        )
    if manifest.get("components"):
        raise UnsupportedError(
            f"{source}: expected one model, got several: {', '.join(manifest['components'])}. Package each of them, "
            f"such as {source / manifest['components'][0]}, or all of them for triton."
        )
    check_files(source, manifest)
    return _one_model(source, manifest, inner)


def _one_model(source: Path, manifest: Mapping[str, Any], inner: str) -> Contents:
    """The files of a folder of one model that were checked; see `of_folder`."""
    model = str(manifest.get("model", "model.onnx"))
    linked = set((manifest.get("weights") or {}).get("files") or {})
    files = {}
    for name, row in manifest["files"].items():
        of_model = name == model or name in linked or name.startswith(f"{model}.")
        files[inner + name if of_model else name] = Source(Path(os.path.realpath(source / name)), row.get("sha256"))
    fields = {key: value for key, value in manifest.items() if key not in ("schema", "files")}
    if inner:
        fields["model"] = inner + model
        if linked:
            moved = {inner + name: row for name, row in manifest["weights"]["files"].items()}
            fields["weights"] = {**manifest["weights"], "files": moved}
    return Contents(source, inner + model, fields, files, (manifest["files"].get(model) or {}).get("sha256"))


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Check that an exported folder has every file as it was exported, its weights too.

    Raises:
        UsageError: a file is missing or was changed.
        UnsupportedError: its weights are elsewhere.
    """
    _check_unchanged(folder)
    _check_weights(folder, manifest)


def _check_unchanged(folder: Path) -> None:
    broken = [file for file in verify_folder(folder) if file.problem is not None]
    if broken:
        raise UsageError(f"{folder / broken[0].name}: {broken[0].problem}. Restore the file, or export again.")


def _check_weights(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Check that the weights of a model are files of its own folder."""
    missing = sorted(set((manifest.get("weights") or {}).get("files") or {}) - set(manifest["files"]))
    if missing:
        raise UnsupportedError(
            f"{folder}: its weights stay in the checkpoint's own files ({few(missing)}), which are not files of the "
            "export. Export with --weights copy or pack."
        )


def of_engine(source: Path, inner: str, model: str) -> Contents:
    """An engine with its record, and the library of its plugin in the folder above it.

    Args:
        source: the engine, as `rmsnorm build` wrote it.
        inner: the folder in the package for the engine, ending in a slash.
        model: the name of the engine's file there.

    Raises:
        UsageError: it was changed, another program built it, or nothing is known of its inputs.
        UnsupportedError: it is not one of TensorRT.
    """
    engine = open_engine_file(source)
    if not engine.record:
        raise UsageError(
            f"{source}: expected {record_of(source).name} beside it, got none. Build it with rmsnorm build."
        )
    engine.read()  # compares the hash
    if engine.runtime != "tensorrt":
        raise UnsupportedError(
            f"{source}: expected an engine of TensorRT, which Triton runs, got one of {engine.runtime}."
        )
    record, manifest = dict(engine.record), engine.manifest
    if not manifest.get("inputs") or not manifest.get("outputs"):
        raise UsageError(
            f"{source}: expected an engine of an exported folder, got one of {engine.model}, a single file."
        )
    fields = {key: value for key, value in manifest.items() if key not in ("schema", "files", "weights")}
    fields["model"] = inner + model
    found = Contents(source, inner + model, fields, {}, record["sha256"], record=record)
    found.files[inner + model] = Source(Path(os.path.realpath(source)), record["sha256"])
    library = (record.get("plugin") or {}).get("library")
    if library is not None:
        found.files[plugin_place(inner, library)] = _plugin(record["plugin"])
    return found


def plugin_place(inner: str, library: str) -> str:
    """Where the library of a plugin stands in a package: beside the folders of versions, which have numbers."""
    return f"{inner.rstrip('/').rpartition('/')[0]}/plugin/{Path(library).name}"


def _plugin(plugin: Mapping[str, Any]) -> Source:
    place = Path(plugin["library"])
    if not place.is_file():
        raise UsageError(f"{place}: the plugin's library that the engine was built with is missing. Build it again.")
    found = sha256(place)
    if plugin.get("sha256") not in (None, found):
        raise UsageError(
            f"{place}: expected the library that the engine was built with (sha256 {plugin['sha256'][:12]}), got "
            f"another ({found[:12]}). Build the engine again."
        )
    return Source(place, found)
