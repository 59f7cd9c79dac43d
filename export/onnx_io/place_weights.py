"""Put the weights of a model where its ONNX file can read them, without holding them in memory (`place_weights`)."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import onnx_ir as ir
import torch

from ...models.errors import UsageError
from ...models.weights.digest import sample_digest
from ...models.weights.mapped_file import MappedFile, Place, places_of, release_pages
from .atomic_files import restrict_mode
from .owned_files import MANIFEST, sha256

# `link`: clones that share the disk blocks of the checkpoint's files, else hard links. `copy`: copies of these files.
# `pack`: one new file with all weights. `reference`: the files themselves, in whose folder the model is written.
WeightsMode = Literal["link", "copy", "pack", "reference"]
# The ioctl of Linux by which a file becomes a clone of another one (btrfs, XFS and others), see ioctl_ficlone(2).
_FICLONE = 0x40049409
HARD_LINKED = (
    "the weights are hard links to the checkpoint's files; onnx.load refuses such files and needs --weights pack, copy "
    "or reference"
)
# The most bytes of other weights in the ONNX file itself, which is the only new file with `reference`.
_MOST_INLINE = 1 << 30
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
    model: ir.Model,
    folder: Path,
    name: str,
    mode: WeightsMode,
    full_hash: bool = False,
    final: Path | None = None,
) -> PlacedWeights:
    """Make the large initializers of a model external data in a folder; `ir.save` can then write the model.

    Args:
        model: the graph; its initializers are replaced.
        folder: an existing folder, in which the model will be saved.
        name: the model's file name there; the file of weights that no checkpoint has is `NAME.data`.
        mode: how weights that are in a checkpoint are placed.
        full_hash: also compute the SHA-256 of the checkpoint's files, which reads them.
        final: the folder in which the model will be, which contains the checkpoint's files, for `reference`.

    Raises:
        UsageError: a file of the checkpoint changed since the model was loaded; or with `reference` it is not in the
            folder, or other weights are too large for the ONNX file.
        OSError: writing failed.
    """
    values = [v for v in _initializers(model) if v.const_value is not None and v.const_value.nbytes > _EXTERNAL_BYTES]
    stored = _stored(values)
    own = [value for value in values if id(value) not in stored]
    files = list({id(place.file): place.file for place in stored.values()}.values())
    result, home = PlacedWeights(mode), folder
    if mode == "reference":
        assert final is not None
        home, names = final, {id(file): _inside(file, final) for file in files}
        _check_inline(own)
    else:
        names = _names(files, {name, f"{name}.data", MANIFEST})
        if mode != "pack":
            _place_files(files, names, folder, result)
        own = values if result.mode == "pack" else own
        if own:
            result.hashes[f"{name}.data"] = _write(own, stored, folder, f"{name}.data")
    if result.mode != "pack":
        for value in values:
            place = stored.get(id(value))
            if place is not None:
                _refer(value, names[id(place.file)], place.offset, place.length, home)
        for file in files:
            result.linked[names[id(file)]] = weights_row(file.path, home / names[id(file)], full_hash)
    for file in files:
        file.stamp.check_unchanged()
    return result


def _stored(values: list[ir.Value]) -> dict[int, Place]:
    """The places of those values that are in mapped files, by the id of the value."""
    raw = {id(value): tensor for value in values if (tensor := _torch_tensor(value.const_value)) is not None}
    return {key: place for key, place in zip(raw, places_of(raw.values()), strict=True) if place is not None}


def _inside(file: MappedFile, folder: Path) -> str:
    """The path of a file in a folder.

    Raises:
        UsageError: the file is not in the folder, also through a link.
    """
    real, place = Path(os.path.realpath(file.path)), Path(os.path.realpath(folder))
    if place not in real.parents:
        raise UsageError(
            f"weights: a model that refers to {file.path} must be in its folder, {real.parent}, or in one above it, "
            f"and got {folder}: ONNX Runtime reads no weights outside of the model's folder. Use that folder, or link."
        )
    return real.relative_to(place).as_posix()


def _check_inline(values: list[ir.Value]) -> None:
    size = sum(value.const_value.nbytes for value in values if value.const_value is not None)
    if size > _MOST_INLINE:
        raise UsageError(
            f"weights: {size} bytes of weights are not in the checkpoint as the model uses them (another dtype, "
            f"combined, quantized), and reference writes at most {_MOST_INLINE} bytes into the ONNX file. Use link or "
            "pack."
        )


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


def _place_files(files: list[MappedFile], names: dict[int, str], folder: Path, result: PlacedWeights) -> None:
    """Link or copy the files. Where they cannot be linked, none of them is there, and the mode becomes `pack`."""
    for file in files:
        place, source = folder / names[id(file)], Path(os.path.realpath(file.path))  # os.link keeps symbolic links
        if result.mode == "copy":
            shutil.copyfile(source, place)
            restrict_mode(place, [source])
            continue
        try:
            if not _cloned(source, place):
                os.link(source, place)
        except OSError as error:
            for other in files:
                (folder / names[id(other)]).unlink(missing_ok=True)
            result.mode = "pack"
            result.notes = [
                f"the weights were copied into one file, because {file.path} cannot be linked to from here "
                f"({error.strerror or error}); --weights pack or copy chooses that"
            ]
            return
        if place.stat().st_nlink > 1:
            result.notes = [HARD_LINKED]


def _cloned(source: Path, place: Path) -> bool:
    """Make a clone of a file that shares its blocks on the disk; False where the file system cannot."""
    if sys.platform != "linux":
        return False
    import fcntl

    with source.open("rb") as original, place.open("xb") as clone:
        try:
            fcntl.ioctl(clone.fileno(), _FICLONE, original.fileno())
        except OSError:
            clone.close()
            place.unlink()
            return False
    restrict_mode(place, [source])
    return True


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
        "bytes": place.stat().st_size,
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
                    held = 0
            _refer(value, name, written[key], tensor.nbytes, folder)
    release_pages()
    return digest.hexdigest()


def _parts(tensor: Any) -> Iterator[Any]:
    """The bytes of a tensor, a few megabytes at a time."""
    raw = _torch_tensor(tensor)
    if raw is None or raw.device.type != "cpu" or not raw.is_contiguous():
        yield tensor.tobytes()
        return
    for part in raw.detach().reshape(-1).view(torch.uint8).split(_CHUNK):
        yield part.numpy().data
