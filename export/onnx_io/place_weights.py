"""Put the weights of a model where its ONNX file can read them, without holding them in memory (`place_weights`)."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import onnx_ir as ir
import torch

from ...models.errors import UsageError
from ...models.weights.digest import sample_digest
from ...models.weights.mapped_file import MappedFile, Place, places_of, release_pages
from ...models.weights.side_file import release_side_pages
from .atomic_files import restrict_mode
from .owned_files import sha256

# `link`: hard links to the checkpoint's files. `copy`: copies of these. `pack`: one new file with all weights.
WeightsMode = Literal["link", "copy", "pack"]
# Smaller tensors are stored in the ONNX file itself.
_EXTERNAL_BYTES = 1024
# Tensors begin at multiples of a memory page, so that programs can map each of them.
_PAGE = 4096
_CHUNK = 16 << 20
# Pages of weights that were written are given back after so many bytes.
_HELD = 256 << 20


def parse_weights(text: str) -> WeightsMode:
    """The mode that a text names.

    Raises:
        UsageError: it names none.
    """
    for mode in get_args(WeightsMode):
        if text == mode:
            return mode
    raise UsageError(f"weights: expected one of {', '.join(get_args(WeightsMode))}, got {text!r}.")


@dataclass(slots=True)
class PlacedWeights:
    """The files with a model's weights.

    Attributes:
        mode: how the weights at rest were placed; `pack` where links were asked for and are not possible.
        linked: files of the checkpoint in the model's folder, by name, as the manifest describes them.
        hashes: SHA-256 of the files that were written here, by name.
        notes: remarks for the user.
    """

    mode: WeightsMode
    linked: dict[str, dict[str, Any]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def place_weights(
    model: ir.Model, folder: Path, name: str, mode: WeightsMode, full_hash: bool = False
) -> PlacedWeights:
    """Make the large initializers of a model external data in a folder; `ir.save` can then write the model.

    Args:
        model: the graph; its initializers are replaced.
        folder: an existing folder, in which the model will be saved.
        name: the model's file name there; the file of weights that no checkpoint has is `NAME.data`.
        mode: how weights that are in a checkpoint are placed.
        full_hash: also compute the SHA-256 of the checkpoint's files, which reads them.

    Raises:
        UsageError: a file of the checkpoint changed since the model was loaded.
        OSError: writing failed.
    """
    values = [value for value in _initializers(model) if value.const_value is not None]
    raw = [_torch_tensor(value.const_value) for value in values]
    found = places_of([tensor for tensor in raw if tensor is not None])
    places = iter(found)
    placed = {id(value): next(places) for value, tensor in zip(values, raw, strict=True) if tensor is not None}
    large = [value for value in values if value.const_value is not None and value.const_value.nbytes > _EXTERNAL_BYTES]
    stored = {id(value): place for value in large if (place := placed.get(id(value))) is not None}
    files = list({id(place.file): place.file for place in stored.values()}.values())
    result = PlacedWeights(mode)
    names: dict[int, str] = {}
    if mode != "pack":
        names = _names(files, {name, f"{name}.data", "manifest.json"})
        problem = _place_files(files, names, folder, mode)
        if problem is not None:
            result.mode, result.notes, names = "pack", [problem], {}
    if names:
        for value in large:
            place = stored.get(id(value))
            if place is not None:
                _refer(value, names[id(place.file)], place.offset, place.length, folder)
        large = [value for value in large if id(value) not in stored]
        for file in files:
            result.linked[names[id(file)]] = weights_row(file.path, folder / names[id(file)], full_hash)
    if large:
        result.hashes[f"{name}.data"] = _write(large, stored, folder, f"{name}.data")
    for file in files:
        file.check_unchanged()
    return result


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()


def _torch_tensor(tensor: Any) -> torch.Tensor | None:
    raw = getattr(tensor, "raw", None)
    return raw if isinstance(raw, torch.Tensor) else None


def _names(files: list[MappedFile], taken: set[str]) -> dict[int, str]:
    """A name in the new folder for each file: its own, with a number where another file has that name."""
    names = {}
    for file in files:
        name, number = file.path.name, 2
        while name in taken:
            name, number = f"{file.path.stem}-{number}{file.path.suffix}", number + 1
        taken.add(name)
        names[id(file)] = name
    return names


def _place_files(files: list[MappedFile], names: dict[int, str], folder: Path, mode: WeightsMode) -> str | None:
    """Link or copy the files; a reason why they cannot be linked, and then none of them is there."""
    for file in files:
        place, source = folder / names[id(file)], Path(os.path.realpath(file.path))  # os.link keeps symbolic links
        if mode == "copy":
            shutil.copyfile(source, place)
            restrict_mode(place, [source])
            continue
        try:
            os.link(source, place)
        except OSError as error:
            for other in files:
                (folder / names[id(other)]).unlink(missing_ok=True)
            return (
                f"the weights were copied into one file, because {file.path} cannot be linked to from here "
                f"({error.strerror or error}); --weights pack or copy chooses that"
            )
    return None


def weights_row(source: Path, place: Path, full_hash: bool = False) -> dict[str, Any]:
    """What a manifest says of a file of weights that it did not write, from which `verify` tells if it was changed.

    Args:
        source: the original.
        place: its link or copy in the model's folder.
        full_hash: also hash all of it.

    Raises:
        UsageError: the file cannot be read.
    """
    return {
        "source": str(source),
        "changed_ns": place.stat().st_mtime_ns,
        "sample": sample_digest(place),
        "sha256": sha256(place) if full_hash else None,
    }


def _refer(value: ir.Value, location: str, offset: int, length: int, folder: Path) -> None:
    tensor = value.const_value
    assert tensor is not None
    shape = ir.Shape(tensor.shape.numpy())
    value.const_value = ir.ExternalTensor(
        location, offset, length, tensor.dtype, shape=shape, name=value.name or "", base_dir=folder
    )


def _write(values: list[ir.Value], stored: dict[int, Place], folder: Path, name: str) -> str:
    """Write tensors to a file, each at a page of its own, and refer to them; equal tensors at rest are written once.

    Returns:
        The SHA-256 of the file.
    """
    digest, end, held = hashlib.sha256(), 0, 0
    written: dict[tuple[int, int, int], int] = {}
    with (folder / name).open("xb") as file:
        for value in values:
            tensor, place = value.const_value, stored.get(id(value))
            assert tensor is not None
            key = (id(place.file), place.offset, place.length) if place is not None else (id(tensor), 0, 0)
            if key not in written:
                gap = bytes(-end % _PAGE)
                file.write(gap)
                digest.update(gap)
                written[key] = end = end + len(gap)
                for part in _parts(tensor):
                    file.write(part)
                    digest.update(part)
                    end, held = end + len(part), held + len(part)
                if held > _HELD:
                    release_pages()
                    release_side_pages()
                    held = 0
            _refer(value, name, written[key], tensor.nbytes, folder)
    release_pages()
    release_side_pages()
    return digest.hexdigest()


def _parts(tensor: Any) -> Iterator[Any]:
    """The bytes of a tensor, a few megabytes at a time."""
    raw = _torch_tensor(tensor)
    if raw is None or raw.device.type != "cpu" or not raw.is_contiguous():
        yield tensor.tobytes()
        return
    for part in raw.detach().reshape(-1).view(torch.uint8).split(_CHUNK):
        yield part.numpy().data
